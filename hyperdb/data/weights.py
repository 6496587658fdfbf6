"""The store of per-identity fits: safetensors shards of stacked tokens, an index, and their mean and deviation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors, save_json, save_tensors


@dataclass
class WeightStore:
    """Fits of I people: `tokens [I, N, D]`, the `seed [I]` of each person, and the LiDB that they belong to."""

    tokens: Tensor
    seed: Tensor
    lidb: LiDB
    index: dict[str, Any]

    @property
    def digest(self) -> str:
        """16 hex digits over the numbers and whose they are."""
        return hashlib.sha256(self.seed.numpy().tobytes() + self.tokens.numpy().tobytes()).hexdigest()[:16]

    def rows_of(self, seeds: Tensor) -> Tensor:
        """Return each person's row in the store, -1 where there is no fit."""
        where = {int(s): i for i, s in enumerate(self.seed)}
        return torch.tensor([where.get(int(s), -1) for s in seeds])


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of one shard."""
    return folder / f"fits-{number:05d}.safetensors"


def save_shard(folder: Path, number: int, tokens: Tensor, seed: Tensor, key: str) -> Path:
    """Write the fits of some people atomically; `key` names everything that they depend on."""
    return save_tensors(shard_path(folder, number), {"tokens": tokens, "seed": seed}, {"key": key})


def shard_is_done(folder: Path, number: int, key: str) -> bool:
    """Return whether a shard exists; raise `UserError` if it was made from something else."""
    path = shard_path(folder, number)
    if not path.is_file():
        return False
    if load_tensors(path)[1].get("key") != key:
        raise UserError(f"{path} was made with another base, data or configuration; choose another name or delete it")
    return True


def finish(folder: Path, shards: int, lidb: LiDB, provenance: dict[str, Any]) -> Path:
    """Write the index that makes a set of shards a store, with mean and deviation of the tokens."""
    tokens = torch.cat([load_tensors(shard_path(folder, i))[0]["tokens"] for i in range(shards)]).float()
    save_tensors(folder / "statistics.safetensors", {"mean": tokens.mean(0), "std": tokens.std(0, correction=0)})
    return save_json(
        folder / "index.json",
        {
            "identities": len(tokens),
            "shards": shards,
            "layout": lidb.layout.to_text(),
            "lidb": asdict(lidb.config),
            "fingerprint": lidb.fingerprint,
            **provenance,
        },
    )


def load_store(folder: str | Path, layout: Layout, base: str | None = None) -> WeightStore:
    """Read a store. Raises `UserError` if it is of another layout, other LiDB bases or, given `base`, another model.

    `base` is the digest of the base model that the fits must have been made on.
    """
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise UserError(f"no finished weight store at {folder}; run `hyperdb precompute` (again) to make it")
    index = load_json(folder / "index.json")
    if not isinstance(index, dict) or not {"layout", "lidb", "fingerprint", "shards"} <= index.keys():
        raise UserError(f"{folder} is not a weight store; run `hyperdb precompute` to make one")
    layout.require(Layout.from_text(index["layout"]), f"the weight store {folder}")
    if base is not None and index.get("base") != base:
        raise UserError(f"{folder} holds fits of another base; run `hyperdb precompute` again")
    lidb = LiDBConfig(**index["lidb"]).build(layout)
    if lidb.fingerprint != index["fingerprint"]:
        raise UserError(f"{folder} was made with other LiDB bases; run `hyperdb precompute` again")
    parts = [load_tensors(shard_path(folder, i))[0] for i in range(index["shards"])]
    tokens = torch.cat([p["tokens"] for p in parts]).float()
    if tokens.shape[1:] != lidb.mask.shape or not torch.isfinite(tokens).all():
        raise UserError(f"{folder} holds damaged fits; delete it and run `hyperdb precompute` again")
    return WeightStore(tokens, torch.cat([p["seed"] for p in parts]), lidb, index)


def store_key(**parts: Any) -> str:
    """Return a canonical text of what fits depend on."""
    return json.dumps(parts, sort_keys=True, default=str)
