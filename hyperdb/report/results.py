"""Results files of `hyperdb evaluate`: read, and checked as far as tables and figures need it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json

# settings of an evaluation that a row says of itself, or that are told by a digest
OWN = ("adapter", "batch", "finetune", "hypernet", "relaxed", "seeds")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(part)) for part in ("mean", "lo", "hi"))


def is_figure(value: Any) -> bool:
    """Whether an entry of a row is a figure: a number, or a mean with the ends of its 95 % interval."""
    return _is_number(value) or _is_interval(value)


def _wrong(found: Any) -> str | None:
    """Return why something is not the results of an evaluation; None if it is."""
    if not isinstance(found, dict) or not isinstance(rows := found.get("rows"), dict) or not rows:
        return "it has no rows"
    for name, row in rows.items():
        if not isinstance(row, dict) or not _is_interval(row.get("cosine")):
            return f"its row {name!r} has no face cosine with an interval"
        if not isinstance(row.get("label", name), str):
            return f"the label of its row {name!r} is no text"
    figures = {figure for row in rows.values() for figure, value in row.items() if is_figure(value)}
    for name, row in rows.items():
        for figure, value in row.items():
            if (figure in figures or isinstance(value, float)) and not is_figure(value):
                return f"{figure} of its row {name!r} is neither a number nor a mean with lo and hi"
    for count in ("people", "seeds"):
        if not isinstance(n := found.get(count, 1 if count == "seeds" else None), int) or n < 1:
            return f"it does not say of how many {count} it is"
    for told in ("settings", "methods"):
        if not isinstance(found.get(told, {}), dict):
            return f"its {told} are not named"
    if not all(isinstance(how, dict) for how in found.get("methods", {}).values()):
        return "what its methods are is not told"
    if not _are_values(found.get("values", {})):
        return "its values are not a number for each row, figure, seed and person"
    if not _are_slices(found.get("slices", {})):
        return "its slices are not numbers by attribute and word"
    if found.get("slices_of", "cosine") not in ("cosine", "cosine_changed"):
        return "its slices are of no face cosine"
    further = found.get("paired_further", {})
    for pairs in (found.get("paired"), *(further.values() if isinstance(further, dict) else [further])):
        if not isinstance(pairs, dict):
            return "it has no paired differences"
        for name, value in pairs.items():
            two = name.split("-")
            if len(two) != 2 or not set(two) <= rows.keys() or not _is_interval(value):
                return f"its paired difference {name!r} is not an interval of two rows"
    return None


def _are_slices(told: Any) -> bool:
    """Whether it is {attribute: {word: {people or a row: a number}}}."""
    if not isinstance(told, dict) or not all(isinstance(words, dict) for words in told.values()):
        return False
    parts = [part for words in told.values() for part in words.values()]
    return all(isinstance(part, dict) and all(map(_is_number, part.values())) for part in parts)


def _are_values(told: Any) -> bool:
    """Whether it is {row: {figure: a list for each seed of a number for each person}}, all of a figure as long."""
    if not isinstance(told, dict) or not all(isinstance(figures, dict) for figures in told.values()):
        return False
    for seeds in (seeds for figures in told.values() for seeds in figures.values()):
        if not isinstance(seeds, list) or not seeds or not all(isinstance(people, list) for people in seeds):
            return False
        if len({len(people) for people in seeds}) > 1 or not all(_is_number(x) for people in seeds for x in people):
            return False
    return True


def load(path: Path) -> dict[str, Any]:
    """Read the results of an evaluation. Raises `UserError` naming a file that is missing, broken or of other kind."""
    found = load_json(path)
    if (wrong := _wrong(found)) is not None:
        raise UserError(f"{path} is not a results file of `hyperdb evaluate`: {wrong}")
    return dict(found)


def _decides(results: Mapping[str, Any]) -> Any:
    """Return the settings that decide the pictures of every row; of older results the digest of these and the data."""
    if (settings := results.get("settings")) is None:
        return results.get("made_from")
    return {key: value for key, value in settings.items() if key not in OWN}


def check_alike(every: list[dict[str, Any]]) -> None:
    """Raise `UserError` if results are not of the same people, base, settings and judges, so that rows compare."""
    alike = {told: [x.get(told) for x in every] for told in ("base", "data", "persons", "seeds", "hypernet", "judges")}
    for told, found in {**alike, "settings": [_decides(x) for x in every]}.items():
        if any(one != found[0] for one in found):
            raise UserError(f"the results differ in {told}: name those of the same people, prompts and judges")


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """Return the rows of several results files of the same people, prompts and judges, on whatever bases they are.

    People may be the first ones of those of another file: every row says of how many it is. Rows on a base in fewer
    bits are called so. A row that stands in several files is that of the first. Every row's values go along, so that
    rows can be compared person by person; differences and slices stay behind.
    Raises `UserError` for other people, prompts or judges.
    """
    every = [load(file) for file in files]
    rows: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for file, results in zip(files, every, strict=True):
        common = min(len(found.get("persons", [])) for found in (results, every[0]))
        people = results.get("persons", [])[:common] != every[0].get("persons", [])[:common]
        told = ("data", "seeds", "images_a_person", "styled", "changed", "recognisers", "judges")
        if odd := ["persons"] * people + [key for key in told if results.get(key) != every[0].get(key)]:
            raise UserError(f"{file} differs from {files[0]} in {odd[0]}: name results of the same people and prompts")
        bits = results.get("settings", {}).get("diffusion", {}).get("quantise")
        for row, figures in results["rows"].items():
            label = figures.get("label", row) + (f", base in {bits}" if bits else "")
            name = f"{row}_{bits}" if bits else row
            if name not in rows:
                rows[name] = {"people": results["people"], **figures, "label": label}
                values[name] = results.get("values", {}).get(row, {})
    shared = {"people": every[0]["people"], "seeds": every[0].get("seeds", 1)}
    return {"rows": rows, "values": values, "paired": {}, **shared}
