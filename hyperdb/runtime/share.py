"""Work that is divided among jobs and processes: which part of it this process does."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hyperdb.runtime.errors import UserError


def processes() -> tuple[int, int]:
    """Return the number of this process, 0 the first, and how many `accelerate launch` or torchrun has started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(kw_only=True)
class Share:
    """The settings of a stage whose work several jobs can do, in one folder and in any order.

    A job does the part `shard` of `num_shards`, counted from 0. If `accelerate launch` or torchrun starts several
    processes, the part of the job is divided among them.
    """

    shard: int | None = None  # which part of the work this job does, 0 to num_shards - 1; null: all of it
    num_shards: int = 1  # parts that the work is divided into

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise UserError(f"num_shards={self.num_shards}: expected at least 1")
        if self.shard is None and self.num_shards > 1:
            raise UserError(
                f"num_shards={self.num_shards} needs shard=NUMBER, 0 to {self.num_shards - 1}; "
                f"all in one command, each a job: -m 'shard=range(0,{self.num_shards})'"
            )
        if self.shard is not None and not 0 <= self.shard < self.num_shards:
            raise UserError(f"shard={self.shard} num_shards={self.num_shards}: expected 0 to num_shards - 1")

    def share(self) -> tuple[int, int]:
        """Return which part this process does, and of how many."""
        process, count = processes()
        return (self.shard or 0) * count + process, self.num_shards * count
