"""Points stand where the rows' figures are; a picture is written of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from hyperdb.report.plot import PLANES, draw, points


def interval(mean):
    return {"mean": mean, "lo": mean - 0.25, "hi": mean + 0.125}


def pixels(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


RESULTS = {
    "rows": {
        "floor": {"label": "base", "cosine": interval(0.5), "seconds": 0.0},
        "lora": {
            "label": "base",
            "cosine": interval(0.75),
            "seconds": 0.004,
            "style_accuracy": interval(1.0),
            "copy_pose": interval(0.25),
            "copy_background": interval(0.75),
        },
        "rest": {"cosine": {"mean": 0.5, "lo": 0.5 + 1e-17, "hi": 0.4999999}, "copy_pose": interval(0.5)},
    }
}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("seconds", [("base", (0.0, 0, 0), (0.5, 0.25, 0.125)), ("base", (0.004, 0, 0), (0.75, 0.25, 0.125))]),
        ("bytes", []),
        ("copying", [("base", (0.5, 0, 0), (0.75, 0.25, 0.125))]),
        ("style", [("base", (1.0, 0.25, 0.125), (0.75, 0.25, 0.125))]),
    ],
)
def test_points_are_the_rows_with_all_the_figures(name, found):
    assert points(PLANES[name], RESULTS) == found


def test_an_end_past_the_mean_is_the_mean():
    results = {"rows": {"rest": {**RESULTS["rows"]["rest"], "seconds": 1}}}
    assert points(PLANES["seconds"], results) == [("rest", (1, 0, 0), (0.5, 0, 0))]


def test_pictures_are_the_same_again_and_differ_with_the_figures(tmp_path):
    """Whatever the labels are: `$` and `_` mean nothing in them."""
    odd = {f"r{i}": {"label": f"_$x^{i}", "cosine": interval(i / 30), "seconds": i} for i in range(24)}
    named = {"a$.json": RESULTS, "b$.json": {"rows": odd}}
    paths = [draw(tmp_path / f"{i}.png", PLANES["seconds"], named) for i in range(2)]
    paths.append(draw(tmp_path / "free.png", PLANES["seconds"], {"a": {"rows": {"floor": RESULTS["rows"]["floor"]}}}))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.png", "1.png", "free.png"]
    first, again, free = map(pixels, paths)
    assert np.array_equal(first, again)
    assert first.shape != free.shape or not np.array_equal(first, free)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 24, "every label has a colour"


def test_a_row_at_several_iterations_is_one_line(tmp_path):
    """It goes through its points in the order of the iterations, and each says how many."""
    def result(steps):
        one = {"label": f"LoRA, {steps} steps", "cosine": interval(steps / 200), "seconds": float(steps)}
        methods = {"lora": {"finetune": {"steps": steps}}, "floor": {"start": None}}
        return {"rows": {"lora": one, "floor": RESULTS["rows"]["floor"]}, "settings": {}, "methods": methods}

    def drawn(named):
        svg = draw(tmp_path / "a.svg", PLANES["seconds"], named).read_text()
        told = re.findall(r"<!-- (.*) -->", svg)  # every text, as it is written
        curves = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: (#\w+); stroke-width: 1.5', svg)
        return told, [(path.count("L"), colour) for path, colour in curves if path.count("L") > 1]

    steps = (160, 5, 40)
    told, curves = drawn({str(n): result(n) for n in steps})
    assert [count for count, _ in curves] == [2]
    assert "lora, by methods.lora.finetune.steps" in told
    assert [text for text in told if text in ("5", "40", "160")][:3] == ["5", "40", "160"]
    told, curves = drawn({"5": result(5), "b": {**result(40), "settings": {"people": 3}}})
    assert {"LoRA, 5 steps", "LoRA, 40 steps"} <= set(told)
    assert curves == []
