"""The vectors of a word as other tools load it: diffusers' `load_textual_inversion`, A1111, ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyperdb.runtime.files import save_tensors
from hyperdb.runtime.precision import narrowed


def word(name: str) -> str:
    """Return the new word that stands for the vector in prompts: it may be none that the vocabulary has."""
    return f"<{name}>"


def write(path: Path, name: str, vector: Tensor, metadata: Mapping[str, str], dtype: torch.dtype) -> Path:
    """Write one vector `[C]` or several `[k, C]` under their word. Raises `UserError` for numbers beyond `dtype`."""
    ready = narrowed("the vector", vector.reshape(-1, vector.shape[-1]), dtype)  #     [k, C]
    return save_tensors(path, {word(name): ready}, {**metadata, "format": "pt"}, check=False)
