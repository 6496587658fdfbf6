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
from hyperdb.stages.memory import GIGABYTE, need

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
    return round(need(stage, config.load(stage, words), device).total / GIGABYTE, 2)


def settings(stage: str) -> list[tuple[float, str]]:
    """Return (gigabytes, setting) of a stage on a graphics card, the setting preferred by people first."""
    base = ["diffusion=sd15", "diffusion.path=./base", *STAGES[stage]]
    found = []
    for recompute in (False, True) if stage != "generate" else (False,):
        for batch in reversed(BATCHES) if stage != "personalize" else (None,):
            words = [] if batch is None else [f"batch={batch}"]
            words += ["diffusion.checkpointing=true"] if recompute else []
            found.append((expected(stage, [*base, *words], "cuda"), " ".join(words) or "as it is"))
    return found


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
            fits = [c for c in choices if c[0] <= SPARE * card]
            best = max(fits, key=lambda c: int(c[1].partition("batch=")[2].split()[0] or 0) if "batch" in c[1] else 0)
            table[str(card)][stage] = f"{best[1]} ({best[0]:.1f} GB)" if fits else "no"
    for card, row in table.items():
        print(f"{card:>3} GB", row)
    result = {"checked_on_cpu": checked, "by_card": table, "all": every, "share_of_card_used": SPARE, **provenance()}
    print(save_json(here / "memory.json", result))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
