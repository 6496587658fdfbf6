r"""The likeness of other methods at the copying of ours: what repeats the photo more is like it for that alone.

    hyperdb evaluate -m experiment=table1 rows=[dreambooth] methods.dreambooth.finetune.steps=10,40,100 \
      name=along results=results.json
    python experiments/tables/equal_copying.py runs/evaluate/tables/table1.json runs/evaluate/along

A row that stands in several files, made in different ways, has a point in each: its copying, the mean of pose and
backdrop, and its likeness under changed prompts; one that begins at nothing has the base alone as its first. Rows that
differ in iterations and rate alone, as DreamBooth's of Table 2, are points of one. The copying is seen in the plain
pictures, where nothing else is asked for. Between two neighbours the likeness is read off a straight line, at the
copying of `hyper_40`; beyond the last point it is that of the last. Intervals are over people, all of whom count at
every point. Prints a table, and writes equal_copying.json beside this file (or out=FILE).

`read` names other figures that are read off so, several of them with commas. `at` and `ours` name another figure than
the copying and another row: how varied FouRA's pictures are at the likeness of LoRA's, which is its claim, is read off
by

    python experiments/tables/equal_copying.py ours=foura_adaptive at=cosine_changed \
      read=diversity,vicreg_diversity,copying out=FILE FOLDER FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperdb.report.results import check_alike, load
from hyperdb.report.table import COLUMNS
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import save_json

HERE = Path(__file__).parent
WORDS = {"ours": "hyper_40", "at": "copying", "read": "cosine_changed"}
MEANS = {"copying": ("copy_pose", "copy_background")}  # of several figures; any other word is a figure's name
DRAWS = 10_000
Point = tuple[NDArray[np.float64], NDArray[np.float64]]  # two figures of each person, copying and likeness, `[I]`


def point(values: dict[str, Any], at: str, read: str) -> Point | None:
    """Return two figures of a row, each the mean over seeds; None where it was not asked for them."""
    names = [MEANS.get(name, (name,)) for name in (at, read)]
    if not {figure for some in names for figure in some} <= values.keys():
        return None
    first, second = (np.mean([np.mean(values[figure], 0) for figure in some], 0) for some in names)
    return first, second


def way(row: str, how: dict[str, Any] | None) -> tuple[str, str]:
    """Return what a row has in common with those that differ in iterations and rate alone, and all that made it."""
    if how is None:
        return row, row
    fit = how.get("finetune") or {}
    everything = {key: value for key, value in how.items() if key != "people"}
    common = everything | {"finetune": {key: value for key, value in fit.items() if key not in ("steps", "rate")}}
    name, made = (json.dumps(told, sort_keys=True) for told in (common, everything))
    return (name if fit else row), made


def at_equal_copying(points: list[Point], ours: Point, seed: int = 0) -> dict[str, Any]:
    """Return a method's second figure where its first is that of ours, and ours minus it with its 95 % interval."""
    count = min(len(copying) for copying, _ in [*points, ours])
    every = np.stack([np.stack([x[:count] for x in one]) for one in [*points, ours]])  #   [P + 1, 2, I]
    rows = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    drawn = every[:, :, rows].mean(-1)  #                                                 [P + 1, 2, draws]

    def read(found: NDArray[np.float64]) -> float:  # [P + 1, 2]
        order = found[:-1, 0].argsort()
        return float(np.interp(found[-1, 0], found[order, 0], found[order, 1]))

    whole = every.mean(-1)
    differences = [drawn[-1, 1, i] - read(drawn[..., i]) for i in range(DRAWS)]
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "people": count, "points": len(points), "at": float(whole[-1, 0]), "read": read(whole),
        "within": bool(whole[:-1, 0].min() <= whole[-1, 0] <= whole[:-1, 0].max()),
        "ours": float(whole[-1, 1]), "mean": float(whole[-1, 1]) - read(whole), "lo": float(low), "hi": float(high),
    }  # fmt: skip


def compare(every: list[dict[str, Any]], ours: str, at: str, read: str) -> dict[str, dict[str, Any]]:
    """Return {row: its comparison} with ours of every row that learns from the photo.

    Raises `UserError` for results of several people, bases, recipes or judges, and for two ways to make ours.
    """
    check_alike(every)
    points: dict[str, dict[str, Point]] = {}  # of each row, by how it was made
    names: dict[str, str] = {}  # of ways, the row that is named first
    nothing = [found for x in every if (base := x.get("values", {}).get("floor")) and (found := point(base, at, read))]
    for results in every:
        for row, values in results.get("values", {}).items():
            if results["rows"][row].get("steps") and (found := point(values, at, read)) is not None:
                how = results.get("methods", {}).get(row)
                common, made = way(row, how)
                name = row if row == ours else names.setdefault(common, row)
                points.setdefault(name, {})[made] = found
                if nothing and row != ours and how and how.get("start") is None and not how.get("encoder"):
                    points[name]["floor"] = nothing[0]
    mine = list(points.pop(ours, {}).values())
    if len(mine) != 1:
        which = "none" if not mine else "several"
        raise UserError(f"{which} of the rows {ours} with {at} and {read}: name results with one")
    return {row: at_equal_copying(list(found.values()), mine[0]) for row, found in points.items()}


def table(compared: dict[str, dict[str, dict[str, Any]]], ours: str, at: str) -> str:
    """Return the comparisons, by figure and row, as Markdown."""
    labels = [read if read in MEANS else COLUMNS[read].label for read in compared]
    heads = [f"{label} at the {at} of `{ours}` | `{ours}` − it" for label in labels]
    lines = [f"| row | points | people | {' | '.join(heads)} |", "|" + " --- |" * (3 + 2 * len(heads))]
    for row in next(iter(compared.values())):
        several = [found[row] for found in compared.values() if row in found]
        cells = [f"`{row}`", str(several[0]["points"]), str(several[0]["people"])]
        for one in several:
            cells.append(f"{one['read']:.3f}{'' if one['within'] else ' (of the point next to it)'}")
            cells.append(f"{one['mean']:+.3f} [{one['lo']:+.3f}, {one['hi']:+.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Read the results, compare, print and write."""
    told = {**WORDS, "out": str(HERE / "equal_copying.json")}
    told |= {key: value for key, _, value in (word.partition("=") for word in words) if key in told}
    named = [Path(word) for word in words if word.partition("=")[0] not in told]
    out, figures = told.pop("out"), told.pop("read").split(",")
    if unknown := [name for name in figures if name not in {*COLUMNS, *MEANS}]:
        raise UserError(f"read={unknown[0]}: expected figures of results, as cosine_changed or clip_i")
    files = [file for path in named for file in (sorted(path.rglob("results.json")) if path.is_dir() else [path])]
    if not files:
        raise UserError("name results files of `hyperdb evaluate`, or folders of them")
    every = [load(file) for file in files]
    compared = {read: compare(every, told["ours"], told["at"], read) for read in figures}
    common = {key: every[0].get(key) for key in ("base", "data", "people", "seeds", "commit", "dirty")}
    print(table(compared, told["ours"], told["at"]))
    print(f"in {save_json(out, {**told, 'compared': compared, **common})}")


if __name__ == "__main__":
    run_script(main)
