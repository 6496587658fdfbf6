"""LoRA files that other tools write and load: kohya (ComfyUI, Forge, A1111), diffusers, PEFT folders.

Read is whatever is known to the number, for any linear layer and convolution; all else is refused by name
(docs/imports.md). What each loader needs of a file was found by loading files into it:

- kohya: `lora_unet_` and `lora_te_text_model_` with underscores, `.alpha` for every layer and the same everywhere
  (diffusers silently mis-scales a file whose alpha varies, and drops text-encoder keys without `text_model_`).
- diffusers: `unet.` and `text_encoder.text_model.`, `lora_A` and `lora_B`.
- PEFT: a folder each for UNet and text encoder, the names those of the modules.

Ranks are made equal by zeros, so alpha = rank for all and the scale is 1 in every loader.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hyperdb.adapters.base import Factors, LowRank, rank_of
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors, reading, save_json, save_tensors
from hyperdb.runtime.precision import narrowed

FORMATS = ("kohya", "diffusers", "peft")
_PARTS = ("unet", "text_encoder")
_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT


def _stacked(factors: Factors, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `down [R, n]` and `up [m, R]` of every layer of one identity, all of the same rank."""
    rank, ready = rank_of(factors), {}
    for name, (down, up) in factors.items():
        if down.shape[0] != 1:
            raise UserError(f"{down.shape[0]} identities cannot share a file; export them one by one")
        more = rank - down.shape[1]
        padded = pad(down[0], (0, 0) * (down.ndim - 2) + (0, more)), pad(up[0], (0, more))
        pair = narrowed(name, padded[0], dtype), narrowed(name, padded[1], dtype)
        if down.ndim == 5:  # a convolution's up is one of 1 x 1
            pair = pair[0], pair[1][..., None, None]
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
    path: Path, factors: Factors, format: str, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write the residual of one person in one of `FORMATS`; `path` is a file, for peft a folder.

    `metadata` are strings for the header; `magnitudes` `[m]` of every layer make it a DoRA. Raises `UserError` for
    several identities, numbers beyond `dtype`, and a DoRA in kohya's format, whose loaders disagree on it.
    """
    ready = _stacked(factors, dtype)
    rank = rank_of(factors)
    extra = {name: x.view(1, -1, 1, 1) if ready[name][0].ndim == 4 else x for name, x in (magnitudes or {}).items()}
    extra = {name: narrowed(f"the magnitude of {name}", x, dtype).contiguous() for name, x in extra.items()}
    if format == "peft":
        return _write_peft(path, ready, rank, metadata, extra)
    if extra and format == "kohya":
        raise UserError("a DoRA is written as format=diffusers or format=peft: loaders of kohya's disagree on it")
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in ready.items():
        if format == "kohya":
            key = kohya_name(name)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=dtype)
        elif format == "diffusers":
            key = _diffusers_name(name)
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            if name in extra:
                tensors[f"{key}.lora_magnitude_vector.weight"] = extra[name]
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
            for key, value in _peft_settings(part, ready, rank, bool(extra)).items()
        })  # fmt: skip
    return save_tensors(path, tensors, text, check=False)


def _peft_settings(part: str, ready: Mapping[str, object], rank: int, dora: bool) -> dict[str, object]:
    """Return what PEFT's `LoraConfig` takes; its names of layers fit with and without `text_model.`."""
    paths = sorted(_split(name)[1] for name in ready if name.startswith(part))
    settings = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": paths}
    return settings | ({"use_dora": True} if dora else {})


def _write_peft(
    folder: Path, ready: dict[str, tuple[Tensor, Tensor]], rank: int, metadata: Mapping[str, str],
    magnitudes: Mapping[str, Tensor],
) -> Path:  # fmt: skip
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
            if (magnitude := magnitudes.get(f"{part}.{path}")) is not None:
                tensors[f"base_model.model.{path}.lora_magnitude_vector"] = magnitude
        # the text encoder's names depend on the version of transformers
        text = {**metadata, "format": "pt", "transformers_version": transformers.__version__}
        save_tensors(folder / part / _WEIGHTS, tensors, text, check=False)
        settings = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            **_peft_settings(part, ready, rank, bool(magnitudes)),
        }
        save_json(folder / part / _SETTINGS, settings)
    return folder


# --- reading

