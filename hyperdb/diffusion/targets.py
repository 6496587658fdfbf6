"""Which places of a Stable Diffusion model are personalised: found by class, never listed by hand.

`find_targets` are the paper's, `find_sites` all that a LoRA of another tool may change, and `find_set` the sets that
adapters ask for by name. A place is called after its module, or, where it is the module's bias, `MODULE.bias`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from hyperdb.runtime.errors import UserError

_KEPT = "hyperdb_signs"  # an attribute of layers whose weights are stored otherwise now


def _signs(module: nn.Linear) -> bytes:
    if (kept := module.__dict__.get(_KEPT)) is not None:
        return bytes(kept)
    return np.packbits(torch.signbit(module.weight[:8].detach()).cpu().numpy()).tobytes()


def keep_signs(module: nn.Linear) -> None:
    """Have `base_hash` know a layer by its present weights, whatever becomes of them."""
    module.__dict__[_KEPT] = _signs(module)


def base_hash(modules: Mapping[str, nn.Linear]) -> str:
    """Return 16 hex digits that tell a base from its fine-tuned descendants, "" for meta weights.

    Taken over the signs in the first rows of every weight: the same whether loaded in float32, float16 or
    bfloat16 (rounding keeps signs), while the slightest fine-tuning flips some of the many weights near zero. Of a
    quantised base it is that from before.
    """
    digest = hashlib.sha256()
    for module in modules.values():
        if module.weight.is_meta:
            return ""
        digest.update(_signs(module))
    return digest.hexdigest()[:16]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through `named_modules` under the names from before torch.compile wrapped the whole or parts."""
    for path, module in model.named_modules():
        yield path.replace("_orig_mod.", "").removesuffix("._orig_mod"), module


def forget_compiled(*models: nn.Module) -> None:
    """Have torch.compile compile again what it has compiled of the models: it would not see hooks added since."""
    for module in (module for model in models for module in model.modules()):
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            torch.compiler.reset()
            return


def find_targets(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Linear]:
    """Return the paper's layers by name, in the order of the modules; 192 of SD1.5.

    Query, key, value and output of every attention (self and cross) and the projection of every GEGLU in the
    UNet; query, key, value and output of every attention of the CLIP text encoder. Names are `unet.` or
    `text_encoder.` and the module's path, without the `text_model.` of some versions of transformers.
    """
    found: dict[str, nn.Module] = {}
    for path, module in _modules(unet):
        if isinstance(module, Attention):
            if module.fused_projections:
                raise UserError(f"unet.{path} has fused projections; call unfuse_qkv_projections() first")
            parts: dict[str, nn.Module] = {"to_q": module.to_q, "to_k": module.to_k, "to_v": module.to_v}
            parts["to_out.0"] = module.to_out[0]
        elif isinstance(module, GEGLU):
            parts = {"proj": module.proj}
        else:
            continue
        found.update({f"unet.{path}.{part}": layer for part, layer in parts.items()})
    for path, module in _modules(text_encoder):
        if isinstance(module, CLIPAttention):
            short = path.removeprefix("text_model.")
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found[f"text_encoder.{short}.{part}"] = getattr(module, part)
    if not found:
        raise UserError(
            "no attention layers found: this needs a Stable Diffusion UNet and a CLIP text encoder"
        )
    found = {name: getattr(layer, "_orig_mod", layer) for name, layer in found.items()}
    for name, layer in found.items():
        if not isinstance(layer, nn.Linear):
            raise UserError(f"{name} is a {type(layer).__name__}, not nn.Linear; unload other adapters first")
    return found  # type: ignore[return-value]


def find_sites(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer and convolution, in the order of the modules, by names as of `find_targets`."""
    found = {f"unet.{path}": module for path, module in _modules(unet)}
    for path, module in _modules(text_encoder):
        found[f"text_encoder.{path.removeprefix('text_model.')}"] = module
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear | nn.Conv2d)}


SETS = (
    *("attention", "attention_unet", "without_geglu", "unet_attention", "cross_kv", "kv", "unet", "everything"),
    *("token", "plus", "custom", "e4t", "any"),
)
TOKENS = "text_encoder.embeddings.token_embedding"


def _places(part: str, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through every weight and every bias of a model, but for what sees no batch: the embedding of positions."""
    for path, module in _modules(model):
        name = f"{part}.{path.removeprefix('text_model.')}"
        known = isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.Embedding)
        if not known or name.endswith("position_embedding"):
            continue
        if getattr(module, "weight", None) is not None:
            yield name, module
        if getattr(module, "bias", None) is not None:
            yield f"{name}.bias", module


def find_set(which: str, unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Module]:
    """Return a set of places, in the order of the modules. Raises `UserError` for a name that is none of `SETS`.

    attention: the paper's layers (`find_targets`); attention_unet: of these, those of the UNet; without_geglu: all
    but the GEGLUs' projections; unet_attention: query, key, value and output of the UNet's attention; cross_kv:
    keys and values of its attention to the text (Custom Diffusion, without its word); kv: those of its attention to
    itself as well (A1111's hypernetworks); unet: every weight and bias of the UNet (DreamBooth); everything: the
    text encoder's as well; token: the embedding of the words (Textual Inversion); plus: the
    text encoder as a whole, then cross_kv (P+); custom: this embedding, then
    cross_kv; e4t: this embedding, then unet_attention; any: every place that some set has.
    """
    if which == "attention":
        return dict(find_targets(unet, text_encoder))
    if which == "attention_unet":
        return {name: m for name, m in find_targets(unet, text_encoder).items() if name.startswith("unet.")}
    if which == "without_geglu":
        return {name: m for name, m in find_targets(unet, text_encoder).items() if not name.endswith(".proj")}
    if which in ("cross_kv", "kv", "unet_attention"):
        attentions = [(f"unet.{path}", m) for path, m in _modules(unet) if isinstance(m, Attention)]
        paths = [path for path, m in attentions if m.is_cross_attention or which != "cross_kv"]
        sides = ("to_q", "to_k", "to_v", "to_out.0") if which == "unet_attention" else ("to_k", "to_v")
        targets = find_targets(unet, text_encoder)
        return {f"{path}.{side}": targets[f"{path}.{side}"] for path in paths for side in sides}
    if which == "unet":
        return dict(_places("unet", unet))
    if which == "everything":
        return dict([*_places("unet", unet), *_places("text_encoder", text_encoder)])
    if which == "token":
        return {name: m for name, m in _places("text_encoder", text_encoder) if name == TOKENS}
    if which == "plus":
        return {"text_encoder": text_encoder, **find_set("cross_kv", unet, text_encoder)}
    if which in ("custom", "e4t"):
        parts = "token", "cross_kv" if which == "custom" else "unet_attention"
        return {name: m for part in parts for name, m in find_set(part, unet, text_encoder).items()}
    if which == "any":
        return find_set("everything", unet, text_encoder) | find_set("plus", unet, text_encoder)
    raise UserError(f"sites={which!r}: expected one of {', '.join(SETS)}")
