"""Results that differ in one setting are one table and one picture over its values."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperdb.report.plot import draw_over
from hyperdb.report.sweep import axis, merged, own_axis
from hyperdb.report.table import markdown
from hyperdb.runtime.errors import UserError


def result(cosine=0.5, methods=None, **settings):
    told = {"label": f"LoRA, {settings.get('steps', 0)} steps", "people": 9}
    rows = {"lora": {**told, "cosine": {"mean": cosine, "lo": cosine - 0.1, "hi": cosine + 0.1}}}
    return {"rows": rows, "paired": {}, "people": 9, "settings": settings, "methods": methods or {}}


def found(*results):
    return axis({str(i): one for i, one in enumerate(results)})


def test_the_setting_in_which_results_differ():
    along = found(result(finetune={"steps": 20, "noise": [0, 1]}), result(finetune={"steps": 5, "noise": [0, 1]}))
    assert (along.setting, along.values, along.is_number, along.order()) == ("finetune.steps", [20, 5], True, [1, 0])
    noise = found(*(result(noise=levels) for levels in ([0, 1], [0, 0.5])))
    assert (noise.setting, noise.is_number, noise.order(), noise.text(1)) == ("noise", False, [0, 1], "[0, 0.5]")
    prompts = found(*(result(changed=[text] * 4) for text in ("a [V] face", "a photo of a [V] face")))
    assert prompts.text(1) == "a photo of a [V] face"
    null = found(result(weight=None), result(weight=0.5))
    assert (null.values, null.is_number, null.text(0)) == ([None, 0.5], False, "null")
    assert found(result(weight=5.0), result(weight=None), result(weight=3.0)).order() == [1, 2, 0]


def test_what_follows_from_a_setting_counts_as_one_with_it():
    rows = ({"lora": {"finetune": {"rate": rate}, "start": None}} for rate in (1e-3, 1e-2))
    alike = found(*(result(methods=one, rate=rate) for one, rate in zip(rows, (1e-3, 1e-2), strict=True)))
    assert alike.setting == "rate"
    alone = found(*(result(methods={"lora": {"finetune": {"rate": rate}}}) for rate in (1e-3, 1e-2)))
    assert (alone.setting, alone.values) == ("methods.lora.finetune.rate", [1e-3, 1e-2])


def test_a_row_that_names_no_strength_was_drawn_as_trained():
    along = found(*(result(methods={"lora": how}) for how in ({"strength": 0.5}, {"start": None}, {"strength": 0.0})))
    assert (along.setting, along.values) == ("methods.lora.strength", [0.5, 1.0, 0.0])


def test_a_row_that_only_some_of_the_results_have_is_no_setting():
    how = {"finetune": {"steps": 5}}
    more = result(a=2, methods={"lora": how, "floor": {"start": None}})
    assert found(result(a=1, methods={"lora": how}), more).setting == "a"
    assert found(result(methods={"lora": how}), result(methods={"lora": how, "copy": {}})) is None


def test_a_row_is_followed_along_the_number_of_its_own_method():
    """Beside rows that stay as they are, and files that do not have it: so several methods' sweeps are one picture."""
    steps = (40, 5, 160)
    named = {str(n): result(methods={"lora": {"finetune": {"steps": n}}, "floor": {"start": None}}) for n in steps}
    for one in named.values():
        one["rows"]["floor"] = one["rows"]["lora"]
    other = result(methods={"svdiff": {"finetune": {"steps": 7}}})
    named["b"] = {**other, "rows": {"svdiff": other["rows"]["lora"]}}
    titles, along = own_axis(named, "lora")
    assert titles == ["5", "40", "160"]
    assert (along.setting, along.values) == ("methods.lora.finetune.steps", [5, 40, 160])
    assert own_axis(named, "floor") is own_axis(named, "svdiff") is None
    assert own_axis({**named, "again": named["40"]}, "lora") == (titles, along)  # a second table with the same row
    named["b"] = {**named["5"], "settings": {"people": 3}}  # of others: no further point of the line
    assert own_axis(named, "lora") is None


@pytest.mark.parametrize(
    "results",
    [
        [result(a=1, b=1), result(a=2, b=3)],  # two settings
        [result(a=1), result(a=1)],  # none
        [result(a=1), result(a=2), result(a=1)],  # a value twice
        [result(a=1), {**result(a=2), "settings": {}}, {"rows": {}, "people": 3}],  # no settings: an older file
        [{**result(a=1), "base": "b"}, {**result(a=2), "base": "c"}],  # another base, other data
        [{**result(a=1), "data": "b"}, {**result(a=2), "data": "c"}],
    ],
)
def test_results_that_do_not_differ_in_one_setting(results):
    assert found(*results) is None


