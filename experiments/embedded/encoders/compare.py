"""Transformer or convolution, 64 or 128 pixels: which encoder has learned most of faces after equal minutes?

    hyperdb render_heads identities=3000 views=6 photo_views=4 out=data/heads_train
    python experiments/embedded/encoders/compare.py [minutes=5] [key=value of `hyperdb train_encoder` ...]

Each encoder is timed for a few steps, is then trained for as many as fit in the minutes, and is measured on 200 people
who were kept aside. Writes results.json beside this file. Run it alone on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from hyperdb import config
from hyperdb.hypernet.encoder import Encoder
from hyperdb.runtime.files import load_json, load_text, save_json
from hyperdb.runtime.optim import adamw
from hyperdb.runtime.precision import attention, autocast
from hyperdb.runtime.provenance import provenance

VIT = "encoder.name=vit_tiny_patch16_224"
ENCODERS = {
    "convolution_64": [],  # what is shipped: cs3darknet_focus_s
    "convolution_128": ["encoder.size=128"],
    "transformer_64": [VIT, "encoder.patch=8", "encoder.depth=6"],
    "transformer_128": [VIT, "encoder.size=128", "encoder.patch=16", "encoder.depth=6"],
}
TIMED = 12


def seconds(words: list[str]) -> tuple[float, int]:
    """Return a step's median seconds, as it is trained, and how many numbers the encoder has."""
    settings = config.load("train_encoder", words)
    encoder = Encoder(settings.encoder)
    encoder.net.train()
    optimizer = adamw(list(encoder.parameters()), settings.rate, 0.05)
    images = torch.randint(0, 256, (settings.batch, 3, 128, 128), dtype=torch.uint8)
    taken = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        with autocast(torch.device("cpu"), torch.bfloat16), attention(fused=False):
            encoder(images)[:, 0].float().square().mean().backward()
        optimizer.step()
        taken.append(time.perf_counter() - begin)
    return median(taken), sum(p.numel() for p in encoder.parameters())


def main(given: list[str]) -> None:
    """Time, train, collect."""
    minutes = next((float(w.split("=")[1]) for w in given if w.startswith("minutes=")), 5.0)
    rest = ["data=data/heads_train", *(w for w in given if not w.startswith("minutes="))]
    found = {}
    for name, own in ENCODERS.items():
        out = Path("runs/encoders") / name
        timed = out.with_suffix(".json")  # once: a training goes on for as many steps as it was begun with
        if not timed.is_file():
            save_json(timed, dict(zip(("step", "numbers"), seconds([*own, *rest]), strict=True)))
        step, numbers = load_json(timed)["step"], load_json(timed)["numbers"]
        if not (out / "report.json").is_file():
            steps = f"steps={int(60 * minutes / step)}"
            words = ["train_encoder", *own, *rest, steps, f"name={name}", f"out={out}"]
            subprocess.run([sys.executable, "-m", "hyperdb", *words], check=True)
        report = load_json(out / "report.json")
        last = json.loads(load_text(out / "journal.jsonl").splitlines()[-1])
        figures = {k: report[k] for k in ("portrait_r2", "shape_r2", "rank1_held_out", "people_held_out", "steps")}
        found[name] = {"settings": own, "numbers": numbers, **figures, "seconds": last["seconds"]}
        print(name, found[name])
    print(save_json(Path(__file__).parent / "results.json", {"encoders": found, "minutes": minutes, **provenance()}))


if __name__ == "__main__":
    main(sys.argv[1:])
