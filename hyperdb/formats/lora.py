"""LoRA files that other tools load: kohya (ComfyUI, Forge, A1111), diffusers, PEFT folders.

What each loader needs was found by loading files into it:

- kohya: `lora_unet_` and `lora_te_text_model_` with underscores, `.alpha` for every layer and the same everywhere
  (diffusers silently mis-scales a file whose alpha varies, and drops text-encoder keys without `text_model_`).
- diffusers: `unet.` and `text_encoder.text_model.`, `lora_A` and `lora_B`.
- PEFT: a folder each for UNet and text encoder, the names those of the modules.

Ranks are made equal by zeros, so alpha = rank for all and the scale is 1 in every loader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperdb.adapters.base import Factors, rank_of
from hyperdb.adapters.layout import Layout
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_metadata, load_tensors, save_json, save_tensors

FORMATS = ("kohya", "diffusers", "peft")
_PARTS = ("unet", "text_encoder")


def _stacked(factors: Factors, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `down [R, n]` and `up [m, R]` of every layer of one identity, all of the same rank."""
    rank, ready = rank_of(factors), {}
    for name, (down, up) in factors.items():
        if down.shape[0] != 1:
            raise UserError(f"{down.shape[0]} identities cannot share a file; export them one by one")
        more = rank - down.shape[1]
        pair = pad(down[0], (0, 0, 0, more)).to(dtype), pad(up[0], (0, more)).to(dtype)
        if not all(bool(x.isfinite().all()) for x in pair):
            raise UserError(f"{name} has numbers too large for {dtype}; export in fp32")
        ready[name] = pair
    return ready


def _split(name: str) -> tuple[str, str]:
    """Split a layer's name into unet or text_encoder and the path inside."""
    part, _, path = name.partition(".")
    if part not in _PARTS:
        raise UserError(f"layer {name} is neither of the UNet nor of the text encoder; other tools cannot load it")
    return part, path


def kohya_name(name: str) -> str:
    """Return a layer's name in kohya files."""
    part, path = _split(name)
    return ("lora_unet_" if part == "unet" else "lora_te_text_model_") + path.replace(".", "_")


def _diffusers_name(name: str) -> str:
    part, path = _split(name)
    return f"unet.{path}" if part == "unet" else f"text_encoder.text_model.{path}"


def write(
    path: Path, factors: Factors, format: str, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> Path:
    """Write the residual of one person in one of `FORMATS`; `path` is a file, for peft a folder.

    `metadata` are strings for the header. Raises `UserError` for several identities or numbers beyond `dtype`.
    """
    ready = _stacked(factors, dtype)
    rank = rank_of(factors)
    if format == "peft":
        return _write_peft(path, ready, rank, metadata)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in ready.items():
        if format == "kohya":
            key = kohya_name(name)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=dtype)
        elif format == "diffusers":
            key = _diffusers_name(name)
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        else:
            raise UserError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    text = {**metadata, "format": "pt"}
    if format == "kohya":
        text |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    else:
        text["lora_adapter_metadata"] = json.dumps({
            f"{part}.{key}": value
            for part in _PARTS
            if any(name.startswith(part) for name in ready)
            for key, value in _peft_settings(part, ready, rank).items()
        })  # fmt: skip
    return save_tensors(path, tensors, text)


def _peft_settings(part: str, ready: Mapping[str, object], rank: int) -> dict[str, object]:
    """Return what PEFT's `LoraConfig` takes; its names of layers fit with and without `text_model.`."""
    paths = sorted(_split(name)[1] for name in ready if name.startswith(part))
    return {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": paths}


def _write_peft(folder: Path, ready: dict[str, tuple[Tensor, Tensor]], rank: int, metadata: Mapping[str, str]) -> Path:
    import transformers

    for part in _PARTS:
        layers = {_split(name)[1]: pair for name, pair in ready.items() if _split(name)[0] == part}
        if not layers:
            continue
        tensors: dict[str, Tensor] = {}
        for path, (down, up) in layers.items():
            tensors |= {
                f"base_model.model.{path}.lora_A.weight": down,
                f"base_model.model.{path}.lora_B.weight": up,
            }
        # the text encoder's names depend on the version of transformers
        text = {**metadata, "format": "pt", "transformers_version": transformers.__version__}
        save_tensors(folder / part / "adapter_model.safetensors", tensors, text)
        settings = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            **_peft_settings(part, ready, rank),
        }
        save_json(folder / part / "adapter_config.json", settings)
    return folder


# --- reading


def recognise(path: Path) -> str:
    """Return which of `FORMATS` a file or folder is in. Raises `UserError` for none of them."""
    if path.is_dir():
        if any((path / part / "adapter_config.json").is_file() for part in _PARTS):
            return "peft"
        raise UserError(f"{path} has no unet/adapter_config.json or text_encoder/adapter_config.json")
    keys = list(load_tensors(path)[0])
    if any(k.startswith(("lora_unet_", "lora_te")) for k in keys):
        return "kohya"
    if any(k.startswith(("unet.", "text_encoder.")) and ".lora_" in k for k in keys):
        return "diffusers"
    raise UserError(f"{path} holds no LoRA of a Stable Diffusion 1.x model (its first key is {keys[:1]})")


