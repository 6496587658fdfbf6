"""Tables say what the results file says of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperdb.report.table import EARLIER, labels, markdown
from hyperdb.runtime.files import load_json

EMBEDDED = Path(__file__).parents[2] / "experiments" / "embedded"


def row(**told):
    return {"cosine": {"mean": 0.5, "lo": 0.4, "hi": 0.6}, "rank1": 0.25, **told}


def test_rows_stand_in_the_files_order_with_the_files_labels():
    rows = {"svdiff": row(label="SVDiff, 7 iterations"), "hyper_40": row(label="hypernetwork + 5 iterations")}
    table = markdown({"rows": rows, "paired": {"svdiff-hyper_40": rows["svdiff"]["cosine"]}}).splitlines()
    assert table[2:4] == [
        "| SVDiff, 7 iterations | 0.500 [0.400, 0.600] | 0.25 |",
        "| hypernetwork + 5 iterations | 0.500 [0.400, 0.600] | 0.25 |",
    ]
    assert table[-1] == "| SVDiff, 7 iterations − hypernetwork + 5 iterations | 0.500 [0.400, 0.600] |"


@pytest.mark.parametrize(("file", "steps"), [("results", 40), ("after_5", 5), ("after_20", 20)])
def test_a_file_without_labels_gets_the_iterations_of_its_fits(file, steps):
    found = labels(load_json(EMBEDDED / "likeness" / f"{file}.json"))
    assert found["hyper_40"] == f"hypernetwork + {steps} iterations"
    assert all("40" not in label for label in found.values()) or steps == 40
    assert list(found) == [name for name in EARLIER if name in found]
