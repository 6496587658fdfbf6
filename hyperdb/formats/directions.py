"""The file of directions: what a step of an attribute adds to a person's LiDB numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import resolve

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.formats.native import Personalization

# labels of a rendered person and of a photo, as numbers that grow: man, old, dark skin, light hair, smiling
ATTRIBUTES = ("sex", "age", "skin", "hair", "smile")
DIRECTIONS = "hyperdb.directions"  # kind of the file


def save_directions(path: Path, directions: Tensor, lidb: str, base: str) -> Path:
    """Write the numbers `[len(ATTRIBUTES), C]` of one step each, with the fingerprint of the LiDB bases they lie in.

    `base` is the hash of the base they were made on.
    """
    from hyperdb.runtime.files import save_tensors

    text = {"kind": DIRECTIONS, "lidb": lidb, "attributes": " ".join(ATTRIBUTES)}
    text |= {"base": base}
    return save_tensors(path, {"directions": directions}, text, check=False)


def load_directions(path: str, person: Personalization) -> dict[str, Tensor]:
    """Read `directions.safetensors` of `hyperdb weights`: the numbers `[C]` that a step adds to a person's.

    Raises `UserError` for another file and for directions in other bases than the person's.
    """
    import torch

    from hyperdb.runtime.files import load_tensors

    file = resolve(path)
    if not file.is_file():
        raise UserError(f"no directions at {file}; `hyperdb weights` writes them")
    tensors, metadata = load_tensors(file)
    if metadata.get("kind") != DIRECTIONS:
        raise UserError(f"{file} is not a file of directions; give the directions.safetensors of `hyperdb weights`")
    if metadata.get("lidb") != (person.fingerprint or person.lidb.fingerprint):
        raise UserError(f"{file} was made in other LiDB bases than {person.source}: run `hyperdb weights` on its base")
    theirs = metadata.get("base", "")
    if theirs != person.base:
        here = person.base or "unknown"
        warnings.warn(f"{file} was made on base {theirs}, {person.source} on {here}: expect less", stacklevel=2)
    found, names = tensors.get("directions", torch.empty(0)), metadata.get("attributes", "").split()
    if found.shape != (len(names), person.lidb.numbers) or not found.isfinite().all():
        raise UserError(f"{file} is damaged: directions of shape {list(found.shape)} for {', '.join(names)}")
    return dict(zip(names, found.float(), strict=True))