@pytest.mark.parametrize("other", [{"recognisers": ["dlib"]}, {"judges": {"clip": "b"}}, {"hypernet": {"digest": "b"}}])
def test_other_judges_or_another_hypernetwork_are_no_value_of_a_setting(other):
    same = {"recognisers": ["sface"], "judges": {"clip": "a"}, "hypernet": {"digest": "a"}}
    assert found({**result(steps=5), **same}, {**result(steps=40), **same}).setting == "steps"
    assert found({**result(steps=5), **same}, {**result(steps=40), **same, **other}) is None
    trained = ({**result(hypernet={"beta": beta}), "hypernet": {"digest": str(beta)}} for beta in (0, 1))
    assert found(*trained).setting == "hypernet.beta"


def test_the_table_has_the_values_of_a_row_below_each_other():
    named = {"b": result(0.75, steps=20), "a": result(0.5, steps=5)}
    named["b"]["rows"]["floor"] = {"cosine": named["b"]["rows"]["lora"]["cosine"]}
    lines = markdown(merged(named, axis(named)), brief=False).splitlines()
    assert lines[2:] == [
        "| LoRA, 5 steps; steps 5 | 0.500 [0.400, 0.600] | 9 |",
        "| LoRA, 20 steps; steps 20 | 0.750 [0.650, 0.850] | 9 |",
        "| floor; steps 20 | 0.750 [0.650, 0.850] | — |",
        "",
        "n = 9 people, 1 seed; in brackets: 95 % intervals over people",
    ]


def test_the_picture_is_the_same_again_and_differs_with_the_figures(tmp_path):
    """Of numbers, of other values, and of a label in which `$` means nothing."""
    for values in ([5, 20, 160], [None, "a$_b", [0.0, 0.5]]):
        named = {str(i): result(0.1 * i, value=value) for i, value in enumerate(values)}
        other = {name: result(0.9, value=value) for name, value in zip(named, values, strict=True)}
        drawn = []
        for i, one in enumerate((named, named, other)):
            with Image.open(draw_over(tmp_path / f"{i}.png", axis(one), one)) as image:
                drawn.append(np.array(image.convert("RGB")))
        assert np.array_equal(drawn[0], drawn[1])
        assert drawn[0].shape != drawn[2].shape or not np.array_equal(drawn[0], drawn[2])


def test_the_rate_is_the_likest_under_changed_prompts_of_those_that_obey(tmp_path):
    sweeps = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "tables" / "sweeps.py"))
    choose = sweeps["choose"]
    told = {"split": "validation", "seeds": 1, "base": "b", "data": "d", "hypernet": {}, "commit": "c", "dirty": None}

    floor = result() | told
    floor["rows"]["floor"] = {"place_accuracy": {"mean": 1.0}, "style_accuracy": {"mean": 1.0}}

    def write(rate, changed, place, style, hypernet="h"):
        one = result(methods={"lora": {"finetune": {"rate": rate}, "hypernet": hypernet}}) | told
        for figure, value in (("cosine_changed", changed), ("place_accuracy", place), ("style_accuracy", style)):
            one["rows"]["lora"][figure] = {"mean": value, "lo": value, "hi": value}
        (tmp_path / "sweep" / f"rate={rate}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweep" / f"rate={rate}" / "results.json").write_text(json.dumps(one))

    write(1e-3, 0.8, 0.95, 0.5)  # another style
    for rate, changed, place in ((3e-3, 0.9, 0.1), (1e-5, 0.4, 1.0), (1e-4, 0.5, 0.72), (3e-4, 0.6, 0.68)):
        write(rate, changed, place, 0.9)
    found = choose("lora", tmp_path / "sweep", floor)
    assert (found["rate"], found["at_an_end"]) == (1e-4, False)  # .003 repeats the photo
    assert [one["rate"] for one in found["rates"]] == [1e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert found["chosen_by"]["obedience"] == ("place_accuracy", "style_accuracy")
    assert (found["chosen_by"]["of_the_base"], found["chosen_by"]["obeyed"]) == (1.0, 0.8)
    line = sweeps["table"]([found]).splitlines()[2]
    assert line.startswith("| `lora` | 1e-05: 0.400; 1.00, 0.90 | **0.0001: 0.500; 0.72, 0.90** | ")
    write(1e-5, 0.4, 1.0, 0.9, hypernet="former")
    with pytest.raises(UserError, match="holds results of several hypernetworks"):
        choose("lora", tmp_path / "sweep", floor)
    write(1e-5, 0.6, 1.0, 0.9)
    assert choose("lora", tmp_path / "sweep", floor)["at_an_end"]
    for told in ({"persons": [1]}, {"changed": ["a [V] face in the rain"]}):
        with pytest.raises(UserError, match="the row floor is of another base, or of other people or prompts"):
            choose("lora", tmp_path / "sweep", floor | told)
    (tmp_path / "sweep" / "rate=1e-05" / "results.json").unlink()
    with pytest.raises(UserError, match="holds 4 rates of 5"):
        choose("lora", tmp_path / "sweep", floor)
    for method, folder in (("svdiff", "sweep"), ("lora", "none")):
        with pytest.raises(UserError, match=f"holds no sweep; run .*experiment=sweep/{method}"):
            choose(method, tmp_path / folder, floor)


def test_an_ablation_is_compared_with_the_value_that_ships_person_by_person(tmp_path):
    ablations = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "tables" / "ablations.py"))
    told = dict.fromkeys(("split", "seeds", "persons", "styled", "changed", "recognisers", "base", "data"), 1)
    told |= {"commit": "c", "dirty": False}
    values = {2: [0.5, 0.3], 4: [0.7, 0.4], 8: [0.6, 0.4]}
    for rank, people in values.items():
        scores = {"lora": {"cosine_changed": [people]}, "floor": {"cosine_changed": [[0.1, 0.1]]}}
        one = result(relaxed={"rank": rank}) | told | {"values": scores}
        known = {"mean": 0.1, "lo": 0.1, "hi": 0.1}
        one["rows"]["floor"] = {"cosine_changed": known, "cosine": known}
        mean = sum(people) / 2
        one["rows"]["lora"]["cosine_changed"] = {"mean": mean, "lo": mean, "hi": mean}
        (tmp_path / f"rank={rank}").mkdir()
        (tmp_path / f"rank={rank}" / "results.json").write_text(json.dumps(one))
    found, named, along = ablations["gather"](tmp_path)
    assert (found["setting"], found["compared_with"], along.values, len(named)) == ("relaxed.rank", 4, [2, 4, 8], 3)
    against = [value["against"].get("lora", {}).get("cosine_changed", {}).get("mean") for value in found["values"]]
    assert against == [pytest.approx(-0.15), None, pytest.approx(-0.05)]
    assert [value["scores"]["lora"]["cosine_changed"] for value in found["values"]] == [[x] for x in values.values()]
    lines = ablations["table"](found).splitlines()
    assert lines[2].startswith("| 2 | `lora` | 0.400 | -0.150 [-0.200, -0.100] |")
    assert lines[3].startswith("| **4** | `lora` | 0.550 |  |")
    assert [line for line in lines if "floor" in line] == ["| every | `floor` | 0.100 |  |"]
    (tmp_path / "rank=2" / "results.json").unlink()
    (tmp_path / "rank=4" / "results.json").unlink()
    with pytest.raises(UserError, match="holds no results that differ in one setting alone"):
        ablations["gather"](tmp_path)


