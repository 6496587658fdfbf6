"""The seconds of personalising one person at a time, method by method: the rows of Table 1, side by side.

    python benchmarks/methods.py [repeats=3] [rows=[hyper_40,lora]] [diffusion=sd15 hypernet=FOLDER]

`hyperdb evaluate` trains people in batches, and its seconds are a person's share of one: a card that waits for the host
at one person does not at five. Here every turn takes another person from the crop of the photo to the trained adapter,
prediction included; the methods take turns in one process, after a few iterations of each that do not count. What all
have in common, finding the face and drawing, is in personalize.py and not here. Whatever `hyperdb evaluate` can set can
be set here. Writes methods_BASE.json beside this file, with the median and every turn. Each turn is kept in
runs/benchmarks, so that the same command of the same commit goes on where it was stopped.

Table 1 is 4,240 iterations a turn on the embedded base; `methods.NAME.finetune.steps=` makes one shorter.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fits import Kept

from hyperdb import config
from hyperdb.heads import Identity, View, render
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import save_json
from hyperdb.runtime.precision import cpu_has_bf16
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.methods import Cohort, seconds_now
from hyperdb.tuning.personalizer import Personalizer, to_images
from hyperdb.tuning.prior import load_prior

WARM = 3  # iterations of each method that do not count
FIRST = 1_100_003  # the person of personalize.py; each turn takes the next


def measure(words: list[str], repeats: int, out: str, work: Path) -> dict[str, Any]:
    """Take turns, print each and keep it in `work`, and return each method's label, iterations and seconds."""
    settings = config.load("evaluate", ["experiment=table1", *words, f"out={out}"])
    methods = {row: settings.methods[row] for row in settings.rows if row in settings.methods}
    # at another's or everybody's prediction it takes as long as at the own one, and so does another guidance; the base
    # alone takes nothing
    methods = {row: m for row, m in methods.items() if m.start in (None, "own") and (m.trains or m.start)}
    methods = {row: m for row, m in methods.items() if m.hybrid is not False}
    fits = {row: settings.fit(row) for row in methods}
    if several := [row for row, method in methods.items() if (method.photos or 1) > 1]:
        raise UserError(f"rows={settings.rows}: {several[0]} learns from several photos, and a turn has one")
    if not methods:
        raise UserError(f"rows={settings.rows}: none of them learns one person alone")
    model = Personalizer(settings)
    if model.prior is None and any(fit is not None and fit.prior_weight > 0 for fit in fits.values()):
        model.prior = load_prior(model.base, settings.prior, Path(out) / "prior.safetensors")

    nobody = Cohort(model, torch.empty(0), 1)
    adapters = {row: nobody.adapter(method) for row, method in methods.items()}  # made once for a base, not a person

    def seconds(row: str, photo: torch.Tensor, steps: int | None = None) -> float:
        began = seconds_now(model.base)
        cohort = Cohort(model, photo, 1)
        start = cohort.start(methods[row])
        if (fit := fits[row]) is not None and (adapter := adapters[row]) is not None:
            fit = replace(fit, steps=steps or fit.steps)
            cohort.train(adapter, fit, slice(0, 1), start, lambda _: None, methods[row].adapter)
        return seconds_now(model.base) - began

    asked = {"words": sorted(words), "base": model.base.digest, "commit": provenance()["commit"]}
    kept, warm = Kept(work, asked), set()

    def turned(row: str, photo: torch.Tensor) -> float:
        if row not in warm:
            seconds(row, photo, WARM)
            warm.add(row)
        return seconds(row, photo)

    found: dict[str, list[float]] = {row: [] for row in methods}
    for turn in range(repeats):
        picture = render(Identity(FIRST + turn), View(), size=max(256, settings.diffusion.size))
        photo = to_images(model.crop(picture)[None])[None]  #                        [1, 1, 3, H, W]
        for row in methods:
            found[row].append(kept.once(f"turn {turn + 1} {row}", partial(turned, row, photo)))
    steps = {row: 0 if fit is None else fit.steps for row, fit in fits.items()}
    cuda = model.base.device.type == "cuda"
    return {
        "rows": {
            row: {"label": methods[row].text(steps[row]), "iterations": steps[row],
                  "median_seconds": round(statistics.median(each), 3), "seconds": each}
            for row, each in found.items()
        },
        "device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "cpu_has_bf16": cpu_has_bf16(), "base": model.base.digest, **provenance(),
    }  # fmt: skip


def main(words: list[str]) -> None:
    """Measure, write, and print the medians."""
    repeats = int(next((word.partition("=")[2] for word in words if word.startswith("repeats=")), "3"))
    name = next((word.partition("=")[2] for word in words if word.startswith("diffusion=")), "embedded")
    with tempfile.TemporaryDirectory() as out:
        rest = [word for word in words if not word.startswith("repeats=")]
        result = measure(rest, repeats, out, Path(f"runs/benchmarks/methods_{name}.json"))
    save_json(Path(__file__).with_name(f"methods_{name}.json"), result)
    least = min(row["median_seconds"] for row in result["rows"].values())
    for row in result["rows"].values():
        print(f"{row['median_seconds']:10.2f} s  {row['median_seconds'] / least:8.1f} x  {row['label']}")


if __name__ == "__main__":
    run_script(main)