_TENSOR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
_FED = re.compile(r"(attn2_(processor_)?to_[kv]|self_attn_([qkv]_proj|to_[qkv]))_.*(down|A)_")  # with words' vectors
_SIDES = {"A": "down", "B": "up"}
_PREFIXES = (  # how the formats call the two networks, longest first
    ("lora_unet_", "unet_"),
    ("diffusion_model_", "unet_"),
    ("lora_te_text_model_", "text_encoder_"),
    ("lora_te_", "text_encoder_"),
    ("lora_te1_text_model_", "text_encoder_"),
    ("clip_l_text_model_", "text_encoder_"),
    ("text_encoder_text_model_", "text_encoder_"),
    ("text_model_", "text_encoder_"),
)
_KINDS = {  # what the name of a tensor says that a file is, instead of a LoRA
    "model.diffusion_model.": "a whole Stable Diffusion checkpoint",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    ".oft_": "an OFT or BOFT adapter",
    ".ia3_": "an IA3 adapter",
    ".on_input": "an IA3 adapter",
    "vera_lambda": "a VeRA",
    ".a1.weight": "a GLoRA",
    ".w_norm": "trained norms",
    ".diff": "differences of whole weights",
    "lora_embedding_": "a LoRA of the words' embedding",
    "control_model": "a ControlNet",
    "lora_controlnet": "a Control-LoRA",
    "ip_adapter": "an IP-Adapter",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_HEADS = {  # how files begin that only pass for safetensors
    b"PK": "a pickle of PyTorch",
    b"\x80": "a pickle of PyTorch",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"<": "a web page: the download failed, perhaps for want of a login",
    b"{": "a message in JSON: the download failed, perhaps for want of a login",
    b"": "empty",
}
_SAFE = (
    "hyperdb opens safetensors alone, for a pickle can run any code; ask for the file as .safetensors or convert it, a "
    "hypernetwork of A1111 with the lines in docs/imports.md"
)

_ONLY = "hyperdb imports those of Stable Diffusion 1.x and 2.x"

# of PEFT's settings: what says nothing of the residual, or is said by the tensors themselves
_MUTE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora", "init_lora_weights",
}  # fmt: skip
_INITS = ("true", "false", "gaussian", "eva", "orthogonal")  # begin without a change of the base's own weights


@dataclass
class _Pair:
    """A layer's tensors as they are in the file, and what its header states of its scale."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class Imported:
    """A LoRA read and understood, before it is put to a base; `model` is what it was made for, "" if unknown."""

    path: Path
    pairs: dict[str, _Pair]
    metadata: dict[str, str]
    model: str

    def factors(self, sites: Mapping[str, nn.Module], base: str) -> Factors:
        """Return the residual over those `sites` (linear layers and convolutions by name) that the file adapts.

        `base` is what to call the model in messages. Raises `UserError` for layers that it lacks or has in other sizes.
        """
        names = {name.replace(".", "_"): name for name in sites}
        where = f"{self.path} is for {self.model}; " if self.model else f"{self.path}: "
        named = "" if self.model.startswith("Stable Diffusion 2") else "diffusion=sd15, or "
        advice = f"Choose the base that it was made for: {named}diffusion.path=FOLDER"
        ready: Factors = {}
        for key, pair in self.pairs.items():
            name = _find(key, names)
            if name is None:
                raise UserError(f"{where}{base} has no layer {key[:120]!r}. {advice}")
            if name in ready:
                raise UserError(f"{self.path} adapts {name} twice")
            shape: Any = sites[name].weight.shape  # [m, n] or [m, c, h, w]
            down, up = pair.down.flatten(1), pair.up.flatten(1)
            if (up.shape[0], down.shape[1]) != (shape[0], shape[1:].numel()) or down.shape[0] != up.shape[1]:
                raise UserError(
                    f"{where}{name} of {base} takes [r, {shape[1:].numel()}] and [{shape[0]}, r], not "
                    f"{list(down.shape)} and {list(up.shape)}. {advice}"
                )
            ready[name] = LowRank(down.unflatten(1, shape[1:])[None], up[None] * pair.scale)
        return {name: ready[name] for name in sites if name in ready}



def _find(key: str, names: Mapping[str, str]) -> str | None:
    """Return the site that a layer of a file is, by any of the formats' spellings."""
    flat = key.removeprefix("base_model.model.").replace(".", "_").replace("_processor_", "_")
    for prefix, part in _PREFIXES:
        if flat.startswith(prefix):
            flat = part + flat.removeprefix(prefix)
            break
    tries = [flat, f"unet_{flat}", f"text_encoder_{flat}"]
    tries += [f"{x}_0" for x in tries if x.endswith("to_out")]  # diffusers in 2023
    tries += [re.sub(r"to_(q|k|v|out)$", r"\1_proj", x) for x in tries if x.startswith("text_encoder_")]
    return next((names[x] for x in tries if x in names), None)


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata; say what a file is that is no safetensors file."""
    try:
        tensors, metadata = load_tensors(path)
    except UserError as error:
        if not path.is_file():
            raise
        with path.open("rb") as file:
            head = file.read(64)
        what = next((what for start, what in _HEADS.items() if (head.startswith(start) if start else not head)), None)
        if what is None:
            raise
        raise UserError(f"{path} is {what}" + (f": {_SAFE}" if "pickle" in what else "")) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors, metadata


def _in_folder(folder: Path, name: str) -> Path:
    """Return a folder's file of weights; name the pickles that are there instead."""
    if (folder / name).is_file():
        return folder / name
    if pickles := [p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES]:
        raise UserError(f"{folder} holds {pickles[0]} and no {name}: {_SAFE}")
    raise UserError(f"{folder} holds no {name}")


