"""The paper's orders of rows beside ours."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json

TABLES = Path(__file__).parents[2] / "experiments" / "tables"
orders = runpy.run_path(str(TABLES / "orders.py"))


def results(**rows):
    values = {row: {"cosine_changed": [list(people)]} for row, people in rows.items()}
    return {"values": values, "base": "b", "data": "d", "persons": [1, 2, 3, 4], "judges": {}}


def test_an_order_is_the_papers_the_other_or_not_seen():
    one = results(hyper_40=(0.7, 0.8, 0.7, 0.9), dreambooth=(0.6, 0.7, 0.6, 0.7), hyper_only=(0.8, 0.7, 0.8, 0.8))
    other = results(hyper_40=(0.7, 0.8, 0.7, 0.9), no_hyper_40=(0.8, 0.9, 0.75, 0.95))
    few = results(dreambooth=(0.6, 0.7, 0.6, 0.7), dreambooth_agg_1=(0.5, 0.6))
    found = orders["compare"]([one, other, few], load_json(TABLES / "paper.json"))
    told = {"-".join(line["rows"]): line for line in found}
    assert {name: (line["order"], line["people"]) for name, line in told.items()} == {
        "hyper_40-dreambooth": ("as in the paper", 4),
        "hyper_40-dreambooth_agg_1": ("as in the paper", 2),
        "dreambooth-dreambooth_agg_1": ("as in the paper", 2),
        "hyper_40-hyper_only": ("not seen", 4),
        "hyper_40-no_hyper_40": ("the other way", 4),
        "hyper_only-no_hyper_40": ("not seen", 4),  # each table's rows all with each other, and with no others
    }
    assert told["hyper_40-dreambooth"]["paper"] == 0.037
    assert told["hyper_40-dreambooth"]["mean"] == pytest.approx(0.125)
    assert {line["figure"] for line in found} == {"Face Rec."}
    lines = orders["table"](found).splitlines()
    assert lines[2].startswith("| `hyper_40` − `dreambooth` | Face Rec. | +0.037 | +0.125 [")


def test_a_figure_of_pictures_is_that_of_all_prompts():
    one = results(hyper_40=(0.7, 0.8), dreambooth=(0.6, 0.7))
    for row, styled in (("hyper_40", 0.5), ("dreambooth", 0.1)):
        one["values"][row] |= {"clip_t_changed": [[0.3, 0.3]], "clip_t_styled": [[styled, styled]]}
        one["values"][row]["cosine_styled"] = [[0.0, 0.0]]  # a drawing is out of its domain
    found = {line["figure"]: line["mean"] for line in orders["compare"]([one], load_json(TABLES / "paper.json"))}
    assert found == {"Face Rec.": pytest.approx(0.1), "CLIP-T": pytest.approx(0.2)}


def test_results_of_other_people_are_refused():
    one, other = results(hyper_40=(0.7, 0.8)), results(dreambooth=(0.6, 0.7)) | {"persons": [5, 6, 7, 8]}
    with pytest.raises(UserError, match="differ in persons"):
        orders["compare"]([one, other], load_json(TABLES / "paper.json"))


def test_the_tables_shown_are_the_papers():
    """Every figure of paper.json stands in the tables of the README beside it, those of Table 3 in the first README."""
    text = (TABLES / "README.md").read_text()
    rows = load_json(TABLES / "paper.json")["rows"]
    lines = {row: f"| {' | '.join(f'{x:.3f}'.lstrip('0') for x in figures)} |" for row, figures in rows.items()}
    for line in lines.values():
        assert line in text
    for row in ("hyper_40", "no_hyper_40", "hyper_only", "hyper_40_k1"):
        assert lines[row] in (TABLES.parents[1] / "README.md").read_text()


def test_the_table_of_the_orders_is_its_file():
    found = load_json(TABLES / "orders.json")["compared"]
    assert orders["table"](found) in (TABLES / "README.md").read_text()
