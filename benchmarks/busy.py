"""The seconds of a fine-tuning alone and beside another program, with all threads and with those that are free.

    python benchmarks/busy.py [repeats] [iterations]

The embedded base, one photo, 40 iterations. The other program multiplies matrices, with as many threads as there are
cores. Every repeat measures both numbers of threads in turn, three times alone, where they hardly differ, and once
beside the other program; every other repeat in another order, so that what else the machine does, and what came before,
falls on all alike. Alone both are to have the same threads, which nothing has touched then: by how much their medians
differ says how well this machine tells anything. Before each the model is loaded, as in `hyperdb personalize`: so long
the watch looks at what the others do. Prints the medians and writes busy.json beside this file. Where the user has
chosen the number of threads, there is nothing to compare.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import hyperdb
from hyperdb.heads import Identity, View, render
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.threads import USERS, Watch, spared
from hyperdb.tuning.personalizer import Personalizer

OTHER = "import torch\nx = torch.randn(1024, 1024)\nprint('ready', flush=True)\nwhile True: x @ x"


@contextmanager
def beside(other: bool) -> Iterator[None]:
    """Let another program take all cores while the block runs."""
    if not other:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def load(iterations: int) -> Personalizer:
    """Load the embedded base and its hypernetwork."""
    model = hyperdb.load("embedded")
    tuning = dataclasses.replace(model.config.finetune, steps=iterations)
    model.config = dataclasses.replace(model.config, finetune=tuning)
    return model


def main(words: list[str]) -> None:
    """Measure alternately, print, write."""
    repeats, iterations = [*map(int, words), *(5, 40)[len(words) :]]
    if chosen := [name for name in USERS if os.environ.get(name)]:
        raise UserError(f"{chosen[0]}={os.environ[chosen[0]]}: the number of threads is chosen; unset {chosen[0]}")
    model = load(iterations)
    if model.base.device.type != "cpu" or torch.get_num_threads() == 1:
        raise UserError("there is one thread, or the device is no CPU: threads cannot be spared here")
    crop = model.crop(render(Identity(1_100_003), View(), size=256))
    tokens = model.predict(crop)
    model.finetune(crop, tokens)  # warms up
    seconds: dict[str, list[float]] = {}
    threads: dict[str, list[int]] = {}
    for repeat in range(repeats):
        for other in (False, False, False, True):
            for few in (False, True) if repeat % 2 else (True, False):
                name = f"{'beside another program' if other else 'alone'}, {'free' if few else 'all'} threads"
                with beside(other):
                    watch = Watch()
                    model = load(iterations)
                    with spared(watch, model.base.device) if few else nullcontext():
                        began = time.perf_counter()
                        model.finetune(crop, tokens)
                        seconds.setdefault(name, []).append(round(time.perf_counter() - began, 3))
                        threads.setdefault(name, []).append(torch.get_num_threads())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = {
        name: {"median": medians[name], "seconds": times, "threads": threads[name]}
        for name, times in seconds.items()
    }
    ratios = {
        where: round(medians[f"{where}, free threads"] / medians[f"{where}, all threads"], 3)
        for where in ("alone", "beside another program")
    }
    busy = ratios["beside another program"] <= 1
    within = {"alone": threads["alone, free threads"] == threads["alone, all threads"], "beside another program": busy}
    result = {"ratios": ratios, "within": within,
              "iterations": iterations, "runs": rows, "cores": os.cpu_count(), **provenance()}  # fmt: skip
    save_json(Path(__file__).with_suffix(".json"), result)
    for name, row in rows.items():
        print(f"{name:40s}{row['median']:8.2f} s   threads {row['threads']}")


if __name__ == "__main__":
    run_script(main)
