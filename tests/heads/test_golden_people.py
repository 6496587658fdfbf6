"""The people of an algorithm's name stay as they are: its pictures, labels and captions, drawn once and kept here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hyperdb import heads
from hyperdb.data.people import load_people
from hyperdb.faces.image import grid, read_image, read_text, save_png
from hyperdb.stages.render_heads import Config, run

KEPT = Path(__file__).parent.parent / "golden" / f"people-{heads.ALGORITHM[:8]}.png"
WORDS = ("style", "place", "expression", "accessory", "sex", "skin", "hair")
NUMBERS = ("age", "yaw", "pitch")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Return pictures `[36, 32, 32, 3]` of four people, and what is said of each."""
    folder = str(tmp_path_factory.mktemp("people"))
    config = Config(out=folder, identities=4, views=9, photo_views=2, size=32, workers=1)
    people = load_people(run(config))
    coefficients = people.labels["coefficients"].double()
    said = {"caption": people.captions}
    said |= {key: [people.names[key][i] for i in people.labels[key].tolist()] for key in WORDS}
    said |= {key: people.labels[key].tolist() for key in NUMBERS}
    said |= {"mean": coefficients.mean(1).tolist(), "spread": coefficients.std(1).tolist()}
    return people.images[:].permute(0, 2, 3, 1).numpy(), said


@pytest.fixture
def kept(people, request):
    """Return the same of the file; --write-golden makes it, if none of the name is there."""
    if request.config.getoption("--write-golden") and not KEPT.is_file():
        images, said = people
        save_png(KEPT, grid(list(images), 9), {"algorithm": heads.ALGORITHM, "people": json.dumps(said)})
    text = read_text(KEPT)
    assert text["algorithm"] == heads.ALGORITHM
    return read_image(KEPT), json.loads(text["people"])


def test_every_word_is_drawn(people):
    _, said = people
    for key, words in (("style", heads.STYLES), ("place", heads.PLACES), ("expression", heads.EXPRESSIONS),
                       ("accessory", heads.ACCESSORIES)):  # fmt: skip
        assert set(said[key]) == set(words)


def test_the_pictures_of_a_name_stay(people, kept):
    """Equal on every processor tried; a few pixels and levels are left to compilers of another kind."""
    drawn = grid(list(people[0]), 9)
    assert drawn.shape == kept[0].shape
    apart = np.abs(drawn.astype(int) - kept[0]).max(2)
    assert (apart > 1).mean() < 2e-4, "the pictures are others: give heads.ALGORITHM another name"
    assert apart.mean() < 1e-3, "the pictures are others: give heads.ALGORITHM another name"


def test_the_labels_and_captions_of_a_name_stay(people, kept):
    (_, found), (_, known) = people, kept
    assert found.keys() == known.keys()
    for key, values in found.items():
        wanted = known[key] if isinstance(values[0], str) else pytest.approx(known[key], rel=1e-4, abs=1e-5)
        assert values == wanted, f"{key}: give heads.ALGORITHM another name"