def _files(path: Path) -> list[tuple[Path, str]]:
    """Return the files of weights meant by a file or folder, and the part that each is of, "" if its keys say so."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
        if path.suffix in _PICKLES:
            raise UserError(f"{path} is a pickle of PyTorch: {_SAFE}")
        return [(path, "")]
    if (path / "text_encoder_2").is_dir():
        raise UserError(f"{path} is a LoRA for SDXL, with text_encoder_2: {_ONLY}")
    if parts := [part for part in _PARTS if (path / part / _SETTINGS).is_file()]:
        return [(_in_folder(path / part, _WEIGHTS), part) for part in parts]
    if (path / _SETTINGS).is_file():
        return [(_in_folder(path, _WEIGHTS), "")]
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1 and path / "pytorch_lora_weights.safetensors" not in found:
        raise UserError(f"{path} holds {len(found)} safetensors files; give one of them: {found[0].name} ...")
    if not found and not any(p.suffix in _PICKLES for p in path.iterdir()):
        raise UserError(f"{path} holds no .safetensors file and no {_SETTINGS}, here or in unet/ or text_encoder/")
    return [(found[0] if len(found) == 1 else _in_folder(path, "pytorch_lora_weights.safetensors"), "")]


def read(path: Path) -> Imported:
    """Read a LoRA: a file of kohya, LyCORIS, OneTrainer, diffusers or PEFT, or a folder of diffusers or PEFT.

    Raises `UserError`, naming what the file is, for all that is not a LoRA of Stable Diffusion 1.x or 2.x whose
    residual is known to the number.
    """
    pairs: dict[str, _Pair] = {}
    metadata: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, part in _files(path):
        with reading(file):
            tensors, header = _open(file)
            metadata |= header
            tensors = _without_embeddings(file, tensors)
            shapes |= {key: tuple(value.shape) for key, value in tensors.items()}
            _require_known(file, shapes, header)
            stated = _stated(file, header, tensors)
            for key, pair in _pairs(file, tensors, stated).items():
                pairs[f"{part}.{key.removeprefix('base_model.model.')}" if part else key] = pair
    return Imported(path, pairs, metadata, _model(shapes, metadata))


def _without_embeddings(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out textual inversions that OneTrainer bundles with a LoRA, and say so."""
    bundled = sorted({key.split(".")[1] for key in tensors if key.startswith("bundle_emb.")})
    if bundled:
        warnings.warn(
            f"{path} bundles the textual inversion {', '.join(bundled)}: the LoRA is read, the inversion is not, so in "
            "prompts that word has no effect of its own", stacklevel=3,
        )  # fmt: skip
    return {key: value for key, value in tensors.items() if not key.startswith("bundle_emb.")}


