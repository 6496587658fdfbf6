"""The shards of a stage as tasks of Ray: `hyperdb STAGE --ray num_shards=64 ...`.

A task is the command that a person would give, with its `shard`, so that a store or a table comes out as it would from
any other launcher.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hyperdb import config
from hyperdb.runtime.errors import UserError, first_line
from hyperdb.runtime.share import Share


def _task(stage: str, words: Sequence[str], folder: str) -> None:
    """Run a command where the driver was told to."""
    os.chdir(folder)
    config.run(stage, words)


def run(stage: str, words: Sequence[str]) -> None:
    """Do the `num_shards` shards of a stage, then what is left for one, as tasks of a Ray cluster.

    The cluster is the one that RAY_ADDRESS names or that runs on this machine; else one of this machine alone is begun.
    Every machine must see the folder of the command and what its settings name. A task has a core, and a graphics card
    if the cluster has any; a shard whose machine was lost is begun again elsewhere and goes on with what is there.

    Raises `UserError` for a stage that has no shards, and after the last shard for those that failed.
    """
    if not issubclass(config.stage_module(stage).Config, Share):
        some = [name for name in config.available() if issubclass(config.stage_module(name).Config, Share)]
        raise UserError(f"{stage} is not done in shards; --ray is for {', '.join(some)}")
    if any(word.startswith("shard=") for word in words):
        raise UserError("--ray does every shard: leave out shard=, and say num_shards=NUMBER")
    of = config.load(stage, [*words, "shard=0"]).num_shards  # what is wrong is said before anything is begun
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'hyperdb[ray]'") from error

    ray.init()
    try:
        card = min(1, ray.cluster_resources().get("GPU", 0))
        task = ray.remote(num_cpus=1, num_gpus=card)(_task)

        def why_failed(done: Any) -> str | None:
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                return first_line(getattr(error, "cause", None) or error)
            return None

        begun = [task.remote(stage, [*words, f"shard={shard}"], os.getcwd()) for shard in range(of)]
        failed = {shard: why for shard, done in enumerate(begun) if (why := why_failed(done)) is not None}
        if failed:
            numbers, first = ", ".join(map(str, failed)), next(iter(failed.values()))
            raise UserError(f"of {of} shards failed {numbers}: {first}; the same command does what is missing")
        if (why := why_failed(task.remote(stage, [*words, "num_shards=1"], os.getcwd()))) is not None:
            raise UserError(f"all {of} shards are done, but not what is left for one: {why}")
    finally:
        ray.shutdown()
