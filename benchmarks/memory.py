"""The memory `dry_run=true` expects at Stable Diffusion 1.5's size: against what was measured, and by graphics card.

    python benchmarks/memory.py WORK        (the folder of full_size.py, after it)

Prints both tables and writes memory.json beside this file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hyperdb import config
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.memory import GIGABYTE, need

CARDS = (6, 8, 12, 16, 24, 40, 80)  # GB
SPARE = 0.92  # of a card; its allocator's reserve and the screen have the rest
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STAGES = {
    "personalize": ["image=none", "hypernet=./hypernet"],
    "generate": ["num_images=64"],
    "precompute": ["experiment=paper_fits"],
    "train_hypernet": ["experiment=paper"],
}


def expected(stage: str, words: list[str], device: str) -> float:
    """Return the gigabytes of a command."""
    return round(need(config.stage_module(stage).passes, config.load(stage, words), device).total / GIGABYTE, 2)


def settings(stage: str) -> list[dict[str, Any]]:
    """Return batch, settings and gigabytes of what a stage can be told on a graphics card, those to prefer first."""
    base = ["diffusion=sd15", "diffusion.path=./base", *STAGES[stage]]
    if stage == "personalize":
        saving = ["diffusion.checkpointing=true"]
        choices: list[tuple[int, list[str]]] = [(1, []), (1, saving), (1, [*saving, "hypernet=null"])]
    else:
        choices = [(batch, [f"batch={batch}"]) for batch in BATCHES]
        if stage != "generate":
            choices += [(batch, [*words, "diffusion.checkpointing=true"]) for batch, words in choices]
    return [
        {"batch": batch, "settings": " ".join(words) or "as it is", "gb": expected(stage, [*base, *words], "cuda")}
        for batch, words in choices
    ]


def main(work: Path) -> None:
    """Compare, tabulate, write."""
    here = Path(__file__).parent
    measured = load_json(here / "full_size.json")["runs"]
    os.chdir(work)
    checked: dict[str, Any] = {}
    for name, run in measured.items():
        if not run.get("killed"):
            _, stage, *words = run["command"].split()
            found = expected(stage, words, "cpu")
            checked[name] = {"expected_gb": found, "measured_gb": run["peak_gb"]}
            print(f"{name:24}{found:8.2f} GB expected{run['peak_gb']:8.2f} GB measured")
    table: dict[str, dict[str, str]] = {}
    every = {stage: settings(stage) for stage in STAGES}
    for card in CARDS:
        table[str(card)] = {}
        for stage, choices in every.items():
            # the largest batch; of equal ones the one that does not compute twice
            fits = [choice for choice in choices if choice["gb"] <= SPARE * card]
            best = max(fits, key=lambda choice: choice["batch"], default=None)
            table[str(card)][stage] = f"{best['settings']}, {best['gb']:.1f} GB" if best else "none"
    for size, row in table.items():
        print(f"{size:>3} GB", row)
    result = {"checked_on_cpu": checked, "by_card": table, "all": every, "share_of_card_used": SPARE, **provenance()}
    print(save_json(here / "memory.json", result))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
