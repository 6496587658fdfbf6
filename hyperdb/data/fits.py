"""The store of fits of images or people: safetensors shards of stacked tokens, an index, their mean and deviation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_metadata, load_tensors, open_tensors, reading, save_json, save_tensors
from hyperdb.runtime.lazy import PART, Lazy, mean_std, part_of

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base


class Fits(Lazy):
    """The tokens `[I, N, D]`, float32, of a store's shards, which stay on the disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        files = [open_tensors(path) for path in paths]
        if not all({"tokens", "keys"} <= set(file.keys()) for file in files):
            raise ValueError("no tokens or keys")
        self._shards = [file.get_slice("tokens") for file in files]
        shapes = [shard.get_shape() for shard in self._shards]
        if not shapes or any(len(shape) != 3 or shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError("tokens of several shapes")
        self._ends = list(accumulate(shape[0] for shape in shapes))
        self.shape = (self._ends[-1], *shapes[0][1:])
        self.keys = torch.cat([file.get_tensor("keys") for file in files])

    def read(self, rows: list[int]) -> Tensor:
        """Read these fits."""
        found = torch.empty(len(rows), *self.shape[1:])
        for k, row in enumerate(rows):
            shard, inside = part_of(self._ends, row)
            found[k] = self._shards[shard][inside]
        return found


@dataclass
class FitStore:
    """I fits: `tokens [I, N, D]`, read when they are asked for, whose they are, and the LiDB that they belong to.

    `by` is image or person, and `keys [I]` the images' or people's `People.keys`. `moment [N, D]` is the mean square of
    a person's gradient where the fits began (`hyperdb.tuning.start`), None if they began at LiDB's own start.
    """

    tokens: Tensor | Lazy
    keys: Tensor
    by: str
    lidb: LiDB
    index: dict[str, Any]
    moment: Tensor | None = None

    @property
    def digest(self) -> str:
        """16 hex digits over the numbers and whose they are."""
        digest = hashlib.sha256(self.keys.numpy().tobytes())
        for part in self.tokens.split(PART):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def rows_of(self, keys: Tensor) -> Tensor:
        """Return the row in the store of each of the `keys`, of the kind `by`; -1 where there is no fit."""
        where = {key: i for i, key in enumerate(self.keys.tolist())}
        return torch.tensor([where.get(key, -1) for key in keys.tolist()], dtype=torch.long)


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of one shard."""
    return folder / f"fits-{number:05d}.safetensors"


def save_shard(folder: Path, number: int, tokens: Tensor, keys: Tensor, made_from: str) -> Path:
    """Write some fits and whose they are, atomically; `made_from` names everything that they depend on."""
    return save_tensors(shard_path(folder, number), {"tokens": tokens, "keys": keys}, {"key": made_from})


def refuse_fewer(folder: str | Path, count: int) -> None:
    """Raise `UserError` if a folder is a finished store of more fits: an index of fewer would hide the others."""
    index = Path(folder) / "index.json"
    if index.is_file() and (there := load_json(index).get("fits", 0)) > count:
        raise UserError(f"{folder} holds {there} fits, {count} are asked for: choose another name, or delete it")


def shard_is_done(folder: Path, number: int, made_from: dict[str, Any], count: int, keys: Tensor | None = None) -> bool:
    """Return whether a shard of `count` fits exists; raise `UserError` if it was made from something else.

    `keys [count]` are whose fits they must be; with None they may be anybody's. A shard of the first few of them is the
    last of a store that grows, and is made again.
    """
    path = shard_path(folder, number)
    if not path.is_file():
        return False
    found = load_metadata(path).get("key", "")
    with suppress(ValueError, KeyError, TypeError):  # the key is of something else
        there = json.loads(found)["keys"]
        wanted = there if keys is None else keys[: len(there)].tolist()
        if found == store_key(**made_from, keys=wanted) and len(there) <= count:
            return len(there) == count
    raise UserError(f"{path} was made with another base, data or configuration; choose another name or delete it")


def finish(folder: Path, shards: int, lidb: LiDB, provenance: dict[str, Any]) -> Path:
    """Write the index that makes a set of shards a store, with mean and deviation of the tokens."""
    tokens = Fits([shard_path(folder, i) for i in range(shards)])
    mean, std = mean_std(tokens, correction=0)
    save_tensors(folder / "statistics.safetensors", {"mean": mean, "std": std})
    return save_json(
        folder / "index.json",
        {
            "fits": len(tokens),
            "shards": shards,
            "layout": lidb.layout.to_text(),
            "lidb": asdict(lidb.config),
            "fingerprint": lidb.fingerprint,
            **provenance,
        },
    )


def made_from(base: Base, people: People, instance_prompt: str | None = None) -> dict[str, Any]:
    """Return what fits are made from and can be taught with: a store is used with no other (`load_store`)."""
    prompt = base.config.prompt(instance_prompt or base.config.instance_prompt)
    return {"base": base.digest, "data": people.digest, "size": base.config.size, "prompt": prompt}


def _is_index(found: Any) -> bool:
    kinds = {"by": str, "layout": str, "lidb": dict, "fingerprint": str, "shards": int}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    return found["lidb"].keys() <= asdict(LiDBConfig()).keys() and 1 <= found["shards"] <= 10**6


def load_store(folder: str | Path, layout: Layout, **made_from: Any) -> FitStore:
    """Read a store. Raises `UserError` if it is of another layout or other LiDB bases.

    Each of `made_from` (base, data, ...; see `made_from`) must be what the fits were made from.
    """
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise UserError(f"no finished store of fits at {folder}; run `hyperdb precompute` (again) to make it")
    index = load_json(folder / "index.json")
    if not _is_index(index):
        raise UserError(f"{folder} is not a store of fits of this version; run `hyperdb precompute` to make one")
    with reading(folder / "index.json"):
        there, config = Layout.from_text(index["layout"]), LiDBConfig(**index["lidb"])
    layout.require(there, f"the store of fits {folder}")
    for name, value in made_from.items():
        if index.get(name) != value:
            raise UserError(
                f"{folder} holds fits of another {name} ({index.get(name)!r}, here {value!r}); "
                "run `hyperdb precompute` again with what is used here"
            )
    lidb = config.build(layout)
    if lidb.fingerprint != index["fingerprint"]:
        raise UserError(f"{folder} was made with other LiDB bases; run `hyperdb precompute` again")
    paths = [shard_path(folder, i) for i in range(index["shards"])]
    try:
        tokens = Fits(paths)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{folder} holds damaged fits; delete it and run `hyperdb precompute` again") from error
    # each shard as a whole, with its checksum
    if tokens.shape[1:] != lidb.mask.shape or not all(load_tensors(p)[0]["tokens"].isfinite().all() for p in paths):
        raise UserError(f"{folder} holds damaged fits; delete it and run `hyperdb precompute` again")
    moment = None
    if (begun := folder / "start.safetensors").is_file():
        moment = load_tensors(begun)[0].get("moment")
        if moment is None or moment.shape != lidb.mask.shape or not torch.isfinite(moment).all():
            raise UserError(f"{begun} is damaged; delete {folder} and run `hyperdb precompute` again")
    return FitStore(tokens, tokens.keys, index["by"], lidb, index, moment)


def store_key(**parts: Any) -> str:
    """Return a canonical text of what fits depend on."""
    return json.dumps(parts, sort_keys=True, default=str)
