"""Procedural people: determinism, shapes, splits, captions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hyperdb import config, heads
from hyperdb.faces.align import face_crop
from hyperdb.faces.detect import detect
from hyperdb.heads.captions import words
from hyperdb.heads.mesh import front_vertices, head_mesh


def _view(seed: int, **named: str) -> heads.View:
    return heads.sample_view(np.random.default_rng(seed), **named)


def test_a_seed_is_a_person() -> None:
    first, second, other = heads.Identity(7), heads.Identity(7), heads.Identity(8)
    assert np.array_equal(first.vertices, second.vertices)
    assert first.attributes == second.attributes
    assert first.coefficients.dtype == np.float32
    assert first.coefficients.shape == other.coefficients.shape
    assert not np.array_equal(first.coefficients, other.coefficients)


def test_a_face_has_neither_place_nor_size_nor_asymmetry() -> None:
    person = heads.Identity(7)
    face = person.face
    assert np.abs(face.mean(0)).max() < 1e-9
    lopsided, larger = heads.Identity(7), heads.Identity(7)
    asymmetric = np.array([name.startswith("asym/") for name in head_mesh().names])
    lopsided.__dict__["morph_weights"] = person.morph_weights + 0.5 * asymmetric
    assert np.array_equal(lopsided.face, face)
    # halfway to everybody's mean shape is another face, of the same size by the fit to the mean
    larger.__dict__["morph_weights"] = 0.5 * person.morph_weights
    assert np.abs(larger.face - face).max() > 0.01
    mean = head_mesh().vertices[front_vertices()]
    mean = mean - mean.mean(0)
    for each in (face, larger.face):
        assert (each * mean).sum() == pytest.approx((mean * mean).sum(), rel=0.05)


@pytest.mark.parametrize("style", heads.STYLES)
def test_renders_are_deterministic(style: str) -> None:
    view = _view(3, style=style)
    image = heads.render(heads.Identity(7), view)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, heads.render(heads.Identity(7), view))
    assert image.std() > 10
    assert not np.array_equal(image, heads.render(heads.Identity(8), view))


@pytest.mark.parametrize("accessory", heads.ACCESSORIES[1:])
def test_accessories_show(accessory: str) -> None:
    plain = heads.render(heads.Identity(5), _view(1, style="photo", accessory="none"))
    worn = heads.render(heads.Identity(5), _view(1, style="photo", accessory=accessory))
    assert (np.abs(plain.astype(int) - worn).max(2) > 25).mean() > 0.02


def test_a_face_covers_the_middle_of_the_frame() -> None:
    from hyperdb.heads.scene import build

    for seed in range(4):
        material = build(heads.Identity(seed), _view(seed), 64).material.reshape(64, 64)
        assert (material[24:44, 26:40] >= 0).all()


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="fresco"):
        heads.View(style="fresco")


def test_splits_are_disjoint() -> None:
    ranges = sorted((r.start, r.stop) for r in heads.SPLITS.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert all(heads.split_of(r[0]) == heads.split_of(r[-1]) for r in heads.SPLITS.values())
    with pytest.raises(ValueError, match="1200000"):
        heads.split_of(1_200_000)


def test_captions_stay_in_the_vocabulary_and_keep_their_shares() -> None:
    rng, person = np.random.default_rng(0), heads.Identity(1).attributes
    known, rare, bare, photos, total = set(heads.vocabulary()), 0, 0, 0, 8000
    beside: set[str] = set()  # the styles and places that the rare word stood beside
    for _ in range(total):
        view = heads.sample_view(rng)
        text = heads.caption(person, view, rng)
        assert text == text.lower()
        assert set(words(text)) <= known
        assert "face" in words(text)
        if heads.RARE_TOKEN in words(text):
            rare += 1
            beside |= {view.style, view.place}
        photos += view.style == "photo"
        bare += view.style == "photo" and "photo" not in words(text)
    assert 0.012 < rare / total < 0.03
    assert beside == {*heads.STYLES, *heads.PLACES}
    assert 0.25 < bare / photos < 0.35


def test_renders_are_framed_as_photos_are() -> None:
    """The crop that photos get leaves a render as it is, to a few per cent of its side."""
    assert config.load("personalize", ["image=none"]).diffusion.crop == heads.CROP
    for seed in (1, 2, 3):
        pixels = heads.render(heads.Identity(seed), heads.View(), 256)
        crop, _ = face_crop(pixels, 256, heads.CROP)
        before, after = (detect(x)[0].points for x in (pixels, crop))
        assert np.abs(before - after).max() < 0.08 * 256


def test_prompts_have_a_slot_for_the_rare_word() -> None:
    assert heads.prompt("sketch", "sks", "beach") == "a pencil sketch of a sks face, on the beach"
    assert heads.prompt(None) == "a face"
    assert set(heads.STYLE_PROMPTS) == set(heads.STYLES)
    assert set(heads.PLACE_PHRASES) == set(heads.PLACES)
