"""What came out of ablations: the table of each over its values, beside the value that ships.

    hyperdb evaluate -m experiment=ablation/rank
    python experiments/tables/ablations.py rank      # several, or rank=FOLDER; out=FOLDER of what is written
    python experiments/tables/ablations.py           # the tables of all that were run

Results of trainings of several seeds may lie in one folder, every value with the same seeds: intervals are then over
people and seeds.

Writes ablations/NAME/results.json beside this file: every value's rows with their figures and each person's, and their
differences, person by person, from the value that ships; and over.png, the picture of `hyperdb report`. Which value
ships is asked of the configuration, so the tables follow it.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hyperdb import config
from hyperdb.metrics.figures import summary
from hyperdb.metrics.score import paired
from hyperdb.report.plot import draw_over
from hyperdb.report.results import load
from hyperdb.report.sweep import Axis, axis, shown
from hyperdb.report.table import COLUMNS
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.recipe import plain, recipe

HERE, RUNS = Path(__file__).parent / "ablations", Path("runs/evaluate")
COMPARED = ("cosine_changed", "rank1_styled_verifier")
FIGURES = (*COMPARED, "style_accuracy", "place_accuracy", "clip_t", "copy_pose", "copy_background", "diversity")
COSTS = ("steps", "trained", "bytes", "base_bytes", "seconds")
KEPT = ("label", "cosine", "rank1", *FIGURES, "clip_t_changed", "detected", *COSTS)
TOLD = ("split", "people", "seeds", "persons", "styled", "changed", "recognisers", "base", "data", "commit", "dirty")


def _setting(told: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        told = told[key]
    return told


def shipped(setting: str) -> Any:
    """Return the value that a setting of the results has by default; one of a hypernetwork as it is trained."""
    if setting.startswith("hypernet."):
        return _setting(plain(recipe(config.load("train_hypernet", ["experiment=decoder"]))), setting[9:])
    settings = config.load("evaluate", [])
    if not setting.startswith("methods."):
        return _setting(plain(recipe(settings)), setting)
    _, row, rest = setting.split(".", 2)
    if rest.startswith("finetune."):
        return _setting(plain(recipe(settings.fit(row))), rest[9:])
    return _setting(plain(recipe(settings.methods[row])), rest)


def pooled(named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return results of several trainings of each value as one of each, the trainings' seeds beside each other.

    Results without a hypernetwork stay as they are. Raises `UserError` where the values have not the same seeds.
    """
    groups: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {}
    for name, found in named.items():
        settings = found.get("settings", {})
        trained = dict(settings.get("hypernet") or {})
        seed = trained.pop("seed", 0)
        told = {**found, "settings": {**settings, "hypernet": trained}} if trained else found
        groups.setdefault(json.dumps(told["settings"], sort_keys=True), {})[seed] = name, told
    every = [dict(sorted(group.items())) for group in groups.values()]
    if any(list(group) != list(every[0]) for group in every):
        raise UserError(f"of several seeds: expected the same of each value, got {[list(group) for group in every]}")
    one = {}
    for group in every:
        name, first = next(iter(group.values()))
        rows, values = {}, {}
        for row, scores in first["values"].items():
            parts = [found["values"][row] for _, found in group.values()]
            values[row] = {key: [seed for part in parts for seed in part[key]] for key in scores}
            figures = {key: np.array(seeds, float).T for key, seeds in values[row].items()}
            rows[row] = {**first["rows"][row], **summary(figures, 0)}
        seeds = sum(found["seeds"] for _, found in group.values())
        one[name] = {**first, "rows": rows, "values": values, "seeds": seeds, "trainings": list(group)}
    return one


def gather(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], Axis]:
    """Return what an ablation found, its results by folder, and the setting in which they differ.

    Values are compared with the one that ships, or with the first where that was not run. Raises `UserError` for a
    folder without an ablation.
    """
    named = {path.parent.name: load(path) for path in sorted(folder.glob("*/results.json"))}
    if (along := axis(named)) is None and named:
        along = axis(named := pooled(named))
    if along is None:
        raise UserError(f"{folder} holds no results that differ in one setting alone; run it by `hyperdb evaluate -m`")
    every, order, default = list(named.values()), along.order(), shipped(along.setting)
    first = next((i for i in order if along.values[i] == default), order[0])
    values = []
    for i in order:
        found, other = every[i]["values"], every[first]["values"]
        against: dict[str, Any] = {row: {} for row in found if i != first and row in other}
        for row, name in product(against, COMPARED):
            if name in found[row] and name in other[row]:
                a, b = (np.array(scores[row][name], dtype=float).T for scores in (found, other))
                against[row][name] = paired(a, b, 0)
        rows = {row: {key: told[key] for key in KEPT if key in told} for row, told in every[i]["rows"].items()}
        scores = {row: {key: told[key] for key in KEPT if key in told} for row, told in found.items()}
        values.append({"value": along.values[i], "rows": rows, "against": against, "scores": scores})
    told = {key: every[0][key] for key in (*TOLD, "trainings") if key != along.setting and key in every[0]}
    return {"setting": along.setting, "compared_with": along.values[first], **told, "values": values}, named, along


def table(found: dict[str, Any]) -> str:
    """Return an ablation as Markdown: a line for each row and value, the one that others are compared with in bold."""
    several = [value["rows"] for value in found["values"]]
    figures = [name for name in FIGURES if any(name in row for rows in several for row in rows.values())]
    heads = [f"`{found['setting']}`", "row"]
    for name in figures:
        heads += [COLUMNS[name].label, *["− bold"] * (name in COMPARED)]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in dict.fromkeys(row for rows in several for row in rows):
        having = [value for value in found["values"] if row in value["rows"]]
        alike = len(having) > 1 and all(value["scores"][row] == having[0]["scores"][row] for value in having)
        for value in having[: 1 if alike else None]:  # a row that does not ask for the setting is told once
            told = value["rows"][row]
            text = shown(value["value"])
            text = f"**{text}**" if value["value"] == found["compared_with"] else text
            cells = ["every" if alike else text, f"`{row}`"]
            for name in figures:
                mean = told[name]["mean"] if isinstance(told.get(name), dict) else told.get(name)
                cells.append("—" if mean is None else f"{mean:.{COLUMNS[name].digits}f}")
                if name in COMPARED:
                    more = None if alike else value["against"].get(row, {}).get(name)
                    cells.append("" if more is None else f"{more['mean']:+.3f} [{more['lo']:+.3f}, {more['hi']:+.3f}]")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Write the files of each ablation named; print the tables of all where none is."""
    if not words:
        for file in sorted(HERE.glob("*/results.json")):
            print(f"### {file.parent.name}\n\n{table(load_json(file))}\n")
    folders = {name: folder or RUNS / f"ablation_{name}" for name, _, folder in (word.partition("=") for word in words)}
    out = Path(folders.pop("out", HERE))
    for name, folder in folders.items():
        found, named, along = gather(Path(folder))
        file = save_json(out / name / "results.json", found)
        print(table(found))
        print(f"{file}, {draw_over(file.parent / 'over.png', along, named)}")


if __name__ == "__main__":
    run_script(main)
