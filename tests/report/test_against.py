"""Differences of one row and every other, person by person, from several results files."""

import runpy
from pathlib import Path

import pytest

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, save_json

FILE = Path(__file__).parents[2] / "experiments" / "tables" / "against.py"
MAIN = runpy.run_path(str(FILE))["main"]


def results(path, **rows):
    """Write results of one seed; the rows' values are a number a person."""
    values = {row: {"cosine": [found], "cosine_changed": [found]} for row, found in rows.items()}
    figures = {row: {"label": row, "people": len(found)} for row, found in rows.items()}
    for row, found in rows.items():
        mean = {"mean": sum(found) / len(found), "lo": min(found), "hi": max(found)}
        figures[row] |= {"cosine": mean, "cosine_changed": mean}
    people = max(map(len, rows.values()))
    told = {"people": people, "seeds": 1, "paired": {}, "persons": list(range(people)), "data": "d"}
    return str(save_json(path, {"rows": figures, "values": values, **told}))


def test_a_difference_is_of_the_people_whom_both_have(tmp_path, capsys):
    one = results(tmp_path / "one.json", hyper_40=[0.9, 0.8, 0.1], lora=[0.5, 0.5, 0.5])
    two = results(tmp_path / "two.json", foura=[0.7, 0.7])
    MAIN([one, two, "figures=cosine_changed", f"out={tmp_path / 'a.json'}"])
    found = load_json(tmp_path / "a.json")
    assert found["rows"] == {"hyper_40": 3, "lora": 3, "foura": 2}
    assert found["paired"]["hyper_40-lora"]["mean"] == pytest.approx(0.1)
    assert found["paired_further"]["cosine_changed"]["hyper_40-foura"]["mean"] == pytest.approx(0.15)
    assert "| hyper_40 − foura | 0.150 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [("ours=x", "ours=x: expected of lora"), ("figures=x", "figures=x: no row has it"), ("a=b", "a: expected")],
)
def test_what_is_not_there_is_named(word, message, tmp_path):
    one = results(tmp_path / "one.json", lora=[0.5])
    with pytest.raises(UserError, match=message):
        MAIN([one, "ours=lora", word, f"out={tmp_path / 'a.json'}"])
