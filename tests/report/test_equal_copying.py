"""The likeness of a method between its points, at the copying of ours."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperdb.runtime.errors import UserError

FILE = Path(__file__).parent.parent.parent / "experiments" / "tables" / "equal_copying.py"
module = runpy.run_path(str(FILE))
at_equal_copying, WORDS = module["at_equal_copying"], module["WORDS"]


def compare(every, **words):
    return module["compare"](every, **{**WORDS, **words})


def values(copying, likeness, seeds=1):
    pose, backdrop = [np.add(copying, 0.1).tolist()] * seeds, [np.subtract(copying, 0.1).tolist()] * seeds
    return {"copy_pose": pose, "copy_background": backdrop, "cosine_changed": [likeness] * seeds}


def results(**rows):
    interval = {"mean": 0.5, "lo": 0.4, "hi": 0.6}
    return {
        "rows": {row: {"cosine": interval, "steps": 40} for row in rows},
        "paired": {}, "people": 3, "base": "b", "data": "d", "persons": [1, 2, 3], "judges": {}, "values": rows,
    }  # fmt: skip


def test_a_likeness_is_read_off_the_line_between_two_points():
    ours = np.full(3, 0.3), np.array([0.8, 0.8, 0.8])
    points = [(np.full(3, 0.5), np.array([0.9, 0.9, 0.9])), (np.full(3, 0.1), np.array([0.5, 0.5, 0.5]))]
    found = at_equal_copying(points, ours)
    assert found["read"] == pytest.approx(0.7)
    assert (found["mean"], found["lo"], found["hi"]) == pytest.approx((0.1, 0.1, 0.1))
    assert found["within"]
    beyond = at_equal_copying(points[:1], ours)
    assert (beyond["read"], beyond["within"]) == (pytest.approx(0.9), False)


def test_rows_of_several_files_are_points_of_one_method_and_people_are_common(tmp_path, capsys):
    hyper, few = values([0.2] * 3, [0.7, 0.8, 0.9], 2), values([0.6] * 2, [0.8, 0.7])
    one = results(hyper_40=hyper, dreambooth=few, copy=hyper)
    one["rows"]["copy"]["steps"] = 0  # which learns nothing
    other = results(dreambooth=values([0.1] * 2, [0.3, 0.2]))
    one["methods"], other["methods"] = ({"dreambooth": {"steps": steps}} for steps in (1200, 100))
    other["values"]["hyper_40"], other["rows"]["hyper_40"] = hyper, one["rows"]["hyper_40"]  # made in the same way
    found = compare([one, other])
    assert set(found) == {"dreambooth"}
    assert (found["dreambooth"]["points"], found["dreambooth"]["people"]) == (2, 2)
    assert found["dreambooth"]["read"] == pytest.approx(0.25 + 0.5 / 5)
    assert found["dreambooth"]["ours"] == pytest.approx(0.75)
    for name, told in (("one", one), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    files = [str(tmp_path / "one.json"), str(tmp_path / "other.json")]
    module["main"]([*files, f"out={tmp_path / 'found.json'}", "read=cosine_changed,copying"])
    said = capsys.readouterr().out
    assert "| row | points | people | face cosine, changed prompt at the copying of `hyper_40` |" in said
    assert "| `dreambooth` | 2 | 2 | 0.350 | +0.400 [" in said
    read = json.loads((tmp_path / "found.json").read_text())["compared"]
    assert read["cosine_changed"] == json.loads(json.dumps(found))
    assert read["copying"]["dreambooth"]["mean"] == pytest.approx(0)
    with pytest.raises(UserError, match="read=likeness: expected figures of results"):
        module["main"]([*files, "read=likeness"])
    with pytest.raises(UserError, match="the results differ in persons"):
        compare([one, {**other, "persons": [4, 5, 6]}])
    with pytest.raises(UserError, match="the results differ in settings"):
        compare([one, {**other, "made_from": "photos that others judge"}])
    told = {"images": 4, "batch": 5, "finetune": {"steps": 40}}
    one, other = one | {"settings": told}, other | {"settings": told | {"batch": 9}}  # which decides nothing
    assert compare([one, {**other, "made_from": "data under another name"}]) == found
    with pytest.raises(UserError, match="the results differ in settings"):
        compare([one, {**other, "settings": told | {"images": 8}}])
    with pytest.raises(UserError, match="several of the rows hyper_40"):
        compare([one, {**other, "methods": {"hyper_40": {"steps": 80}}}])
    with pytest.raises(UserError, match="none of the rows hyper_40"):
        compare([{key: value for key, value in one.items() if key != "values"}])


def test_rows_that_differ_in_iterations_and_rate_alone_are_one():
    """DreamBooth's three rows of Table 2 are one way to personalise; a row of another adapter is another."""
    one = results(hyper_40=values([0.3] * 3, [0.9] * 3), dreambooth=values([0.4] * 3, [0.8] * 3),
                  dreambooth_agg_2=values([0.2] * 3, [0.6] * 3), lora=values([0.1] * 3, [0.5] * 3))  # fmt: skip
    told = [("dreambooth", "full", 1200, 12), ("dreambooth_agg_2", "full", 40, None), ("lora", "lora", 1200, 12)]
    one["methods"] = {
        row: {"adapter": {"kind": kind}, "finetune": {"steps": steps, "rate": 1 / steps}, "people": people}
        for row, kind, steps, people in told
    }
    found = compare([one])
    assert {row: x["points"] for row, x in found.items()} == {"dreambooth": 2, "lora": 1}
    assert found["dreambooth"]["read"] == pytest.approx(0.7)


def test_other_figures_and_rows_compare_as_well():
    """How far each copies where both are as like: the line of LoRA's two points at FouRA's likeness."""
    lora = [results(lora=values([copying] * 3, [likeness] * 3)) for copying, likeness in ((0.2, 0.5), (0.6, 0.9))]
    for rate, one in enumerate(lora):
        one["methods"] = {"lora": {"rate": rate}}
    foura = results(foura=values([0.3] * 3, [0.8] * 3))
    found = compare([*lora, foura], ours="foura", at="cosine_changed", read="copying")["lora"]
    assert (found["at"], found["read"], found["mean"]) == pytest.approx((0.8, 0.5, -0.2))


def test_what_begins_at_nothing_is_the_base_at_first():
    one = results(hyper_40=values([0.2] * 3, [0.7] * 3), floor=values([0.0] * 3, [0.4] * 3),
                  dreambooth=values([0.8] * 3, [0.8] * 3), mean_40=values([0.8] * 3, [0.8] * 3))  # fmt: skip
    one["rows"]["floor"]["steps"] = 0
    one["methods"] = {"hyper_40": {"start": "own"}, "dreambooth": {"start": None}, "mean_40": {"start": "average"}}
    found = compare([one])
    assert (found["dreambooth"]["points"], found["dreambooth"]["read"]) == (2, pytest.approx(0.5))
    assert (found["mean_40"]["points"], found["mean_40"]["read"]) == (1, pytest.approx(0.8))
    one["methods"]["mean_40"] = {"start": None, "encoder": "0123"}  # which says where it begins
    assert compare([one])["mean_40"]["points"] == 1
    assert compare([one], ours="dreambooth").keys() == {"hyper_40", "mean_40"}


def test_what_it_is_not_given_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(FILE)])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(FILE), run_name="__main__")
    assert "name results files" in capsys.readouterr().err


def test_the_table_of_the_tables_is_its_file():
    found = json.loads((FILE.parent / "equal_copying.json").read_text())
    shown = module["table"](found["compared"], found["ours"], found["at"])
    assert shown in (FILE.parent / "README.md").read_text()
