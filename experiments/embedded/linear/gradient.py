"""How much of the linear map's gradient is the person, by which noise levels and pictures are denoised?

    python experiments/embedded/linear/gradient.py HYPERNET data=FOLDER [key=value of `hyperdb train_hypernet` ...]

HYPERNET is the file of `hyperdb train_hypernet experiment=linear`; its map is set to nothing. The gradients of batches
of other people, photos and noise agree in what is signal: their mean inner product is its square, and the rest of their
own square is noise. Writes gradient.json beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.train_hypernet import Batches, Objective, backward

BATCHES = 6
SETTINGS = {
    "photos and styles": [],
    "photos": ["target_style=same"],
    "the conditioning photo": ["target_style=same", "target_view=same"],
}


class Alone:
    """What of an Accelerator one process needs."""

    process_index, num_processes = 0, 1


def measure(model: Hypernet, words: list[str]) -> dict[str, Any]:
    """Return signal and noise of one batch's gradient, in units of a number's spread."""
    settings = config.load("train_hypernet", ["experiment=linear", *words])
    base = settings.diffusion.load()
    people = load_people(settings.data, settings.people, size=settings.diffusion.size)
    batches = Batches(settings, base, people, torch.full((len(people),), -1), None)
    objective = Objective(settings, base, model, model.lidb, None, None)
    found = []
    for step in tqdm(range(BATCHES), unit="batch", dynamic_ncols=True):
        model.zero_grad()
        backward(step, batches=batches, network=model, objective=objective, accelerator=Alone())  # type: ignore[arg-type]
        found.append(model.decoder.linear.grad.flatten().clone())  # type: ignore[union-attr]
    objective.injection.remove()
    dot = torch.stack(found) @ torch.stack(found).mT
    signal = (dot.sum() - dot.trace()).item() / (BATCHES * (BATCHES - 1))
    noise = dot.trace().item() / BATCHES - signal
    rows = settings.batch * settings.levels
    return {"signal": signal, "noise": noise, "rows": rows, "signal_to_noise_1000_rows": 1000 / rows * signal / noise}


def main(file: str, *words: str) -> None:
    """Measure every setting, write."""
    model = Hypernet.load(Path(file)).train()
    model.encoder.requires_grad_(False)
    with torch.no_grad():
        model.decoder.linear.zero_()  # type: ignore[union-attr]
    result = {}
    for name, more in SETTINGS.items():
        result[name] = measure(model, [*words, *more])
        print(name, result[name])
    save_json(Path(__file__).with_name("gradient.json"), {"settings": result, "batches": BATCHES, **provenance()})


if __name__ == "__main__":
    main(*sys.argv[1:])