def read(path: Path, layout: Layout) -> tuple[Factors, dict[str, str]]:
    """Read a LoRA in any of `FORMATS` as factors over `layout`, layers that it lacks being zero, and its metadata.

    Raises `UserError` for keys that fit no layer, wrong shapes, an alpha that varies, or numbers that are not finite.
    """
    format = recognise(path)
    if format == "peft":
        pairs, scales, metadata = _read_peft(path)
        names = {name: name for name in layout.names}
    else:
        tensors, metadata = load_tensors(path)
        if format == "diffusers":  # with and without the wrapper of some versions of transformers
            tensors = {k.replace("text_encoder.text_model.", "text_encoder."): v for k, v in tensors.items()}
        names = {kohya_name(name) if format == "kohya" else name: name for name in layout.names}
        pairs, scales = _pairs(path, tensors, format)
        if "lora_adapter_metadata" in metadata:
            scales = _stated_scales(path, metadata["lora_adapter_metadata"], pairs)
        if any(k.startswith("lora_te_") and not k.startswith("lora_te_text_model_") for k in pairs):
            raise UserError(
                f"{path} names its text-encoder layers without text_model_: diffusers and others silently drop "
                "them; write the file again with lora_te_text_model_..."
            )
    if unknown := sorted(pairs.keys() - names.keys()):
        raise UserError(
            f"{path} adapts {unknown[0][:120]!r} and {len(unknown) - 1} more: hyperdb adapts the attentions and GEGLU "
            "projections of its base alone"
        )
    factors: Factors = {}
    sizes = {layer.name: layer for layer in layout.layers}
    given = {names[key]: key for key in pairs}
    for name, layer in sizes.items():
        if name not in given:
            factors[name] = torch.zeros(1, 1, layer.in_), torch.zeros(1, layer.out, 1)
            continue
        down, up = (x.float() for x in pairs[given[name]])
        if down.ndim != 2 or up.ndim != 2 or (down.shape[1], up.shape[0]) != (layer.in_, layer.out) or (
            down.shape[0] != up.shape[1]
        ):  # fmt: skip
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise UserError(f"{path}: {name} takes [r, {layer.in_}] and [{layer.out}, r], not {shapes}")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"{path}: {name} has numbers that are not finite")
        factors[name] = down[None], up[None] * scales[given[name]]
    return factors, metadata


def _pairs(
    path: Path, tensors: dict[str, Tensor], format: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Return `{layer key: (down, up)}` and each layer's scale."""
    down, up = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B")}[format]
    keys = [k.removesuffix(f".{down}.weight") for k in tensors if k.endswith(f".{down}.weight")]
    for key, value in tensors.items():
        if value.numel() != 1 if key.endswith(".alpha") else value.ndim != 2 or 0 in value.shape:
            raise UserError(f"{path}: {key[:120]!r} has the shape {list(value.shape)}, not that of a plain LoRA")
    alphas = {k.removesuffix(".alpha"): float(v) for k, v in tensors.items() if k.endswith(".alpha")}
    if len(set(alphas.values())) > 1:
        few = sorted(set(alphas.values()))[:2]
        raise UserError(
            f"{path} has an alpha that varies ({few[0]:g}, {few[1]:g} ...): diffusers silently mis-scales such files; "
            "write it with one alpha for all layers"
        )
    if format == "kohya" and (lacking := [k for k in keys if k not in alphas]):
        raise UserError(f"{path} has no alpha for {lacking[0]}: some loaders crash on it; write .alpha for every layer")
    pairs, used = {}, set()
    for key in keys:
        names = f"{key}.{down}.weight", f"{key}.{up}.weight"
        if names[1] not in tensors:
            raise UserError(f"{path} lacks {names[1]}")
        pairs[key] = tensors[names[0]], tensors[names[1]]
        used |= {*names, f"{key}.alpha"}
    if odd := sorted(tensors.keys() - used):
        raise UserError(f"{path} has {odd[0][:120]!r}, which is not of a plain LoRA (DoRA and others are not read)")
    return pairs, {k: alphas[k] / pairs[k][0].shape[0] if k in alphas else 1.0 for k in keys}


def _scale(path: Path, settings: Mapping[str, object]) -> float:
    """Return alpha / rank of PEFT's settings; raise `UserError` for what is not a plain LoRA of one rank."""
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise UserError(f"{path} is not a plain LoRA of one rank: it sets {key}")
    alpha, rank = settings.get("lora_alpha"), settings.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path} states r={rank!r} and lora_alpha={alpha!r}, which are not numbers above 0")
    return alpha / rank


def _stated_scales(path: Path, text: str, pairs: Mapping[str, object]) -> dict[str, float]:
    """Return each layer's scale by the header that diffusers writes and obeys."""
    try:
        stated = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has an unreadable lora_adapter_metadata ({error})") from error
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in stated.items() if k.startswith(f"{part}.")} for part in _PARTS
    }
    scales = {part: _scale(path, settings) for part, settings in parts.items() if settings}
    return {key: scales.get(_split(key)[0], 1.0) for key in pairs}


def _read_peft(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float], dict[str, str]]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    metadata: dict[str, str] = {}
    for part in _PARTS:
        here = folder / part
        if not (here / "adapter_config.json").is_file():
            continue
        settings = load_json(here / "adapter_config.json")
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            raise UserError(f"{here} is not a plain LoRA of PEFT")
        scale = _scale(here, settings)
        weights = here / "adapter_model.safetensors"
        metadata |= load_metadata(weights)
        tensors = {
            f"{part}.{k.removeprefix('base_model.model.').removeprefix('text_model.')}": v
            for k, v in load_tensors(weights)[0].items()
        }
        found, _ = _pairs(weights, tensors, "diffusers")
        pairs |= found
        scales |= dict.fromkeys(found, scale)
    return pairs, scales, metadata
