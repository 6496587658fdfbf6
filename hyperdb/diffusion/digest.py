"""What a base is: one digest of all that is loaded, wherever it came from and in whatever format it was stored."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

# {digest: the name of the same base before digests covered configurations}. Whatever was made of the base in
# `hyperdb/embedded/base` before (the hypernetwork and the prior beside it, people's own fits) states the older name:
# so that all of it stays valid, that base keeps it. Any other content has another digest, thus no older name.
FORMER = {"8ad42867b070528e": "60e783efe6915eef"}

# of a text encoder's configuration: how it was stored and by what
STORED = {"_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _of_tensor(name: str, value: Tensor) -> bytes:
    plain = value.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(_text([name, list(plain.shape)]))
    digest.update(plain.numpy().data)
    return digest.digest()


def _weights(module: nn.Module, dtype: torch.dtype = torch.float32, parts: tuple[str, ...] = ("",)) -> bytes:
    """Hash names, shapes and values of parameters as rounded to `dtype`: what they are stored in does not count.

    Only those count whose names begin as one of `parts`.
    """
    # some versions of transformers put a CLIPTextModel's layers under `text_model.`
    named = {
        name.removeprefix("text_model."): value.to(dtype)
        for name, value in module.named_parameters() if name.startswith(parts)
    }  # fmt: skip
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: gigabytes in all cores
        return b"".join(pool.map(_of_tensor, sorted(named), [named[name] for name in sorted(named)]))


def _chosen(model: UNet2DConditionModel | AutoencoderKL) -> dict[str, Any]:
    """Return the settings of a diffusers model that are not its class's defaults, whether written down or not."""
    known = inspect.signature(type(model).__init__).parameters
    return {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and not (name in known and _text(known[name].default) == _text(value))
    }


def _words(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Return all that turns words into ids, without what the last call has left behind."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side)
    ids = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {**whole, "padding": None, "truncation": None, "rest": [*rest, ids]}


def digest_vae(vae: AutoencoderKL) -> str:
    """Return 16 hex digits over an autoencoder's settings and its weights to float16.

    A base stores them so, and latents are kept so: those from before the rounding serve after it.
    """
    return hashlib.sha256(_weights(vae, torch.float16) + _text(_chosen(vae))).hexdigest()[:16]


def digest_latents(vae: AutoencoderKL) -> str:
    """Return 16 hex digits over all that decides the latents of an autoencoder: the same with another decoder."""
    encodes = _weights(vae, torch.float16, ("encoder.", "quant_conv."))
    return hashlib.sha256(encodes + _text(_chosen(vae))).hexdigest()[:16]


def digest_base(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    schedule: DDPMScheduler,
) -> str:
    """Return 16 hex digits over everything that a base draws with: weights, settings, words, noise levels.

    Take it before the weights are rounded to the dtype of the computation: what a base is does not depend on it.
    Folder, hub id and single file of the same content have the same digest, with `.bin` or `.safetensors`.
    """
    defaults: Mapping[str, Any] = type(text_encoder.config)().to_dict()
    text_settings = {
        name: value
        for name, value in text_encoder.config.to_dict().items()
        if name not in STORED and _text(defaults.get(name)) != _text(value)
    }
    # a sampler takes its own default for what is not written down: the schedule's defaults are not settings
    levels = schedule.config
    written = {k: v for k, v in levels.items() if k[0] != "_" and k not in levels.get("_use_default_values", ())}
    digest = hashlib.sha256()
    for weights in (unet, text_encoder, vae):
        digest.update(_weights(weights))
    digest.update(_text([_chosen(unet), text_settings, _chosen(vae), _words(tokenizer), written]))
    found = digest.hexdigest()[:16]
    return FORMER.get(found, found)
