"""The seconds of one personalisation, warm, on the embedded base.

    python benchmarks/personalize.py [repeats]

Prints the median seconds of each phase and of the whole command (loading, saving and preview included), timed in turns.
Writes personalize.json beside this file. What an iteration costs over the bare networks: iteration.py.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import hyperdb
from hyperdb import config
from hyperdb.faces.image import save_png
from hyperdb.heads import Identity, View, render
from hyperdb.runtime.files import save_json
from hyperdb.runtime.precision import cpu_has_bf16
from hyperdb.runtime.provenance import provenance
from hyperdb.stages import personalize


def main(repeats: int = 5) -> None:
    """Measure alternately, print, write."""
    model = hyperdb.load("embedded")
    tuning, photo = model.config.finetune, render(Identity(1_100_003), View(), size=256)
    rows = tuning.levels + (tuning.prior_rows if model.prior is not None else 0)
    crop = model.crop(photo)
    tokens = model.predict(crop)
    folder = tempfile.TemporaryDirectory()
    image = save_png(Path(folder.name) / "photo.png", photo)
    command = config.load("personalize", [f"image={image}", f"out={folder.name}/out"])
    phases = {
        "command": lambda: personalize.run(command),
        "crop": lambda: model.crop(photo),
        "predict": lambda: model.predict(crop),
        "finetune": lambda: model.finetune(crop, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(repeats + 1):
        for name, phase in phases.items():
            began = time.perf_counter()
            phase()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    whole = round(sum(medians[name] for name in ("crop", "predict", "finetune")), 3)
    result = {"iterations": tuning.steps, "rows": rows, "median_seconds": medians, "personalize_seconds": whole}
    result |= {"repeats": repeats, "cores": os.cpu_count(), "cpu_has_bf16": cpu_has_bf16(), **provenance()}
    save_json(Path(__file__).with_suffix(".json"), result)
    for name, value in medians.items():
        print(f"{name:14s}{value:8.2f} s")
    print(f"personalise   {whole:8.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
