"""What it brings that the autoencoder and the image encoder lie channels last, on this machine.

    python benchmarks/channels_last.py [repeats] [key=value of diffusion ...]

The base's autoencoder encodes and decodes 16 pictures, and the hypernetwork's encoder learns from 64, both layouts in
turn. Prints the ratios of medians, writes channels_last.json beside this file.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hyperdb import config
from hyperdb.hypernet.encoder import Encoder
from hyperdb.runtime.files import save_json
from hyperdb.runtime.precision import autocast
from hyperdb.runtime.provenance import provenance

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def main(repeats: int = 9, *words: str) -> None:
    """Measure alternately, print, write."""
    base = config.load("personalize", ["image=none", *words]).diffusion.load()
    encoder = Encoder(config.load("train_encoder").encoder)
    pictures = torch.randint(0, 256, (16, 3, base.config.size, base.config.size), dtype=torch.uint8)
    photos, latents = torch.randint(0, 256, (64, 3, 64, 64)), torch.randn(16, *base.latent_shape)

    def learn() -> None:
        with autocast("cpu", torch.bfloat16):
            features = encoder(photos)
        features.float().square().mean().backward()

    def decode() -> None:
        with torch.no_grad(), base.autocast():
            base.pixels(latents)

    work: dict[str, Callable[[], object]] = {
        "encode": lambda: base.moments(pictures),
        "decode": lambda: base.decode(latents),
        "decode in bf16": decode,
        "train the image encoder": learn,
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {layout: [] for layout in LAYOUTS} for name in work}
    for turn in range(repeats + 1):
        for layout, form in LAYOUTS.items():
            base.vae.to(memory_format=form)
            encoder.to(memory_format=form)
            for name, do in work.items():
                began = time.perf_counter()
                do()
                if turn:  # the first turn warms up
                    seconds[name][layout].append(time.perf_counter() - began)
    result = {}
    for name, each in seconds.items():
        medians = {layout: round(statistics.median(times), 4) for layout, times in each.items()}
        result[name] = {**medians, "ratio": round(medians["contiguous"] / medians["channels_last"], 2)}
        print(f"{name}: {medians['contiguous']:.2f} s, channels last {medians['channels_last']:.2f} s, "
              f"{result[name]['ratio']:.2f} times as fast")  # fmt: skip
    save_json(
        Path(__file__).with_suffix(".json"),
        {"work": result, "base": base.digest, "repeats": repeats, "cores": os.cpu_count(), **provenance()},
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9, *sys.argv[2:])
