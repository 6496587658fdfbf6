"""A row minus every other of the same people, person by person.

    python experiments/tables/against.py experiments/tables/table1.json experiments/tables/methods/foura.json

The files are results of `hyperdb evaluate` of the same people, prompts and judges. A difference is of the people whom
both rows have, with its 95 % interval over them. Prints the table, and writes against.json beside this file. Other
words: `ours=ROW` (hyper_40), `figures=A,B` (the likeness by both recognisers, who it is in the style, styles, places
and what is copied), `out=FILE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hyperdb.metrics.figures import differences
from hyperdb.report.results import joined
from hyperdb.report.table import markdown
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import save_json

FIGURES = (
    "cosine_changed,cosine_changed_dlib,rank1_styled_verifier,style_accuracy,place_accuracy,copy_pose,copy_background"
)
WORDS = {"ours": "hyper_40", "figures": FIGURES, "out": str(Path(__file__).with_name("against.json"))}


def compare(files: list[Path], ours: str, figures: list[str]) -> dict[str, Any]:
    """Return the rows of the files and the differences of one row and each other, as `hyperdb evaluate` tells them.

    Raises `UserError` for files that do not belong together, and for a row or a figure that none of them has.
    """
    found = joined(files)
    scores = {row: {name: np.array(seeds, float).T for name, seeds in values.items()}
              for row, values in found.pop("values").items()}  # fmt: skip
    if ours not in scores:
        raise UserError(f"ours={ours}: expected of {', '.join(scores)}")
    if odd := [name for name in figures if not any(name in score for score in scores.values())]:
        raise UserError(f"figures={odd[0]}: no row has it")
    against = {ours: [row for row in scores if row != ours]}
    paired = {figure: differences(scores, against, figure, 0) for figure in ("cosine", *figures)}
    return found | {"paired": paired.pop("cosine"), "paired_further": paired}


def main(words: list[str]) -> None:
    """Read the results, compare, print and write."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if odd := sorted(given.keys() - WORDS.keys()):
        raise UserError(f"{odd[0]}: expected of {', '.join(WORDS)}")
    files = [Path(word) for word in words if "=" not in word]
    if not files:
        raise UserError("name one or several results files of `hyperdb evaluate`")
    given = WORDS | given
    found = compare(files, given["ours"], given["figures"].split(","))
    print(markdown(found, only=given["figures"].split(",")).partition("\n\n")[2])
    counts = {row: figures["people"] for row, figures in found["rows"].items()}
    told = {"people": found["people"], "seeds": found["seeds"], "rows": counts}
    print(f"in {save_json(given['out'], told | {key: found[key] for key in ('paired', 'paired_further')})}")


if __name__ == "__main__":
    run_script(main)
