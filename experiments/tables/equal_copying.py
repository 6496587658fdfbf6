r"""The likeness of other methods at the copying of ours: what repeats the photo more is like it for that alone.

    hyperdb evaluate -m experiment=table1 rows=[dreambooth] methods.dreambooth.finetune.steps=10,30,100,400 \
      name=along results=results.json
    python experiments/tables/equal_copying.py runs/evaluate/tables/table1.json runs/evaluate/along

A row that stands in several files, made in different ways, has a point in each: its copying, the mean of pose and
backdrop, and its likeness under changed prompts. Between two neighbours the likeness is read off a straight line, at
the copying of `hyper_40`; beyond the last point it is that of the last. Intervals are over people, all of whom count at
every point. Prints a table, and writes equal_copying.json beside this file (or out=FILE).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperdb.report.results import check_alike, load
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_json

HERE = Path(__file__).parent
OURS, LIKENESS, COPYING = "hyper_40", "cosine_changed", ("copy_pose", "copy_background")
DRAWS = 10_000
Point = tuple[NDArray[np.float64], NDArray[np.float64]]  # copying and likeness of each person, `[I]`


def point(values: dict[str, Any]) -> Point | None:
    """Return a row's copying and likeness, the mean over seeds; None where it was not asked for them."""
    if not {LIKENESS, *COPYING} <= values.keys():
        return None
    copying = np.mean([np.mean(values[figure], 0) for figure in COPYING], 0)
    return copying, np.mean(values[LIKENESS], 0)


def at_equal_copying(points: list[Point], ours: Point, seed: int = 0) -> dict[str, Any]:
    """Return the likeness of a method at the copying of ours, and ours minus it with its 95 % interval."""
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
        "people": count, "points": len(points), "copying": float(whole[-1, 0]), "likeness": read(whole),
        "within": bool(whole[:-1, 0].min() <= whole[-1, 0] <= whole[:-1, 0].max()),
        "ours": float(whole[-1, 1]), "mean": float(whole[-1, 1]) - read(whole), "lo": float(low), "hi": float(high),
    }  # fmt: skip


def compare(every: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {row: its comparison} of every row that learns from the photo.

    Raises `UserError` for results of several people, bases, recipes or judges, and for two ways to make ours.
    """
    check_alike(every)
    points: dict[str, dict[str, Point]] = {}  # of each row, by how it was made
    for results in every:
        for row, values in results.get("values", {}).items():
            if results["rows"][row].get("steps") and (found := point(values)) is not None:
                made = json.dumps(results.get("methods", {}).get(row), sort_keys=True)
                points.setdefault(row, {})[made] = found
    ours = list(points.pop(OURS, {}).values())
    if len(ours) != 1:
        which = "none" if not ours else "several"
        raise UserError(f"{which} of the rows {OURS} with {', '.join((LIKENESS, *COPYING))}: name results with one")
    return {row: at_equal_copying(list(found.values()), ours[0]) for row, found in points.items()}


def table(compared: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = [f"| row | points | people | likeness at the copying of `{OURS}` | `{OURS}` − it |", "|" + " --- |" * 5]
    for row, one in compared.items():
        likeness = f"{one['likeness']:.3f}{'' if one['within'] else ' (of the point next to it)'}"
        cells = [f"`{row}`", str(one["points"]), str(one["people"]), likeness,
                 f"{one['mean']:+.3f} [{one['lo']:+.3f}, {one['hi']:+.3f}]"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Read the results, compare, print and write."""
    out = next((word.removeprefix("out=") for word in words if word.startswith("out=")), "")
    named = [Path(word) for word in words if not word.startswith("out=")]
    files = [file for path in named for file in (sorted(path.rglob("results.json")) if path.is_dir() else [path])]
    if not files:
        raise UserError("name results files of `hyperdb evaluate`, or folders of them")
    every = [load(file) for file in files]
    compared = compare(every)
    told = {key: every[0].get(key) for key in ("base", "data", "people", "seeds", "commit", "dirty")}
    print(table(compared))
    print(f"in {save_json(out or HERE / 'equal_copying.json', {'compared': compared, **told})}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
