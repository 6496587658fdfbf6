"""Load a Stable Diffusion 1.x model and give its parts plain names: modules, token ids, latents, images."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from hyperdb.diffusion import STABLE_DIFFUSION, DiffusionConfig, resolve
from hyperdb.diffusion.targets import find_targets
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_files
from hyperdb.runtime.precision import autocast

PIXELS = 2**18  # in one pass of the autoencoder, whose memory grows with them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; auto is cuda, then mps, then cpu."""
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"diffusion.device={name!r}: expected auto, cpu, cuda or mps") from error
        checks: dict[str, Callable[[], bool]] = {
            "cuda": torch.cuda.is_available,
            "mps": torch.backends.mps.is_available,
        }
        here = checks.get(device.type)
        if here is not None and not here():
            raise UserError(f"diffusion.device={name!r}: PyTorch sees no such device here; use auto or cpu")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _find(config: DiffusionConfig) -> tuple[str, Path | None]:
    """Return what diffusers reads the base from, and the folder or file that is; None for a hub id."""
    folder = resolve(config.path)
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".safetensors"):
        return str(folder), folder
    if config.path.startswith(("package:", "/", ".", "~")) or folder.is_file() or folder.suffix == ".safetensors":
        raise UserError(
            f"no base model at {folder}; set diffusion.path to a Stable Diffusion folder, checkpoint or hub id"
        )
    return config.path, None


def _unusable(config: DiffusionConfig, name: str, why: str) -> UserError:
    fetch = "" if resolve(config.path).exists() else f" fetch it with `hf download {config.path}`,"
    return UserError(
        f"the base model {config.path!r} has no usable {name} ({why});{fetch} set diffusion.path to a folder or "
        "checkpoint that has it, or use diffusion=embedded"
    )


