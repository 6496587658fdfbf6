"""The seconds of a fine-tuning alone and beside another program, with all threads and with those that are free.

    python benchmarks/busy.py [repeats] [iterations]

The embedded base, one photo, 40 iterations. The other program multiplies matrices, with as many threads as there are
cores. Every repeat measures all four in turn, so that what else the machine does falls on all alike. Prints the medians
and writes busy.json beside this file. Run it with OMP_NUM_THREADS unset.
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
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.threads import Watch, spared

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


def main(repeats: int = 5, iterations: int = 40) -> None:
    """Measure alternately, print, write."""
    model = hyperdb.load("embedded")
    model.config = dataclasses.replace(
        model.config, finetune=dataclasses.replace(model.config.finetune, steps=iterations)
    )
    crop = model.crop(render(Identity(1_100_003), View(), size=256))
    tokens = model.predict(crop)
    model.finetune(crop, tokens)  # warms up
    seconds: dict[str, list[float]] = {}
    threads: dict[str, list[int]] = {}
    for _ in range(repeats):
        for other in (False, True):
            for chosen in (False, True):
                name = f"{'beside another program' if other else 'alone'}, {'free' if chosen else 'all'} threads"
                with beside(other):
                    time.sleep(1)
                    watch = Watch()
                    with spared(watch, model.base.device) if chosen else nullcontext():
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
    within = {where: ratio <= (1.05 if where == "alone" else 1.0) for where, ratio in ratios.items()}
    result = {"ratios": ratios, "within": within,
              "iterations": iterations, "runs": rows, "cores": os.cpu_count(), **provenance()}  # fmt: skip
    save_json(Path(__file__).with_suffix(".json"), result)
    for name, row in rows.items():
        print(f"{name:40s}{row['median']:8.2f} s   threads {row['threads']}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
