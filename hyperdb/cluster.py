"""The shards of a stage as rows of a dataset of Ray: `hyperdb STAGE --ray num_shards=64 ...`.

Each row is a task, the command that a person would give, with its `shard`, so that a store or a table comes out as it
would from any other launcher.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Any

from hyperdb import config
from hyperdb.runtime.errors import UserError, first_line
from hyperdb.runtime.share import Share


def _task(row: dict[str, Any]) -> dict[str, str]:
    """Run a command where the driver was told to; return its last word and why it failed, or nothing."""
    os.chdir(row["folder"])
    try:
        config.run(row["stage"], list(row["words"]))
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # a bug of ours, in the log of the task
        return {"word": row["words"][-1], "failed": first_line(error)}
    return {"word": row["words"][-1], "failed": ""}


def run(stage: str, words: Sequence[str]) -> None:
    """Do the `num_shards` shards of a stage, then what is left for one, as tasks of Ray Data.

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
        import ray.data
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install -e '.[ray]'") from error

    ray.init()
    try:
        card = min(1, ray.cluster_resources().get("GPU", 0))

        def failures(more: Sequence[str]) -> dict[str, str]:
            """Do the command once with each of the words; return why it failed with which."""
            rows = [{"stage": stage, "words": [*words, word], "folder": os.getcwd()} for word in more]
            tasks = ray.data.from_items(rows, override_num_blocks=len(rows))
            done = tasks.map(_task, num_cpus=1, num_gpus=card).take_all()  # in the order in which they end
            return {row["word"]: row["failed"] for row in done if row["failed"]}

        shards = [f"shard={shard}" for shard in range(of)]
        if failed := failures(shards):
            numbers = ", ".join(word.removeprefix("shard=") for word in shards if word in failed)
            why = next(iter(failed.values()))
            raise UserError(f"of {of} shards failed {numbers}: {why}; the same command does what is missing")
        for why in failures(["num_shards=1"]).values():
            raise UserError(f"all {of} shards are done, but not what is left for one: {why}")
    except ray.exceptions.RayError as error:
        why = f"a task of Ray was lost ({first_line(error)}); the same command does what is missing"
        raise UserError(why) from error
    finally:
        ray.shutdown()
