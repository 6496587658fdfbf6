"""Load a Stable Diffusion 1.x model and give its parts plain names: modules, token ids, latents, images."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from hyperdb.diffusion import STABLE_DIFFUSION, DiffusionConfig
from hyperdb.diffusion.digest import digest_base
from hyperdb.diffusion.quantise import quantise, require
from hyperdb.diffusion.targets import find_set, find_targets
from hyperdb.runtime.errors import NonFiniteError, UserError
from hyperdb.runtime.files import load_shapes
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.precision import autocast, resting

PIXELS = 2**18  # in one pass of the autoencoder, whose memory grows with them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda", "mps")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CHANNELS = {5: "depth to picture", 7: "enlarging", 8: "editing", 9: "inpainting"}  # what takes so many


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; auto is cuda, then mps, then cpu.

    Of several processes that `accelerate launch` starts on one machine each gets a graphics card of its own, unless
    the name has a number.
    """
    card = int(os.environ.get("LOCAL_RANK", "0"))
    if name != "auto":
        expected = UserError(f"diffusion.device={name!r}: expected auto, cpu, cuda or mps")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise expected from error
        if device.type not in DEVICES:
            raise expected
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"diffusion.device={name!r}: PyTorch sees no such device here; use auto or cpu") from error
        return _own_card(card) if name == "cuda" else device
    if torch.cuda.is_available():
        return _own_card(card)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _own_card(rank: int) -> torch.device:
    """Return the card of a process. Raises `UserError` if the machine has fewer cards than processes.

    A launcher that shows each process one card alone is believed.
    """
    count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count < processes and not (count == 1 and shown and "," not in shown):
        raise UserError(
            f"{processes} processes were started on a machine with {count} card{'s' * (count > 1)}: launch again with "
            f"--num_processes={count}"
        )
    return torch.device("cuda", rank % count)


def _find(config: DiffusionConfig) -> tuple[str, Path | None]:
    """Return what diffusers reads the base from, and the folder or file that is; None for a hub id."""
    folder = resolve(config.path)
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".safetensors"):
        return str(folder), folder
    choose = "set diffusion.path to a Stable Diffusion folder, .safetensors checkpoint or hub id"
    if folder.is_file() and folder.suffix.lower() in PICKLES:
        raise UserError(
            f"{folder} is a pickle, which can run code when it is opened, and is not read; if you trust it, turn it "
            f"into a folder once, in Python: diffusers.StableDiffusionPipeline.from_single_file({str(folder)!r})"
            ".save_pretrained('FOLDER'), and set diffusion.path=FOLDER"
        )
    if folder.is_file():
        raise UserError(f"{folder} is not a base model of a known format; {choose}")
    is_local = config.path.startswith(("package:", "/", ".", "~"))
    if is_local or folder.suffix.lower() in (".safetensors", *PICKLES):
        raise UserError(f"no base model at {folder}; {choose}")
    return config.path, None


# --- what is wrong with a base ------------------------------------------------------------------------