def _require_known(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
    """Raise `UserError` that names what a file is, unless all in it is a LoRA of Stable Diffusion 1.x or 2.x."""
    if str(metadata.get("kind", "")).startswith("hyperdb."):
        raise UserError(f"{path} is an adapter of hyperdb already: use it with adapter={path}")
    odd = [key for key in shapes if not (_TENSOR.fullmatch(key) or _ALPHA.fullmatch(key))]
    model = _model(shapes, metadata)
    kinds = (what for key in odd for name, what in _KINDS.items() if name in key)
    if kind := next(kinds, None):
        of = f" for {model}" if model else ""
        raise UserError(f"{path} is {kind}{of}, or has one in it ({odd[0][:120]!r}): only plain LoRAs are read")
    if len(odd) == len(shapes):
        raise UserError(f"{path} holds no LoRA: its first tensor is {odd[0][:120]!r}")
    if model and not model.startswith("Stable Diffusion 1") and not model.startswith("Stable Diffusion 2"):
        raise UserError(f"{path} is a LoRA for {model}: {_ONLY}")
    if odd:
        why = "trained biases" if odd[0].endswith((".bias", ".diff_b")) else "not of a plain LoRA"
        raise UserError(f"{path} has {odd[0][:120]!r}, {why}: without it the pictures would be others")
    for what, names in {
        "query, key and value merged in one layer": r"(to_qkv|to_kv|qkv_proj|in_proj)[._]lora",
        "layers named as in the first Stable Diffusion code": r"(input_blocks|middle_block|output_blocks)[._]",
    }.items():
        if found := next((key for key in shapes if re.search(names, key)), None):
            raise UserError(
                f"{path} has {what} ({found[:120]!r}), which is not read; save it with diffusers' or kohya's names"
            )


def _model(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str:
    """Return what a LoRA was made for, by its names and widths, else by what its header says; "" if neither tells."""
    flat = {key.replace(".", "_"): shape for key, shape in shapes.items()}
    text = "\n".join(flat)
    widths = {
        shape[1]
        for key, shape in flat.items()
        if len(shape) > 1 and _FED.search(key)
    }
    for model, names in {
        "Flux": r"double_blocks|single_blocks|single_transformer_blocks",
        "Stable Diffusion 3": r"joint_blocks|lora_te3_|text_encoder_3|attn_add_[qkv]_proj",
        "SDXL": r"lora_te2_|text_encoder_2|label_emb|add_embedding|attentions_\d_transformer_blocks_[1-9]"
        r"|put_blocks_\d_1_transformer_blocks_[1-9]",
    }.items():
        if re.search(names, text):
            return model
    if 2048 in widths or 1280 in widths:
        return "SDXL"
    if "lora_te1_" in text and 768 not in widths:
        return "SDXL, Stable Diffusion 3 or Flux (lora_te1_ is the first of several text encoders)"
    if re.search(r"^(lora_)?(transformer|prior)_|^(lora_unet|diffusion_model)_(blocks|layers)_", text, re.M):
        return metadata.get("modelspec.architecture") or "a diffusion transformer"
    for width, model in ((768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x")):
        if width in widths:
            return model
    return metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""


def _stated(path: Path, metadata: Mapping[str, str], keys: Iterable[str]) -> dict[str, Mapping[str, object]]:
    """Return PEFT's settings of a file by the prefix of the layers that they are for, checked; {} if there are none."""
    beside = path.with_name(_SETTINGS)
    if path.name == _WEIGHTS and beside.is_file():
        stated = {"": load_json(beside)}
        path = beside
    elif "lora_adapter_metadata" in metadata:  # as diffusers writes and obeys it
        try:
            whole = dict(json.loads(metadata["lora_adapter_metadata"]))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} has an unreadable lora_adapter_metadata ({error})") from error
        stated = {}
        for key, value in whole.items():
            part, _, name = key.partition(".")
            stated.setdefault(f"{part}.", {})[name] = value
    elif any(key.startswith("base_model.model.") for key in keys):
        raise UserError(f"{path} is of PEFT and needs its {_SETTINGS} beside it, which has the scale")
    else:
        return {}
    for settings in stated.values():
        _require_plain(path, settings)
    return stated


def _require_plain(path: Path, settings: object) -> None:
    """Raise `UserError` for settings of PEFT that are not those of a plain LoRA, or not understood."""
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not hold PEFT's settings")
    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        raise UserError(f"{path} says that this is an adapter of kind {str(kind)[:40]}: only plain LoRAs are read")
    if settings.get("use_dora"):
        raise UserError(f"{path} says that this is a DoRA (use_dora): only plain LoRAs are read")
    if str(init := settings.get("init_lora_weights", True)).lower() not in _INITS:
        raise UserError(
            f"{path} says init_lora_weights={str(init)[:40]}: PiSSA, OLoRA, CorDA, LoftQ and the like begin by "
            "changing the base, and the file does not hold that change; save it as a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for key, value in settings.items():
        if key not in _MUTE and value and value != "none":
            raise UserError(f"{path} sets {key[:40]}={str(value)[:40]}, which hyperdb does not read")
    if not all(isinstance(settings.get(key) or {}, dict) for key in ("rank_pattern", "alpha_pattern")):
        raise UserError(f"{path} has a rank_pattern or alpha_pattern that is no table of layers")


def _by_layer(path: Path, settings: Mapping[str, Any], key: str, pattern: str, layer: str) -> float:
    """Return a number of PEFT's settings that holds for a layer: that of the first name that ends its path."""
    value = settings.get(key)
    for name, other in (settings.get(pattern) or {}).items():
        plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.fullmatch(r"[\w.]+", plain) is None:
            raise UserError(f"{path}: {pattern} has {name[:80]!r}, a regular expression, which is not read")
        plain = plain.removeprefix("text_model.")  # which some versions of transformers lack
        if layer == plain or (layer.endswith(f".{plain}") and not name.startswith("^")):
            value = other
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path} states {key}={value!r} for {layer}, which is not a number above 0")
    return value


def _stated_scale(path: Path, stated: Mapping[str, Mapping[str, Any]], layer: str, rank: int) -> float:
    """Return a layer's scale by PEFT's settings, 1 if they do not speak of its part."""
    prefix = next((prefix for prefix in stated if layer.startswith(prefix)), None)
    if prefix is None:
        return 1.0
    settings = stated[prefix]
    inner = layer.removeprefix(prefix).removeprefix("base_model.model.").removeprefix("text_model.")
    if (r := _by_layer(path, settings, "r", "rank_pattern", inner)) != rank:
        raise UserError(f"{path}: {inner} has rank {rank}, its settings say {r}")
    alpha = _by_layer(path, settings, "lora_alpha", "alpha_pattern", inner)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pairs(path: Path, tensors: Mapping[str, Tensor], stated: Mapping[str, Mapping[str, Any]]) -> dict[str, _Pair]:
    """Pair the tensors of each layer and find its scale: alpha / rank, or what PEFT's settings say, or 1."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _TENSOR.fullmatch(key)
        side = _SIDES.get(match[2], match[2]) if match else "alpha"
        layer = (match or _ALPHA.fullmatch(key))[1]  # type: ignore[index]  # one of them: _require_known
        if value.numel() != 1 if side == "alpha" else value.ndim not in (2, 4) or 0 in value.shape:
            raise UserError(f"{path}: {key[:120]!r} has the shape {list(value.shape)}, not that of a plain LoRA")
        if side != "alpha" and not value.is_floating_point():
            raise UserError(f"{path}: {key[:120]!r} is {value.dtype}, not of floating point")
        if not (value := value.float()).isfinite().all():
            raise UserError(f"{path}: {key[:120]!r} has numbers that are not finite: the file is damaged or diverged")
        if side in layers.setdefault(layer, {}):
            raise UserError(f"{path} adapts {layer[:120]!r} twice")
        layers[layer][side] = value
    pairs = {}
    for layer, found in layers.items():
        if missing := [side for side in ("down", "up") if side not in found]:
            raise UserError(f"{path} lacks the {missing[0]} side of {layer[:120]!r}")
        down, up, rank = found["down"], found["up"], found["down"].shape[0]
        if "mid" in found:  # CP decomposition: the kernel lies between two matrices
            mid = found["mid"]
            if mid.ndim != 4 or mid.shape[1] != rank:
                raise UserError(f"{path}: the mid of {layer[:120]!r} is {list(mid.shape)}, its rank is {rank}")
            down = torch.einsum("rshw,sc->rchw", mid, down.flatten(1))
        if "alpha" not in found:  # as kohya's scripts, ComfyUI and diffusers take it: alpha = rank
            pairs[layer] = _Pair(down, up, _stated_scale(path, stated, layer, rank) if stated else 1.0)
            continue
        alpha = float(found["alpha"])
        if stated or not alpha:
            why = "states a scale besides" if stated else "is 0, which some tools take for rank and some for nothing"
            raise UserError(f"{path}: the alpha of {layer[:120]!r} {why}; write alpha = rank * scale")
        pairs[layer] = _Pair(down, up, alpha / rank)
    return pairs
