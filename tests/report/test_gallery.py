"""A gallery shows which person, prompt and row each picture is of, and only pictures of the results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hyperdb.report.gallery import LONGEST, MOST, SIDE, columns, draw_gallery
from hyperdb.report.sweep import axis
from hyperdb.runtime.errors import UserError

PLAIN, CHANGED, STYLED = 2, ["a photo of a [V] face, on the beach"], ["ink", "oil"]
GAP = 4


def colour(person, number, row):
    return np.array([80 * person, 60 * number, 60 * row], np.uint8)


@pytest.fixture
def evaluated(tmp_path):
    """Return a function that makes results of some rows with their pictures: of one colour each, or noise."""

    def make(folder="a", rows=("floor", "lora", "copy"), people=3, noise=False, methods=None, **told):
        out = tmp_path / folder
        (out / "rows").mkdir(parents=True)
        methods = {row: {"start": None} for row in rows} | (methods or {})
        found = {
            "rows": {row: {"cosine": {"mean": 0.5, "lo": 0.5, "hi": 0.5}} for row in rows},
            "methods": methods, "settings": {"diffusion": {"class_word": "dog"}}, "made_from": "this",
            "images_a_person": PLAIN, "changed": CHANGED, "styled": STYLED, "persons": [4, 5, 6], **told,
        }  # fmt: skip
        for i, row in enumerate(rows):
            images = np.empty((people, PLAIN + 3, 3, SIDE, SIDE), np.uint8)
            for person, number in np.ndindex(*images.shape[:2]):
                images[person, number] = colour(person, number, i)[:, None, None]
            if noise:
                images = np.random.default_rng(i).integers(0, 256, images.shape, dtype=np.uint8)
            key = json.dumps({"made_from": found["made_from"], **methods[row]}, sort_keys=True)
            save_file({"images": images}, out / "rows" / f"{row}.safetensors", metadata={"made_from": key})
        return {out / "results.json": found}

    return make


def drawn(path, named, people, prompts, along=None, across=None):
    shown, _ = columns(named, along)
    with Image.open(draw_gallery(path, shown, named, along, people, prompts, across)) as image:
        return np.array(image.convert("RGB"))


def test_people_and_prompts_stand_below_each_other_and_rows_beside(evaluated, tmp_path):
    sheet = drawn(tmp_path / "a.webp", evaluated(), 2, 3)
    # the plain prompt once, then of the three others the first and the last; the photo first
    numbers, rows, step = [0, 2, 4], [2, 0, 1], SIDE + GAP
    head = (sheet.shape[0] - 2 * (3 * step + GAP)) // 2
    assert head > 0
    for person in range(2):
        top = person * (sheet.shape[0] // 2) + head + GAP
        for line, number in enumerate(numbers):
            for column, row in enumerate(rows):
                x, y = sheet.shape[1] - (3 - column) * step + SIDE // 2, top + line * step + SIDE // 2
                assert np.abs(sheet[y, x].astype(int) - colour(person, number, row)).max() <= 6


def test_rows_beyond_the_width_stand_beneath_with_the_same_prompts(evaluated, tmp_path):
    named = evaluated(rows=["floor", "lora", "dora", "svdiff", "copy"])
    sheet = drawn(tmp_path / "a.webp", named, 1, 2, across=3)
    step, half = SIDE + GAP, sheet.shape[0] // 2
    assert sheet.shape[1] == drawn(tmp_path / "b.webp", named, 1, 2, across=4).shape[1]  # 3 and 2, either way
    for place, row in enumerate([4, 0, 1, 2, 3]):  # the photo first
        line, column = divmod(place, 3)
        for k, number in enumerate([0, 3]):
            x, y = sheet.shape[1] - (3 - column) * step, (line + 1) * half - (2 - k) * step - GAP
            x, y = x + SIDE // 2, y + SIDE // 2
            assert np.abs(sheet[y, x].astype(int) - colour(0, number, row)).max() <= 6
    assert (sheet[-SIDE // 2, -SIDE // 2] >= 250).all()


def test_fewer_people_than_asked_are_those_that_every_row_has(evaluated, tmp_path):
    named = evaluated(people=2)
    assert drawn(tmp_path / "a.webp", named, 2, 9).shape == drawn(tmp_path / "b.webp", named, 5, 4).shape


def test_only_pictures_of_the_results_are_shown(evaluated):
    named = evaluated(methods={"lora": {"strength": 0.5}})
    ((file, results),) = named.items()
    results["methods"]["lora"] = {"strength": 0.7}  # others than those that lie there
    (file.parent / "rows" / "copy.safetensors").unlink()
    assert [column.row for column in columns(named, None)[0]] == ["floor"]
    results["made_from"] = "that"
    assert columns(named, None) == ([], [])


def test_results_that_differ_in_one_setting_are_side_by_side(evaluated, tmp_path):
    named = {}
    for value in (0.5, 0.0):
        named |= evaluated(str(value), ["floor", "lora", "copy"], methods={"lora": {"strength": value}})
    along = axis({str(file): results for file, results in named.items()})
    shown = columns(named, along)[0]
    assert [(column.row, column.number) for column in shown] == [("copy", 0), ("floor", 0), ("lora", 1), ("lora", 0)]
    named |= evaluated("others", persons=[7, 8, 9])
    assert columns(named, None)[1] == [tmp_path / "others" / "results.json"]


def test_whatever_is_drawn_the_file_is_small(evaluated, tmp_path):
    named = evaluated(noise=True)
    drawn(tmp_path / "a.webp", named, 3, 4)
    assert MOST / 2 < (tmp_path / "a.webp").stat().st_size <= MOST


def test_what_has_no_room_is_refused(evaluated, tmp_path, monkeypatch):
    named = evaluated(people=2, persons=[1, 2])
    monkeypatch.setattr("hyperdb.report.gallery.MOST", 100)
    with pytest.raises(UserError, match=r"gallery_people=2, gallery_prompts=3: 18 pictures are too many .*fewer"):
        drawn(tmp_path / "a.webp", named, 9, 3)
    monkeypatch.undo()
    monkeypatch.setattr("hyperdb.report.gallery.LONGEST", LONGEST // 40)
    with pytest.raises(UserError, match="ask for fewer"):
        drawn(tmp_path / "a.webp", named, 2, 3)
    assert not (tmp_path / "a.webp").exists()


def test_a_file_of_other_pictures_is_named(evaluated):
    named = evaluated(rows=["lora"])
    next(iter(named.values()))["styled"] = ["ink"]
    with pytest.raises(UserError, match=r"lora\.safetensors holds no pictures of .*results\.json; delete it"):
        columns(named, None)
