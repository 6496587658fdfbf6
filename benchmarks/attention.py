"""What `diffusion.attention` costs in a training step of the embedded UNet on this machine.

    python benchmarks/attention.py [repeats]

Forward and backward of 64 rows in bf16, PyTorch's fused attention and the eager one alternately. Prints the medians and
their ratio, writes attention.json beside this file.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from pathlib import Path

import torch

from hyperdb import config
from hyperdb.diffusion.loss import predict
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.methods import seconds_now


def main(repeats: int = 5) -> None:
    """Measure alternately, print, write."""
    embedded = config.load("personalize", ["image=none"]).diffusion
    bases = {kind: dataclasses.replace(embedded, attention=kind).load() for kind in ("sdpa", "eager")}
    seconds: dict[str, list[float]] = {kind: [] for kind in bases}
    for turn in range(repeats + 1):
        for kind, base in bases.items():
            base.unet.requires_grad_(True)
            z, t = (x.to(base.device) for x in (torch.randn(64, *base.latent_shape), torch.arange(64) * 15))
            began = seconds_now(base)
            predict(base, z, z, t, base.tokenize(["a face"] * 64)).square().mean().backward()
            if turn:  # the first turn warms up
                seconds[kind].append(seconds_now(base) - began)
    medians = {kind: round(statistics.median(times), 3) for kind, times in seconds.items()}
    ratio = round(medians["sdpa"] / medians["eager"], 3)
    result = {"median_seconds": medians, "sdpa_over_eager": ratio, "repeats": repeats, "cores": os.cpu_count()}
    save_json(Path(__file__).with_suffix(".json"), {**result, **provenance()})
    print(f"fused {medians['sdpa']:.2f} s, eager {medians['eager']:.2f} s a step of 64 rows: ratio {ratio:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
