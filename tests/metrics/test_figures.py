"""The figures of an evaluation, on pictures and scores whose figures are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hyperdb.metrics.figures import Standard, closed, differences, slices, summary


class Mean:
    """A recogniser that sees a picture's mean colour; a black one has no face."""

    name, dim = "mean", 3

    def __call__(self, images):
        colour = images.float().mean((2, 3))
        found = torch.nn.functional.normalize(colour, dim=-1)
        return torch.where(colour.sum(1, keepdim=True) > 0, found, torch.nan)


class Second(Mean):
    name = "second"


class Word:
    """A judge of styles to whom every picture is a sketch."""

    words = {"style": ("photo", "sketch", "cartoon"), "place": ("plain", "beach", "snow")}  # noqa: RUF012

    def __call__(self, images):
        """A picture with blue in it is of the snow, any other of the beach."""
        blue = images[:, 2].amax((1, 2)) > 0
        return {"style": torch.ones(len(images), dtype=torch.long), "place": 1 + blue.long()}


def colours(*people):
    """Return pictures `[I, K, 3, 64, 64]` of one colour each, its letter: r, g, b, or k for black."""
    known = {"r": (200, 0, 0), "g": (0, 200, 0), "b": (0, 0, 200), "k": (0, 0, 0)}
    pixels = torch.tensor([[known[c] for c in person] for person in people], dtype=torch.uint8)
    return pixels[..., None, None].expand(*pixels.shape, 64, 64)


@pytest.fixture
def standard():
    """Two people, a red and a green one, who are blue and red in sketches and cartoons."""
    styled = {"sketch": colours("b", "r"), "cartoon": colours("b", "r")}
    views = colours("rr", "gg")
    return Standard([Mean(), Second()], Word(), views[:, :1], views, ["sketch", "cartoon"], styled)


def test_pictures_are_measured_person_by_person(standard):
    rows = standard.measure({"own": colours("rrbb", "ggrr"), "poor": colours("rgbk", "kkkr")})
    assert rows["own"]["cosine"].tolist() == pytest.approx([1, 1])
    assert rows["own"]["rank1"].tolist() == rows["own"]["rank1_styled"].tolist() == [1, 1]
    poor = rows["poor"]
    assert poor["cosine"].tolist() == pytest.approx([0.5, 0])  # of red and green; black has no face and counts 0
    assert poor["rank1"].tolist() == [0.5, 0]
    assert poor["rank1_styled"].tolist() == [0.5, 0.5]
    assert poor["detected"].tolist() == [1, 0]
    assert poor["detected_styled"].tolist() == [0.5, 0.5]
    assert poor["style_accuracy"].tolist() == [0.5, 0.5]  # of a sketch and a cartoon
    assert all(torch.equal(poor[name], poor[f"{name}_second"]) for name in ("cosine", "rank1", "rank1_styled"))
    assert rows["own"]["diversity"].tolist() == [0, 0]
    assert poor["diversity"][0] > 0


def test_pictures_under_changed_prompts_are_judged_apart(standard):
    changed = replace(standard, changed=["beach", None, "snow"])
    found = changed.measure({"row": colours("rrrkgbb", "ggrgbgg")})["row"]  # 2 plain, 3 changed, 2 styled
    assert found["cosine"].tolist() == pytest.approx([1, 1])
    assert found["cosine_changed"].tolist() == pytest.approx([1 / 3, 1 / 3])  # of r k g, of r g b
    assert found["detected_changed"].tolist() == pytest.approx([2 / 3, 1])
    assert found["rank1_changed"].tolist()[0] == pytest.approx(1 / 3)
    assert found["place_accuracy"].tolist() == [0.5, 1]  # the one without a place is not asked for it
    assert found["rank1_styled"].tolist() == [1, 0]
    places = replace(standard, changed=[None, None])
    assert "place_accuracy" not in places.measure({"row": colours("rrrrbb", "ggggrr")})["row"]


def test_without_styles_nothing_is_asked_of_them(standard):
    alone = Standard([Mean()], None, standard.given, standard.views, [], {})
    found = alone.measure({"row": colours("rrrr", "gggg")})["row"]
    assert set(found) == {"cosine", "detected", "rank1", "copy_background", "copy_pose", "diversity"}


class Reads(Mean):
    """An encoder that sees the mean colour and knows the words for colours."""

    name = "reads"

    def words(self, texts):
        return torch.tensor([{"red": [1, 0, 0], "yellow": [0.6, 0.8, 0]}[text] for text in texts])


