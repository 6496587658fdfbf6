"""The seconds of one personalisation, warm, on the embedded base.

    python benchmarks/personalize.py [repeats]

Prints the median seconds of each phase and of the whole command (loading, saving and preview included), and the ratio
of the fine-tuning to as many passes of the same rows through the bare UNet and text encoder (forward and backward to
the latents, no adapter), timed alternately. Writes personalize.json beside this file.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import hyperdb
from hyperdb import config
from hyperdb.diffusion.loss import predict
from hyperdb.faces.image import save_png
from hyperdb.heads import Identity, View, render
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages import personalize


def main(repeats: int = 5) -> None:
    """Measure alternately, print, write."""
    model = hyperdb.load("embedded")
    base, tuning = model.base, model.config.finetune
    photo = render(Identity(1_100_003), View(), size=256)
    rows = tuning.levels + (tuning.prior_rows if model.prior is not None else 0)
    z, t = torch.randn(rows, *base.latent_shape), torch.arange(rows) * 100
    ids = base.tokenize([base.config.instance_prompt] * rows)

    def bare() -> None:
        for _ in range(tuning.steps):
            predict(base, z.clone().requires_grad_(), z, t, ids).square().mean().backward()

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
        "bare_network": bare,
    }
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(repeats + 1):
        for name, phase in phases.items():
            began = time.perf_counter()
            phase()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    ratio = round(medians["finetune"] / medians["bare_network"], 3)
    whole = round(sum(medians[name] for name in ("crop", "predict", "finetune")), 3)
    result = {"iterations": tuning.steps, "rows": rows, "median_seconds": medians, "personalize_seconds": whole}
    result |= {"finetune_over_bare_network": ratio, "repeats": repeats, "cores": os.cpu_count(), **provenance()}
    save_json(Path(__file__).with_suffix(".json"), result)
    for name, value in medians.items():
        print(f"{name:14s}{value:8.2f} s")
    print(f"personalise   {whole:8.2f} s; fine-tuning takes {ratio:.2f} of the bare network's time")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
