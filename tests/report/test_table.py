"""Tables say what the results file says of its rows."""

from __future__ import annotations

from hyperdb.report.table import markdown


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


def test_what_a_row_was_not_asked_is_a_dash():
    rows = {"floor": row(label="base", cosine_changed={"mean": 0.4567}, style_accuracy={"mean": 0.987}),
            "copy": row(label="photo", cosine_changed={"mean": 0.8})}  # fmt: skip
    table = markdown({"rows": rows, "paired": {}}).splitlines()
    assert table[0] == "| embedded base | face cosine | rank-1 | face cosine, changed prompt | style obeyed |"
    assert table[2].endswith("| 0.25 | 0.457 | 0.99 |")
    assert table[3].endswith("| 0.25 | 0.800 | — |")