@contextmanager
def _usable(config: DiffusionConfig, name: str) -> Iterator[None]:
    """Turn what diffusers and transformers say of a missing or damaged part into one line."""
    try:
        with warnings.catch_warnings():  # of what diffusers still passes to the hub
            warnings.filterwarnings("ignore", message=r"The `\w+` argument is (deprecated and )?ignored")
            yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(config, name, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _open_checkpoint(config: DiffusionConfig, file: Path) -> tuple[Any, ...]:
    """Read UNet, text encoder, VAE, tokenizer and noise schedule of one file in Stable Diffusion's first format."""
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        whole = StableDiffusionPipeline.from_single_file(
            str(file), config=config.config, revision=config.revision, torch_dtype=torch.float32, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, SingleFileComponentError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        where = "diffusion.config is" if config.config else "without diffusion.config=FOLDER that is fetched, and is"
        raise UserError(
            f"{file} is not a Stable Diffusion checkpoint of the configuration asked for ({where} "
            f"{config.config or 'Stable Diffusion 1.5'}): {why}"
        ) from error
    schedule = DDPMScheduler.from_config(whole.scheduler.config)
    return whole.unet, whole.text_encoder, whole.vae, whole.tokenizer, schedule


class Base:
    """A frozen base model.

    Latents are scaled by `vae.config.scaling_factor`, `[B, c, h, w]` float32; images are `[B, 3, H, W]` uint8.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        schedule: DDPMScheduler,
        digest: str,
    ) -> None:
        self.config, self.digest = config, digest
        self.unet, self.text_encoder, self.vae, self.tokenizer = unet, text_encoder, vae, tokenizer
        self.schedule = schedule
        if config.attention == "eager":
            unet.set_attn_processor(AttnProcessor())
            text_encoder.set_attn_implementation("eager")
        if config.checkpointing:
            unet.enable_gradient_checkpointing()
        for model in (unet, text_encoder, vae):
            model.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: DiffusionConfig) -> Base:
        """Read the parts of a diffusers folder or hub id. Raises `UserError` if a part is missing."""
        device = pick_device(config.device)
        if config.dtype == "fp16" and device.type == "cpu":
            raise UserError("diffusion.dtype=fp16 on a CPU is 17 times slower than bf16; use diffusion.dtype=bf16")
        source, folder = _find(config)
        if folder is None:
            digest = f"hub:{source}@{config.revision or 'main'}"
        elif folder.is_dir():
            digest = hash_files(sorted(folder.rglob("*.safetensors")))
            disable_progress_bar()  # a local folder loads in a moment
        else:
            digest = hash_files([folder])
        # frozen weights rest in the compute dtype on a GPU; on a CPU autocast keeps small ones in float32
        dtype = DTYPES[config.dtype] if device.type != "cpu" else torch.float32

        def part(kind: Any, name: str, **more: Any) -> Any:
            with _usable(config, name):
                return kind.from_pretrained(source, subfolder=name, revision=config.revision, **more)

        if folder is not None and folder.is_file():
            unet, text_encoder, vae, tokenizer, schedule = _open_checkpoint(config, folder)
            unet, text_encoder = unet.to(dtype), text_encoder.to(dtype)
        else:
            unet = part(UNet2DConditionModel, "unet", torch_dtype=dtype, variant=config.variant)
            text_encoder = part(CLIPTextModel, "text_encoder", dtype=dtype, variant=config.variant)
            vae = part(AutoencoderKL, "vae", torch_dtype=torch.float32, variant=config.variant)
            tokenizer, schedule = part(CLIPTokenizer, "tokenizer"), part(DDPMScheduler, "scheduler")
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up for missing files
            raise _unusable(config, "tokenizer", "it has no words")
        return cls(config, unet.to(device), text_encoder.to(device), vae.to(device), tokenizer, schedule, digest)

    @classmethod
    def sketch(cls, config: DiffusionConfig) -> Base:
        """Return a base of shapes on the meta device, from its configuration files alone; it has no words.

        Raises `UserError` as `load` does.
        """
        source, folder = _find(config)
        if folder is not None and folder.is_file():
            source = config.config or STABLE_DIFFUSION

        def part(kind: Any, name: str) -> Any:
            with _usable(config, name):
                return kind.from_config(kind.load_config(source, subfolder=name, revision=config.revision))

        with torch.device("meta"):
            unet, vae = part(UNet2DConditionModel, "unet"), part(AutoencoderKL, "vae")
            with _usable(config, "text_encoder"):
                words = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", revision=config.revision)
                text_encoder = CLIPTextModel(words)
        return cls(config, unet, text_encoder, vae, None, None, "")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.config.size // factor
        return self.vae.config.latent_channels, side, side

    def targets(self) -> dict[str, nn.Linear]:
        """Return the linear layers that adapters act on (paper section 4.1)."""
        return find_targets(self.unet, self.text_encoder)

    def autocast(self) -> Any:
        """Return the context in which UNet and text encoder run."""
        return autocast(self.device, DTYPES[self.config.dtype])

    # --- words

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return token ids `[B, L]`, L the base's maximum length."""
        ready = [self.config.prompt(p) for p in prompts]
        length = self.tokenizer.model_max_length
        out = self.tokenizer(ready, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return out.input_ids.to(self.device)

    def require_rare_token(self) -> None:
        """Raise `UserError` unless the rare token, which a training gives a person, is one token (paper section 4)."""
        word = self.config.rare_token
        if (pieces := len(self.tokenizer.tokenize(word))) != 1:
            raise UserError(
                f"diffusion.rare_token={word!r} is {pieces} tokens for {self.config.path}; choose a word "
                "that is one, such as sks"
            )

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the vocabulary can only spell, piece by piece, in order."""
        words = re.findall(r"[^\W\d_]+|\d", self.config.prompt(prompt).lower())
        spelled = [w for w in words if len(self.tokenizer.tokenize(w)) > 1]
        return list(dict.fromkeys(spelled))

    # --- pictures

    @property
    def pictures_a_pass(self) -> int:
        """How many pictures the autoencoder takes at once: 64 of 64 x 64 px, 1 of 512 x 512."""
        return max(1, PIXELS // self.config.size**2)

    @torch.no_grad()
    def moments(self, images: Tensor | np.ndarray) -> Tensor:
        """Encode images `[B, 3, H, W]` uint8 to scaled latent mean and standard deviation `[B, 2, c, h, w]`."""
        found = []
        for part in torch.as_tensor(images).split(self.pictures_a_pass):
            posterior = self.vae.encode(part.to(self.device).float() / 127.5 - 1).latent_dist
            found.append(torch.stack([posterior.mean, posterior.std], 1).cpu())
        return torch.cat(found) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `[B, c, h, w]` to images `[B, 3, H, W]` uint8, on the CPU, the VAE in float32."""
        parts = latents.split(self.pictures_a_pass)
        return torch.cat([self.pixels(part).clamp(0, 255).round().byte().cpu() for part in parts])

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `[B, c, h, w]` to images `[B, 3, H, W]` float32 around 0 .. 255, differentiably."""
        image = self.vae.decode(latents.float().to(self.device) / self.vae.config.scaling_factor).sample
        return (image / 2 + 0.5) * 255
