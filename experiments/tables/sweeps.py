"""Choose each method's rate on validation people, from what its sweep found.

    hyperdb evaluate experiment=ablation/trained rows=[floor] name=sweep_floor people=6   # what the base alone obeys
    hyperdb evaluate -m experiment=sweep/lora people=6
    python experiments/tables/sweeps.py lora      # several, or lora=FOLDER; floor=FOLDER; out=FOLDER of the files
    python experiments/tables/sweeps.py           # the table of all that were chosen

Writes sweeps/NAME.json beside this file: every rate with its figures, and the one that is chosen. It has the highest
likeness under changed prompts of those that still obey them. Likeness alone would choose whoever repeats the photo. A
rate obeys if its obedience, the mean of the places and the styles recognised or else CLIP's R-precision, is at least
OBEYED of what the base alone has for the same people and prompts: the same mark for every method, low enough for what a
person in the picture costs. A rate at an end of those that were tried is called so: a further one may be better. Every
method has as many rates: one that could not be trained is to be replaced by another. `people=3` counts the first three
people of each results alone, for methods so slow that they were run on no more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hyperdb.metrics.figures import summary
from hyperdb.report.results import is_figure, load
from hyperdb.report.sweep import axis
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import load_json, save_json

HERE, RUNS = Path(__file__).parent, Path("runs/evaluate")
LIKENESS = "cosine_changed"
OBEDIENCE = (("place_accuracy", "style_accuracy"), ("clip_r",))  # the mean of the first that are known
OBEYED = 0.8
RATES = 5
ALIKE = ("base", "data", "persons", "seeds", "images_a_person", "styled", "changed", "recognisers", "judges")
FLOOR = "run `hyperdb evaluate experiment=ablation/trained rows=[floor] name=sweep_floor` with the same `people`"


def _without(found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of results without those of the hypernetwork's training."""
    return {key: value for key, value in found.get("settings", {}).items() if key != "hypernet"}


def _of_the_first(found: dict[str, Any], people: int | None) -> dict[str, Any]:
    """Return results as those of the first people alone; None: of all."""
    if people is None:
        return found
    rows = {}
    for row, values in found["values"].items():
        if any(len(seed) < people for seed in values[LIKENESS]):
            raise UserError(f"results of fewer than {people} people")
        scores = {figure: np.array(seeds, float).T[:people] for figure, seeds in values.items()}
        rows[row] = {**found["rows"][row], **summary(scores, 0), "people": people}
    told = {"rows": rows, "people": people, "persons": found["persons"][:people]}
    return {**found, **told, "settings": {**found["settings"], "people": people}}


def choose(method: str, folder: Path, floor: dict[str, Any], people: int | None = None) -> dict[str, Any]:
    """Return the rates of a method's sweep with their figures, and the best.

    `floor` are the results of the base alone; of all `people` the first count, None: all. Raises `UserError` for
    another folder, and for other people.
    """
    floor = _of_the_first(floor, people)
    named = {str(path): _of_the_first(load(path), people) for path in sorted(folder.glob("*/results.json"))}
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
    base = floor["rows"].get("floor", {})
    if any(floor.get(told) != every[0].get(told) for told in ALIKE) or not base:
        raise UserError(f"{folder}: the row floor is of another base, or of other people or prompts; {FLOOR}")
    asked = next((names for names in OBEDIENCE if all(set(names) <= row.keys() for row in (base, *rows))), None)
    if asked is None:
        raise UserError(f"{folder}: neither places and styles nor R-precision are known of each rate and the base")

    def obeyed(row: dict[str, Any]) -> float:
        return sum(row[name]["mean"] for name in asked) / len(asked)

    obedient = [i for i, row in enumerate(rows) if obeyed(row) >= OBEYED * obeyed(base)]
    if not obedient:
        raise UserError(f"{folder}: no rate obeys the prompts; add lower ones")
    best = max(obedient, key=lambda i: rows[i][LIKENESS]["mean"])
    told = ("split", "people", "seeds", "base", "data", "hypernet", "commit", "dirty")
    return {
        "method": method,
        "rate": rows[best]["rate"],
        "chosen_by": {"likeness": LIKENESS, "obedience": asked, "of_the_base": obeyed(base), "obeyed": OBEYED},
        "at_an_end": best in (0, len(rows) - 1),
        "rates": [{key: value for key, value in row.items() if is_figure(value)} for row in rows],
        **{key: every[0][key] for key in told},
    }


def table(every: list[dict[str, Any]]) -> str:
    """Return the sweeps as Markdown: of each rate the likeness and the obedience, the chosen one in bold."""
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
    count = str(folders.pop("people", ""))
    if count and (not count.isdigit() or int(count) < 2):
        raise UserError(f"people={count}: expected a number, at least 2")
    people = int(count) if count else None
    floor = Path(folders.pop("floor", RUNS / "sweep_floor")) / "results.json"
    if folders and not floor.is_file():
        raise UserError(f"{floor} is not there: {FLOOR}")
    for method, folder in folders.items():
        found = choose(method, Path(folder), load(floor), people)
        end = ", at an end of those tried" if found["at_an_end"] else ""
        print(f"{method}: {found['rate']:g} of {len(found['rates'])}{end}; {save_json(out / f'{method}.json', found)}")


if __name__ == "__main__":
    run_script(main)