def _files(config: DiffusionConfig, part: str) -> list[str]:
    """Return the names of the files in a part's folder, on the disk, on the hub or in its cache."""
    folder = resolve(config.path)
    if not folder.is_dir():
        from huggingface_hub import list_repo_files, snapshot_download

        try:
            names = list_repo_files(config.path, revision=config.revision)
            return [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        except Exception:  # no network, say: what matters is the error that is being explained
            try:
                folder = Path(snapshot_download(config.path, revision=config.revision, local_files_only=True))
            except Exception:
                return []
    return [path.name for path in (folder / part).glob("*")]


def _variants(files: list[str]) -> list[str | None]:
    """Return the variants of a part's weights, likely ones first; None for the weights without one."""
    name = r"(?:diffusion_pytorch_model|pytorch_model|model)([\w.-]*)\.(?:safetensors|bin)"
    found = [re.sub(r"-\d+-of-\d+", "", m[1]).strip(".") or None for f in files if (m := re.fullmatch(name, f))]
    return sorted(set(found), key=lambda v: (v is not None, v != "fp16", v or ""))


def _unusable(config: DiffusionConfig, name: str, why: str) -> UserError:
    what = f"the base model {config.path!r} has no usable {name}"
    if config.path.startswith("runwayml/"):
        return UserError(
            f"{what}: the hub has no models of runwayml any more; Stable Diffusion 1.5 has moved: "
            f"set diffusion.path={STABLE_DIFFUSION}"
        )
    there = _variants(_files(config, name))
    if there and config.variant not in there:
        shown = ", ".join(v or "none" for v in there)
        return UserError(
            f"{what} of diffusion.variant={config.variant or 'null'}, but has these variants: {shown}; "
            f"set diffusion.variant={there[0] or 'null'}"
        )
    fetch = "" if resolve(config.path).exists() else f" fetch it with `hf download {config.path}`,"
    return UserError(
        f"{what} ({why});{fetch} set diffusion.path to a folder or checkpoint that has it, or use diffusion=embedded"
    )


def _require_text_to_image(path: str, unet: Mapping[str, Any], channels: int, width: int | None) -> None:
    """Refuse a UNet that is not driven by noise and one text alone.

    Given its settings, the latents' channels, and the text encoder's width where it is known.
    """
    need = "hyperdb needs a text-to-image model like Stable Diffusion 1.5; set diffusion.path to one"
    for side in ("in", "out"):
        if (found := unet.get(f"{side}_channels", 4)) != channels:
            kind = f", as for {CHANNELS[found]}" if found in CHANNELS and side == "in" else ""
            raise UserError(
                f"the base model {path!r} has a UNet of {found} {side}put channels{kind}, and latents of {channels}; "
                f"{need}"
            )
    if unet.get("addition_embed_type") == "text_time":
        raise UserError(f"the base model {path!r} is of the kind of Stable Diffusion XL; {need}")
    further = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
    for name in further:
        if unet.get(name) is not None:
            raise UserError(f"the base model {path!r} has a UNet with {name}={unet[name]!r}; {need}")
    wide = unet.get("cross_attention_dim", 1280)
    if width is not None and set(wide if isinstance(wide, list | tuple) else [wide]) != {width}:
        raise UserError(
            f"the base model {path!r} has a UNet for texts {wide} wide and a text encoder of {width}; {need}"
        )


@contextmanager
def _usable(config: DiffusionConfig, name: str) -> Iterator[None]:
    """Turn what diffusers and transformers say of a missing or damaged part into one line."""
    try:
        with warnings.catch_warnings():  # of what diffusers still passes to the hub
            warnings.filterwarnings("ignore", message=r"The `\w+` argument is (deprecated and )?ignored")
            yield
    except UserError:
        raise
    except Exception as error:  # whatever they make of settings that nobody thought of
        raise _unusable(config, name, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _open_checkpoint(config: DiffusionConfig, file: Path) -> tuple[Any, ...]:
    """Read UNet, text encoder, VAE, tokenizer and noise schedule of one file in Stable Diffusion's first format."""
    from diffusers import StableDiffusionPipeline

    shapes = load_shapes(file)
    first, last, more = (f"model.diffusion_model.{x}" for x in ("input_blocks.0.0.weight", "out.2.weight", "label_emb"))
    if first in shapes and last in shapes:
        kind = "text_time" if any(name.startswith(more) for name in shapes) else None
        settings = {"in_channels": shapes[first][1], "out_channels": shapes[last][0], "addition_embed_type": kind}
        _require_text_to_image(str(file), settings, 4, None)
    try:
        whole = StableDiffusionPipeline.from_single_file(
            str(file), config=config.config, revision=config.revision, torch_dtype=torch.float32, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    except Exception as error:  # as in `_usable`
        why = (str(error).splitlines() or [type(error).__name__])[0]
        where = "diffusion.config is" if config.config else "without diffusion.config=FOLDER that is fetched, and is"
        raise UserError(
            f"{file} is not a Stable Diffusion checkpoint of the configuration asked for ({where} "
            f"{config.config or 'Stable Diffusion 1.5'}): {why}"
        ) from error
    schedule = DDPMScheduler.from_config(whole.scheduler.config)
    return whole.unet, whole.text_encoder, whole.vae, whole.tokenizer, schedule


def _settings(config: DiffusionConfig, source: str) -> tuple[dict[str, Any], dict[str, Any], CLIPTextConfig]:
    """Read the settings of UNet, autoencoder and text encoder, and refuse what is no text-to-image model."""
    found = []
    for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        with _usable(config, name):
            found.append(kind.load_config(source, subfolder=name, revision=config.revision))
    with _usable(config, "text_encoder"):
        known, _ = CLIPTextConfig.get_config_dict(source, subfolder="text_encoder", revision=config.revision)
        if not known:  # transformers would make up the settings of a missing file
            raise OSError("it has no config.json")
        text = CLIPTextConfig.from_dict(known)
    unet, vae = found
    with _usable(config, "unet"):
        _require_text_to_image(config.path, unet, vae.get("latent_channels", 4), text.hidden_size)
    return unet, vae, text


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
        vae.to(memory_format=torch.channels_last)  # its convolutions on a CPU are a fifth faster, the UNet's are not

    @classmethod
    def load(cls, config: DiffusionConfig) -> Base:
        """Read the parts of a diffusers folder or hub id. Raises `UserError` if a part is missing."""
        device = pick_device(config.device)
        if config.dtype == "fp16" and device.type == "cpu":
            raise UserError("diffusion.dtype=fp16 on a CPU is 17 times slower than bf16; use diffusion.dtype=bf16")
        if config.quantise is not None:
            require(config.quantise)
        source, folder = _find(config)
        # frozen weights rest in the compute dtype on a GPU; on a CPU autocast keeps small ones in float32
        dtype = resting(device, DTYPES[config.dtype])

        def part(kind: Any, name: str, **more: Any) -> Any:
            with _usable(config, name):
                return kind.from_pretrained(source, subfolder=name, revision=config.revision, **more)

        # read in float32, which holds what any file says: the digest is of that

        if folder is not None and folder.is_file():
            unet, text_encoder, vae, tokenizer, schedule = _open_checkpoint(config, folder)
        else:
            _settings(config, source)
            if folder is not None:
                disable_progress_bar()  # a local folder loads in a moment
            unet = part(UNet2DConditionModel, "unet", torch_dtype=torch.float32, variant=config.variant)
            text_encoder = part(CLIPTextModel, "text_encoder", dtype=torch.float32, variant=config.variant)
            vae = part(AutoencoderKL, "vae", torch_dtype=torch.float32, variant=config.variant)
            tokenizer, schedule = part(CLIPTokenizer, "tokenizer"), part(DDPMScheduler, "scheduler")
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up for missing files
            raise _unusable(config, "tokenizer", "it has no words")
        if (kind := schedule.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the base model {config.path!r} predicts {kind!r} by its scheduler; hyperdb needs one that predicts "
                "epsilon or v_prediction"
            )
        digest = digest_base(unet, text_encoder, vae, tokenizer, schedule)
        # diffusers' own `to` warns of the layers to be kept in float32, of which there are none
        unet, text_encoder = (nn.Module.to(part, device, dtype) for part in (unet, text_encoder))
        if config.quantise is not None:
            quantise(unet, config.quantise)
            quantise(text_encoder, config.quantise)
        return cls(config, unet, text_encoder, vae.to(device), tokenizer, schedule, digest)

    @classmethod
    def sketch(cls, config: DiffusionConfig) -> Base:
        """Return a base of shapes on the meta device, from its configuration files alone; it has no words.

        Raises `UserError` as `load` does.
        """
        source, folder = _find(config)
        if folder is not None and folder.is_file():
            source = config.config or STABLE_DIFFUSION
        unet_settings, vae_settings, text_settings = _settings(config, source)
        with torch.device("meta"), _usable(config, "configuration"):
            unet, vae = UNet2DConditionModel.from_config(unet_settings), AutoencoderKL.from_config(vae_settings)
            text_encoder = CLIPTextModel(text_settings)
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

    def sites(self, names: Collection[str]) -> dict[str, nn.Module]:
        """Return `targets`, and of the other places those named: an adapter or an imported LoRA may change any."""
        found: dict[str, nn.Module] = dict(self.targets())
        if further := set(names) - found.keys():
            everything = self.places("any")
            found |= {name: module for name, module in everything.items() if name in further}
        return found

    def places(self, which: str) -> dict[str, nn.Module]:
        """Return a set of places that adapters change, by its name (`hyperdb.diffusion.targets.SETS`)."""
        return find_set(which, self.unet, self.text_encoder)

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

    def unseen(self, prompt: str, places: int = 1) -> str:
        """Return the end of a prompt that the text encoder has no room for, "" if all of it fits.

        `places` is how many the rare token takes, where it stands for several vectors.
        """
        ids = self.tokenizer(self.config.prompt(prompt), add_special_tokens=False, verbose=False).input_ids
        rare = self.tokenizer(self.config.rare_token, add_special_tokens=False).input_ids
        room = self.tokenizer.model_max_length - 2  # a begin and an end token
        for i, word in enumerate(ids):
            room -= places if [word] == rare else 1
            if room < 0:
                return str(self.tokenizer.decode(ids[i:])).strip()
        return ""

    def says_person(self, prompt: str) -> bool:
        """Whether the text encoder sees the rare token in a prompt, written as `[V]` or as itself."""
        ids = self.tokenize([prompt])[0].tolist()
        rare = self.tokenizer(self.config.rare_token, add_special_tokens=False).input_ids
        return any(ids[i : i + len(rare)] == rare for i in range(len(ids)))

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
        moments = torch.cat(found) * self.vae.config.scaling_factor
        if not moments.isfinite().all():
            raise NonFiniteError(
                f"the autoencoder of {self.config.path} makes pictures into NaN: its weights are damaged"
            )
        return moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `[B, c, h, w]` to images `[B, 3, H, W]` uint8, on the CPU, the VAE in float32.

        Raises `NonFiniteError` for what is no picture.
        """
        found = []
        for part in latents.split(self.pictures_a_pass):
            pixels = self.pixels(part)
            if not pixels.isfinite().all():
                raise NonFiniteError(
                    f"latents of up to {part.abs().max().item():.3g} are decoded to NaN: lower the adapter's strength "
                    f"or the guidance; if all pictures are, the autoencoder of {self.config.path} is damaged"
                )
            found.append(pixels.clamp(0, 255).round().byte().cpu())
        return torch.cat(found)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `[B, c, h, w]` to images `[B, 3, H, W]` float32 around 0 .. 255, differentiably."""
        image = self.vae.decode(latents.float().to(self.device) / self.vae.config.scaling_factor).sample
        return (image / 2 + 0.5) * 255
