"""Choose each method's rate on validation people, from what its sweep found.

    hyperdb evaluate -m experiment=sweep/lora
    python experiments/tables/sweeps.py lora      # several, or lora=FOLDER of the runs; out=FOLDER of the files
    python experiments/tables/sweeps.py           # the table of all that were chosen

Writes sweeps/NAME.json beside this file: every rate with its figures, and the one that is chosen. It has the highest
likeness under changed prompts of those that still obey them. Likeness alone would choose whoever repeats the photo. A
rate obeys if its obedience, CLIP-T or the places recognised, is at least OBEYED of the best of all rates, and so are
the styles recognised. OBEYED leaves room for what a person in the picture costs: hyperdb's own recipe draws .89 of the
styles that the base draws, and a rule that it fails would be no fair chance for others. A rate at an end of those that
were tried is called so: a further one may be better. Every method has as many rates: one that could not be trained is
to be replaced by another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hyperdb.report.results import is_figure, load
from hyperdb.report.sweep import axis
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, save_json

HERE, RUNS = Path(__file__).parent, Path("runs/evaluate")
LIKENESS, OBEDIENCE = "cosine_changed", ("clip_t_changed", "place_accuracy")  # of the latter the first that is known
STYLE, OBEYED = "style_accuracy", 0.85
RATES = 5


def _without(found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of results without those of the hypernetwork's training."""
    return {key: value for key, value in found.get("settings", {}).items() if key != "hypernet"}


def choose(method: str, folder: Path) -> dict[str, Any]:
    """Return the rates of a method's sweep with their figures, and the best. Raises `UserError` for another folder."""
    named = {str(path): load(path) for path in sorted(folder.glob("*/results.json"))}
    begun = {json.dumps(found.get("methods", {}).get(method, {}).get("hypernet")) for found in named.values()}
    if begun == {"null"}:  # a row that begins at no prediction is the same with any hypernetwork
        named = {path: {**found, "hypernet": None, "settings": _without(found)} for path, found in named.items()}
    every, along = list(named.values()), axis(named)
    if len(begun) > 1:
        raise UserError(f"{folder} holds results of several hypernetworks; delete those of the former ones")
    if along is None or along.setting != f"methods.{method}.finetune.rate":
        raise UserError(f"{folder} holds no sweep; run `hyperdb evaluate -m experiment=sweep/{method}`")
    rows = [{"rate": along.values[i], **every[i]["rows"][method]} for i in along.order()]
    if len(rows) < RATES:
        raise UserError(f"{folder} holds {len(rows)} rates of {RATES}; run the others, or one in place of another")
    obedience = next((name for name in OBEDIENCE if all(name in row for row in rows)), None)
    asked = [name for name in (obedience, STYLE) if name is not None and all(name in row for row in rows)]
    best_of = {name: max(row[name]["mean"] for row in rows) for name in asked}
    obedient = [i for i, row in enumerate(rows) if all(row[k]["mean"] >= OBEYED * x for k, x in best_of.items())]
    if not obedient:
        raise UserError(f"{folder}: no rate obeys both the prompt and the style; add rates between those that do one")
    best = max(obedient, key=lambda i: rows[i][LIKENESS]["mean"])
    told = ("split", "people", "seeds", "base", "data", "hypernet", "commit", "dirty")
    return {
        "method": method,
        "rate": rows[best]["rate"],
        "chosen_by": {"likeness": LIKENESS, "obedience": asked, "obeyed": OBEYED},
        "at_an_end": best in (0, len(rows) - 1),
        "rates": [{key: value for key, value in row.items() if is_figure(value)} for row in rows],
        **{key: every[0][key] for key in told},
    }


def table(every: list[dict[str, Any]]) -> str:
    """Return the sweeps as Markdown: of each rate the likeness and what is obeyed, the chosen one in bold."""
    most = max(len(found["rates"]) for found in every)
    heads = ["row", "rate: face cosine under changed prompts; obeyed", *[""] * (most - 1)]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for found in every:
        cells = []
        for row in found["rates"]:
            obeyed = ", ".join(f"{row[name]['mean']:.2f}" for name in found["chosen_by"]["obedience"])
            cell = f"{row['rate']:g}: {row[LIKENESS]['mean']:.3f}; {obeyed}"
            cells.append(f"**{cell}**" if row["rate"] == found["rate"] else cell)
        lines.append(f"| `{found['method']}` | {' | '.join(cells + [''] * (most - len(cells)))} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Write a file for each method named; print the table where none is."""
    if not words:
        print(table([load_json(file) for file in sorted((HERE / "sweeps").glob("*.json"))]))
    folders = {method: folder or RUNS / f"sweep_{method}" for method, _, folder in (w.partition("=") for w in words)}
    out = Path(folders.pop("out", HERE / "sweeps"))
    for method, folder in folders.items():
        found = choose(method, Path(folder))
        end = ", at an end of those tried" if found["at_an_end"] else ""
        print(f"{method}: {found['rate']:g} of {len(found['rates'])}{end}; {save_json(out / f'{method}.json', found)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