def test_trainings_of_several_seeds_are_one_result_of_each_value(tmp_path):
    ablations = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "tables" / "ablations.py"))
    told = dict.fromkeys(("split", "persons", "styled", "changed", "recognisers", "base", "data"), 1)
    told |= {"commit": "c", "dirty": False, "seeds": 1}
    trained = {("any", 1): [0.5, 0.3], ("any", 0): [0.7, 0.5], ("same", 1): [0.6, 0.2], ("same", 0): [0.9, 0.5]}

    def write(style, seed, people):
        one = result(hypernet={"target_style": style, "seed": seed}) | told
        one |= {"hypernet": f"{style}{seed}", "values": {"hyper_only": {"cosine_changed": [people]}}}
        one["rows"] = {"hyper_only": {**one["rows"]["lora"], "cosine_changed": {"mean": 0.0, "lo": 0.0, "hi": 0.0}}}
        (tmp_path / f"{style}{seed}").mkdir(exist_ok=True)
        (tmp_path / f"{style}{seed}" / "results.json").write_text(json.dumps(one))

    for (style, seed), people in trained.items():
        write(style, seed, people)
    found, named, along = ablations["gather"](tmp_path)
    assert (found["setting"], along.values, len(named)) == ("hypernet.target_style", ["any", "same"], 2)
    assert (found["seeds"], found["trainings"], found["compared_with"]) == (2, [0, 1], "any")
    default, same = found["values"]
    assert default["scores"]["hyper_only"]["cosine_changed"] == [[0.7, 0.5], [0.5, 0.3]]  # the lowest seed first
    assert default["rows"]["hyper_only"]["cosine_changed"]["mean"] == pytest.approx(0.5)
    assert same["against"]["hyper_only"]["cosine_changed"]["mean"] == pytest.approx((0.2 + 0.0 + 0.1 - 0.1) / 4)
    write("same", 2, [0.1, 0.1])
    with pytest.raises(UserError, match=r"expected the same of each value, got \[\[0, 1\], \[0, 1, 2\]\]"):
        ablations["gather"](tmp_path)
    for style, seed in (("same", 0), ("same", 1), ("same", 2)):
        (tmp_path / f"{style}{seed}" / "results.json").unlink()
    found, _, along = ablations["gather"](tmp_path)  # seeds alone are a setting like any other
    assert (found["setting"], along.values, "trainings" in found) == ("hypernet.seed", [0, 1], False)
