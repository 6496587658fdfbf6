"""The arithmetic of scale: hours and dollars of the paper's run on Stable Diffusion 1.5, and those of a million people.

    python benchmarks/scale.py [price=3] [card=gpu_h200]

Runs nothing and writes nothing: it prints the tables of docs/scale.md, of the recipes in conf/ and of what `gpu.py` has
measured on one card. `price` is that of an hour of a card, in dollars; the 3 is assumed, for prices differ and change.
`card` names the results file beside this one.

A pass (a step of a training, of all people in it) takes as long as its arithmetic at the rate that a training of 16
people a step reached, but never less than an iteration of one person at one noise level: then the card waits for the
host. A job loads its networks once. Not counted are reading, encoding and judging pictures, the validations of the
training, what cards tell each other, and whatever stands in a queue.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gpu import DECODE, TEXT, UNET, VIT

from hyperdb import config
from hyperdb.adapters import FullConfig
from hyperdb.runtime.errors import run_script
from hyperdb.runtime.files import load_json
from hyperdb.stages.evaluate import PHOTOS, shares
from hyperdb.tuning.memory import GIGABYTE, KNOWN, rows

HERE = Path(__file__).parent
CARDS = (1, 8, 64)
PEOPLE = 16  # in a pass: what was measured; of the fits too, where conf/precompute/sd15.yaml has 4
PHOTOS_FITTED, MANY = 15_000, 1_000_000
FORWARD = UNET + TEXT  # TFLOP of a row; its way back takes as much, and as much again where all weights are trained
TABLES = ("table1", "table2", "table3")


@cache
def settings(stage: str, *words: str) -> Any:
    """Return the settings of a command."""
    return config.load(stage, words)


@dataclass
class Card:
    """What a card was measured at."""

    runs: dict[str, Any]

    @cached_property
    def rate(self) -> float:
        """TFLOP a second where many people share a pass."""
        return self.runs["train_hypernet_16"]["tflop"] / self.runs["train_hypernet_16"]["seconds_a_step"]

    @cached_property
    def least(self) -> float:
        """Seconds of a pass of one row."""
        alone = self.runs["personalize_again"]
        return alone["seconds_finetune"] / round(alone["tflop"] / (2 * FORWARD))

    @cached_property
    def load(self) -> float:
        """Seconds until a job has its networks."""
        return self.runs["personalize_again"]["seconds_load"]

    def seconds(self, tflop: float) -> float:
        """Return the seconds of a pass."""
        return max(self.least, tflop / self.rate)

    def fits(self, photos: int, cards: int) -> float:
        """Return the hours of so many fits; each card makes whole files of the store."""
        fit = settings("precompute", "experiment=paper_fits").fit
        files = -(-photos // PEOPLE)
        return (self.load + -(-files // cards) * fit.steps * self.seconds(PEOPLE * rows(fit) * 2 * FORWARD)) / 3600

    def training(self, cards: int, people: int | None = None) -> float | None:
        """Return the hours of the hypernetwork's training; None where the people of a step cannot be divided.

        With `people` a card, there are fewer steps, so that as many photos are seen as in the recipe.
        """
        recipe = settings("train_hypernet", "experiment=paper")
        batch = recipe.batch if people is None else people * cards
        if batch % cards:
            return None
        steps = -(-recipe.steps * recipe.batch // batch)
        return (self.load + steps * self.seconds(batch // cards * (rows(recipe) * 2 * FORWARD + VIT))) / 3600

    def evaluation(self, cards: int, batch: int) -> float:
        """Return the hours of all tables' rows, of the card that has most to do."""
        tables = [settings("evaluate", f"experiment={name}", "diffusion=sd15", "hypernet=none") for name in TABLES]
        known = {row: one for one in tables for row in one.rows if row not in PHOTOS}
        took = [self.load] * cards
        for row, one in known.items():
            method, fit = one.methods[row], one.fit(row)
            passes = 3 if isinstance(method.adapter, FullConfig) else 2
            pictures = one.images + len(one.changed) + len(one.styled)
            drawing = pictures * (2 * one.diffusion.steps * UNET + DECODE) / self.rate
            for card, some in enumerate(shares(method.among(one.people), batch, cards)):
                for first in range(some.start, some.stop, batch):
                    people = min(batch, some.stop - first)
                    took[card] += one.seeds * people * drawing
                    if fit is not None:
                        took[card] += one.seeds * fit.steps * self.seconds(people * rows(fit) * passes * FORWARD)
        return max(took) / 3600