def test_encoders_judge_whole_pictures_under_all_prompts(standard):
    """By hand: cosines with a red and a green photo, and with the words, prompt by prompt."""
    views = colours("rg", "gg")
    texts = ["red", "red", "yellow", "red", "yellow"]  # 2 plain, 1 changed, 2 styled
    whole = replace(standard, views=views, changed=[None], encoders=[Mean(), Reads()], prompts=texts)
    found = whole.measure({"row": colours("rgbrr", "ggggr")})["row"]
    likeness = {"": [(0.5 + 0 + 0.5 + 0.5) / 4, (1 + 1 + 1 + 0) / 4], "_plain": [0.5, 1], "_changed": [0, 1],
                "_styled": [0.5, 0.5]}  # fmt: skip
    fidelity = {"": [(0.5 + 0 + 1 + 0.6) / 4, (0 + 0.8 + 0 + 0.6) / 4], "_plain": [0.5, 0], "_changed": [0, 0.8],
                "_styled": [0.8, 0.3]}  # fmt: skip
    for kind, values in likeness.items():
        assert found[f"mean{kind}"].tolist() == found[f"reads_i{kind}"].tolist() == pytest.approx(values)
        assert found[f"reads_t{kind}"].tolist() == pytest.approx(fidelity[kind])
    assert not {"mean_t", "mean_i", "reads"} & set(found)
    assert {name: values for name, values in found.items() if not name.startswith(("mean", "reads"))}.keys() == (
        replace(whole, encoders=[]).measure({"row": colours("rgbrr", "ggggr")})["row"].keys()
    )


def test_a_row_of_the_first_people_is_measured_as_in_a_row_of_all(standard):
    whole = replace(standard, changed=["beach"], encoders=[Mean(), Reads()], prompts=["red"] * 5)
    pictures = colours("rgbbr", "grbrb")
    found = whole.measure({"all": pictures, "one": pictures[:1]})
    assert found["one"].keys() == found["all"].keys()
    for name, values in found["one"].items():
        assert values.tolist() == found["all"][name][:1].tolist(), name
    assert found["one"]["rank1"].tolist() == [0.5]  # told from both: the green picture is the other person's


def test_identical_pictures_are_one(standard):
    whole = replace(standard, encoders=[Mean()])
    assert whole.measure({"row": colours("rrrr", "gggg")})["row"]["mean"].tolist() == pytest.approx([1, 1])


SCORES = {
    name: {"cosine": np.array(values), "rank1": np.array(values)}
    for name, values in {"floor": [[0.1], [0.3]], "best": [[0.9], [0.7]], "half": [[0.5], [0.5]]}.items()
}


def test_the_way_closed():
    assert closed(SCORES, "floor", "best") == {"half": 0.5}
    assert closed(SCORES, "best", "floor") == {}  # no way at all
    assert closed({"half": SCORES["half"]}, "floor", "best") == {}


def test_rows_are_compared_with_those_that_they_are_set_against():
    found = differences(SCORES, {"best": ["half", "gone"], "gone": ["floor"], "half": []}, "cosine", 0)
    assert list(found) == ["best-half"]
    assert found["best-half"]["mean"] == pytest.approx(0.3)


def test_rows_of_fewer_people_are_compared_with_those_people():
    few = {**SCORES, "few": {"cosine": np.array([[0.5]]), "rank1": np.array([[0.0]])}}
    found = differences(few, {"few": ["floor", "best"], "half": ["few"]}, "cosine", 0)
    assert {pair: value["mean"] for pair, value in found.items()} == pytest.approx(
        {"few-floor": 0.4, "few-best": -0.4, "half-few": 0.0}
    )
    assert closed(few, "floor", "best") == {"half": 0.5, "few": 0.5}  # of the first person: .1 to .9
    by_sex = slices([{"sex": "female"}, {"sex": "male"}], few)["sex"]
    assert (by_sex["female"]["few"], by_sex["female"]["few of"]) == (0.5, 1)
    assert not {"few", "few of", "floor of"} & by_sex["male"].keys()
    ends = {"floor": SCORES["floor"], "best": few["few"], "half": SCORES["half"]}
    assert closed(ends, "floor", "best") == {"half": 1.0}


def test_rates_are_summarised_by_their_mean_alone():
    found = summary(SCORES["floor"], 0)
    assert found["rank1"] == 0.2
    assert found["cosine"]["mean"] == pytest.approx(0.2)
    assert 0.1 <= found["cosine"]["lo"] < 0.2 < found["cosine"]["hi"] <= 0.3


def test_slices_are_of_the_people_who_have_the_attribute():
    found = slices([{"sex": "female"}, {"sex": "male"}], SCORES)
    assert found["sex"]["female"] == {"people": 1, "floor": 0.1, "best": 0.9, "half": 0.5}
    assert found["sex"]["male"] == {"people": 1, "floor": 0.3, "best": 0.7, "half": 0.5}
    assert slices([], SCORES) == {}
    changed = {row: {**score, "cosine_changed": score["cosine"] / 2} for row, score in SCORES.items()}
    assert slices([{"sex": "female"}, {"sex": "male"}], changed)["sex"]["male"]["floor"] == pytest.approx(0.15)
    part = SCORES | {"floor": changed["floor"]}  # not all rows have it
    assert slices([{"sex": "female"}, {"sex": "male"}], part)["sex"]["male"]["floor"] == pytest.approx(0.3)
