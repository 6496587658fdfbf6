"""The order of any two rows of one of the paper's tables, and in ours: figures of two bases compare in no other way.

    python experiments/tables/orders.py runs/evaluate/tables/table1.json runs/evaluate/tables/table2.json ...

Prints a table, and writes orders.json beside this file (or out=FILE). The paper's figures are in paper.json. Ours are
those of all prompts, a person's mean of changed ones and of styles, which are as many; but Face Rec., SFace's and
dlib's, is of the changed ones alone, for no recogniser of photos judges a drawing. Of each pair the people whom both
rows have, and the 95 % interval of their difference. "not seen" is an interval that holds 0: so many people cannot
tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hyperdb.metrics.figures import differences
from hyperdb.report.results import check_alike, load
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import load_json, save_json

HERE = Path(__file__).parent
OURS = {  # the paper's figure: ours under changed prompts, of which the first that is known stands for it
    "Face Rec.": ("cosine_changed",),
    "Face Rec. by dlib": ("cosine_changed_dlib",),
    "DINO": ("dino_changed", "vicreg_changed, vicreg_styled", "vicreg_changed"),
    "CLIP-I": ("clip_i_changed, clip_i_styled", "clip_i_changed"),
    "CLIP-T": ("clip_t_changed, clip_t_styled", "clip_t_changed"),
}
CHANGED, STYLED = "_changed", "_styled"


def _of_all(scores: dict[str, Any]) -> dict[str, Any]:
    """Return a row's figures, those of changed prompts as the mean with those of styles where it has both."""
    others = {name: scores.get(name.removesuffix(CHANGED) + STYLED) for name in scores if name.endswith(CHANGED)}
    others.pop("cosine_changed", None)
    both = {f"{name}, {name.removesuffix(CHANGED)}{STYLED}": (scores[name] + other) / 2
            for name, other in others.items() if other is not None}  # fmt: skip
    return scores | both


def compare(every: list[dict[str, Any]], paper: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each pair of rows and figure the paper's difference, ours with its interval, and whether they agree.

    Raises `UserError` for results of several people, bases, recipes or judges.
    """
    check_alike(every)
    methods: dict[str, Any] = {}
    for row, how in (pair for results in every for pair in results.get("methods", {}).items()):
        if methods.setdefault(row, how) != how:
            raise UserError(f"the results differ in how {row} was made: name those of one evaluation")
    values = {row: found for results in every for row, found in results["values"].items()}
    scores = {row: _of_all({k: np.array(v, float).T for k, v in found.items()}) for row, found in values.items()}
    known = {figure for score in scores.values() for figure in score}
    compared = []
    for one, other in dict.fromkeys(pair for rows in paper["tables"] for pair in combinations(rows, 2)):
        for figure in OURS:
            column = paper["figures"].index(figure.removesuffix(" by dlib"))
            ours = next((name for name in OURS[figure] if name in known), None)
            found = differences(scores, {one: [other]}, ours, 0) if ours is not None else {}
            if ours is None or (difference := found.get(f"{one}-{other}")) is None:
                continue
            theirs = round(paper["rows"][one][column] - paper["rows"][other][column], 3)
            seen = difference["lo"] > 0 or difference["hi"] < 0
            agrees = ("as in the paper" if difference["mean"] * theirs > 0 else "the other way") if seen else "not seen"
            compared.append({"rows": [one, other], "figure": figure, "by": ours, "paper": theirs, "order": agrees,
                             "people": min(len(scores[row][ours]) for row in (one, other)), **difference})  # fmt: skip
    return compared


def table(compared: Iterable[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = ["| rows | figure | paper | ours | people | order |", "| --- | --- | --- | --- | --- | --- |"]
    for one in compared:
        ours = f"{one['mean']:+.3f} [{one['lo']:+.3f}, {one['hi']:+.3f}] ({one['by']})"
        rows = " − ".join(f"`{row}`" for row in one["rows"])
        cells = [rows, one["figure"], f"{one['paper']:+.3f}", ours, str(one["people"]), one["order"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Read the results, compare, print and write."""
    out = next((word.removeprefix("out=") for word in words if word.startswith("out=")), str(HERE / "orders.json"))
    files = [word for word in words if not word.startswith("out=")]
    if not files:
        raise UserError("name one or several results files of experiment=table1, table2 and table3")
    every = [load(Path(file)) for file in files]
    compared = compare(every, load_json(HERE / "paper.json"))
    if not compared:
        raise UserError("these results hold no two rows that the paper compares")
    told = {key: every[0].get(key) for key in ("base", "hypernet", "data", "people", "seeds", "commit", "dirty")}
    print(table(compared))
    print(", ".join(f"{count} {order}" for order, count in Counter(one["order"] for one in compared).items()))
    print(f"in {save_json(out, {'compared': compared, **told})}")


if __name__ == "__main__":
    run_script(main)