def works(card: Card) -> Iterator[tuple[str, list[float | None]]]:
    """Yield each work, with its hours on 1, 8 and 64 cards."""
    yield f"{PHOTOS_FITTED:,} fits, `batch={PEOPLE}`", [card.fits(PHOTOS_FITTED, n) for n in CARDS]
    yield "training as in the recipe, 16 people a step", [card.training(n) for n in CARDS]
    yield "training, 16 people a card and step", [card.training(n, PEOPLE) for n in CARDS]
    for batch in (5, 1):
        yield f"tables 1 to 3, `batch={batch}`", [card.evaluation(n, batch) for n in CARDS]


def costs(card: Card, price: float) -> str:
    """Return the table of hours, card-hours and dollars."""
    lines = ["| work | cards | hours | card-hours | dollars |", "| --- | --- | --- | --- | --- |"]
    for name, each in works(card):
        for cards, hours in zip(CARDS, each, strict=True):
            told = ["—"] * 3
            if hours is not None:
                told = [f"{hours:.2f}", f"{cards * hours:,.1f}", f"{cards * hours * price:,.0f}"]
            lines.append(f"| {name} | {cards} | {' | '.join(told)} |")
    return "\n".join(lines)


def growth(card: Card, price: float) -> str:
    """Return the table of what is kept and spent for the paper's photos and for a million."""
    full = load_json(HERE / "full_size.json")["parameters"]
    sizes = load_json(HERE / "adapter_sizes.json")["bytes"]["other"]["fp16"]
    tuning = settings("personalize", "diffusion=sd15", "image=none").finetune
    size = settings("precompute", "experiment=paper_fits").diffusion.size
    row = rows(tuning) * 2 * FORWARD
    kept = {  # bytes a person
        f"photos of {size} px, decoded": 3 * size**2,
        "latents for the training, photo and mirror image": 2 * 2 * 4 * (size // 8) ** 2 * 2,
        "fits, float32": full["lidb_numbers"] * 4,
        "predictions as files, fp16": sizes["lidb"],
        "fine-tuned adapters as files, fp16": sizes["adapter"],
        "memory of a job: what is known of each photo": KNOWN,
    }
    spent = {  # seconds of a card a person
        "predictions": VIT / card.rate,
        f"fits, {PEOPLE} in a pass": card.fits(PHOTOS_FITTED, 1) * 3600 / PHOTOS_FITTED,
        "fast fine-tunings, one at a time": tuning.steps * card.seconds(row),
        f"fast fine-tunings, {PEOPLE} in a pass": tuning.steps * card.seconds(PEOPLE * row) / PEOPLE,
    }
    lines = [f"| of each person one photo | {PHOTOS_FITTED:,} | {MANY:,} |", "| --- | --- | --- |"]
    for name, each in kept.items():
        gigabytes = " | ".join(f"{n * each / GIGABYTE:,.2f} GB" for n in (PHOTOS_FITTED, MANY))
        lines.append(f"| {name} | {gigabytes} |")
    for batch in (4, PEOPLE, 64):
        files = " | ".join(f"{-(-n // batch):,}" for n in (PHOTOS_FITTED, MANY))
        lines.append(f"| files of the store, `batch={batch}` | {files} |")
    for name, each in spent.items():
        hours = [n * each / 3600 for n in (PHOTOS_FITTED, MANY)]
        lines.append(f"| {name} | {' | '.join(f'{h:,.1f} card-hours, {h * price:,.0f} dollars' for h in hours)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Print both tables."""
    told = {"price": "3", "card": "gpu_h200"} | dict(word.split("=", 1) for word in words)
    found = load_json(HERE / f"{told['card']}.json")
    card = Card(found["runs"])
    said = (
        f"{found['card']} at {float(told['price']):g} dollars an hour: {card.rate:.0f} TFLOP a second where many share "
        f"a pass, {card.least:.2f} s a pass at least, {card.load:.0f} s to load"
    )
    if "note" in found:
        said += f". What was measured is partial: {found['note']}"
    print(textwrap.fill(said, 140))
    print(f"\n{costs(card, float(told['price']))}\n\n{growth(card, float(told['price']))}")


if __name__ == "__main__":
    run_script(main)
