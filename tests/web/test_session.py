"""What a visitor can do and cannot do, on a base of random weights; no gradio."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
import zipfile

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from hyperdb import config as configuration
from hyperdb.faces.image import read_image, read_text
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json
from hyperdb.stages import generate
from hyperdb.web.session import PEOPLE, Wish
from hyperdb.web.work import Left

SEED = 1_100_003


def upload(sessions, content: bytes, name: str = "me.jpg") -> str:
    """Write a file where gradio writes what is uploaded."""
    folder = sessions.root / hashlib.sha256(content).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return str(folder / name)


def png(pixels, tmp_path) -> bytes:
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def finish(steps):
    """Return what was told and what was made."""
    told = []
    try:
        while True:
            told.append(next(steps))
    except StopIteration as stop:
        return told, stop.value


@pytest.fixture
def session(sessions):
    return sessions.of("somebody")


@pytest.fixture
def person(session):
    session.example(SEED)
    return finish(session.personalise("Ada"))[1]


def test_a_person_is_personalised_as_by_the_command_line(session, words, tmp_path):
    photo = session.example(SEED)
    told, person = finish(session.personalise("Ada"))
    last = [one for one in told if one.phase == "fine-tuning"][-1]
    assert (last.done, last.of, len(last.losses)) == (3, 3, 3)
    assert all(np.isfinite(last.losses))
    seconds = [one.seconds for one in told]
    assert seconds == sorted(seconds)
    assert session.people == {"Ada": person}
    assert list(person.row) == ["the photo", "the base, of anybody", "fine-tuned"]  # nothing is predicted here
    assert np.array_equal(read_image(person.row["the photo"]), photo.chosen.crop)
    configuration.run("personalize", [*words, f"image={photo.path}", "preview=false", f"out={tmp_path / 'same'}"])
    mine, theirs = (Personalization.load(f / "adapter.safetensors") for f in (person.folder, tmp_path / "same"))
    assert torch.equal(mine.tokens, theirs.tokens)
    assert all(torch.equal(a, b) for name in mine.relaxed
               for a, b in zip(mine.relaxed[name], theirs.relaxed[name], strict=True))  # fmt: skip


def test_pictures_are_those_of_the_command_line_and_say_what_made_them(session, person, model, tmp_path):
    wish = Wish("Ada", "a pencil sketch of a [V] face", strength=0.8, subject_guidance=2.0, seed=5, count=2)
    told, (made, notices) = finish(session.draw(wish))
    assert notices == []
    assert {one.phase for one in told} <= {"waiting", "drawing"}
    assert [(one.seed, one.wish) for one in made] == [(5, wish), (6, wish)]
    config = generate.Config(diffusion=model.config.diffusion, adapter=str(person.folder), prompt=wish.prompt, seed=5,
                             num_images=2, strength=0.8, subject_guidance=2.0, out=str(tmp_path / "out"))  # fmt: skip
    generate.run(config)  # of a base of its own
    for one, expected in zip(made, sorted((tmp_path / "out").glob("0*.png")), strict=True):
        assert np.array_equal(read_image(one.path), read_image(expected))
        assert read_text(one.path) == read_text(expected)
    text = read_text(made[0].path)
    assert (text["synthetic"], text["base_digest"], text["seed"]) == ("true", model.base.digest, "5")


def test_the_base_is_left_as_it_was(session, person, model):
    finish(session.draw(Wish("Ada", "a [V] face", count=1)))
    assert not any(module._forward_hooks for module in [*model.base.unet.modules(), *model.base.text_encoder.modules()])


def test_words_that_the_base_does_not_know_are_said(session, person):
    _, (_, notices) = finish(session.draw(Wish("Ada", "a walrus, on the beach", count=1)))
    assert any("walrus" in said for said in notices)
    assert any("[V]" in said for said in notices)


def test_more_like_one_are_its_wish_at_seeds_it_has_not_had(session, person):
    with pytest.raises(UserError, match="choose a picture first"):
        finish(session.more())
    finish(session.draw(Wish("Ada", "a [V] face", seed=3, count=2)))
    finish(session.draw(Wish("Ada", "a face", seed=9, count=1)))
    assert session.pick(1).seed == 3
    _, (made, _) = finish(session.more(2))
    assert [(one.wish.prompt, one.seed) for one in made] == [("a [V] face", 5), ("a [V] face", 6)]
    assert session.pictures[:2] == made
    with pytest.raises(UserError, match="no picture 99"):
        session.pick(98)


def test_people_are_mixed_and_the_mixture_is_their_weighted_sum(session, person):
    session.example(SEED + 1)
    _, other = finish(session.personalise("Ada"))
    assert other.name == "Ada (2)"
    _, between = finish(session.mix("Ada", "Ada (2)", 0.25))
    assert list(between.row) == ["Ada", "Ada (2)", "Ada and Ada (2)"]
    a, b, ab = (Personalization.load(one.folder / "adapter.safetensors") for one in (person, other, between))
    assert torch.allclose(ab.tokens, 0.75 * a.tokens + 0.25 * b.tokens)
    with pytest.raises(UserError, match="choose two people"):
        finish(session.mix("Ada", "Ada", 0.5))
    with pytest.raises(UserError, match="choose a person of the shelf"):
        finish(session.mix("Ada", "Eve", 0.5))


def test_a_shift_that_the_base_has_no_directions_for_is_said(session, person):
    with pytest.raises(UserError, match="made in other LiDB bases than Ada: run `hyperdb weights`"):
        finish(session.shift("Ada", {"age": 1}))
    with pytest.raises(UserError, match="nothing is changed"):
        finish(session.shift("Ada", {"age": 0}))
    with pytest.raises(UserError, match="no attribute 'nose'"):
        finish(session.shift("Ada", {"nose": 1}))
    assert list(session.people) == ["Ada"]


@pytest.mark.parametrize("format", ["kohya", "diffusers", "native"])
def test_an_adapter_is_taken_along(session, person, format):
    file = session.export("Ada", format)
    assert file.name == "Ada.safetensors"
    if format == "native":
        mine = Personalization.load(person.folder / "adapter.safetensors")
        assert torch.equal(Personalization.load(file).tokens, mine.tokens)
    assert session.export("Ada", format) == file


def test_peft_comes_as_a_zip(session, person):
    with zipfile.ZipFile(session.export("Ada", "peft")) as packed:
        assert {"README.md", "unet/adapter_model.safetensors", "unet/adapter_config.json"} <= set(packed.namelist())


def test_pictures_come_as_a_zip_with_what_made_them(session, person):
    with pytest.raises(UserError, match="no pictures yet"):
        session.archive()
    finish(session.draw(Wish("Ada", "a [V] face", seed=4, count=2)))
    with zipfile.ZipFile(session.archive()) as packed:
        assert packed.namelist() == ["001-a_V_face-seed4.png", "002-a_V_face-seed5.png", "pictures.json"]
        listed = json.loads(packed.read("pictures.json"))
    assert (listed[0]["file"], listed[0]["person"], listed[0]["seed"]) == ("001-a_V_face-seed4.png", "Ada", "4")
    assert str(session.folder) not in json.dumps(listed)


def test_real_people_have_to_agree(session, sessions, tmp_path):
    path = upload(sessions, png(skimage.data.astronaut(), tmp_path))
    photo = session.take(path)
    assert not os.path.exists(path)
    assert photo.path.parent == session.folder
    assert len(photo.faces) == 1
    with pytest.raises(UserError, match="tick the line of consent"):
        finish(session.personalise("Eileen"))
    assert finish(session.personalise("Eileen", agreed=True))[1].name == "Eileen"


def test_one_of_several_faces_is_chosen(session, sessions, tmp_path):
    astronaut = skimage.data.astronaut()
    small = np.array(Image.fromarray(astronaut).resize((320, 320)))
    two = np.full((512, 840, 3), 128, np.uint8)
    two[:, :512], two[100:420, 520:] = astronaut, small
    photo = session.take(upload(sessions, png(two, tmp_path)))
    assert (len(photo.faces), photo.face) == (2, 1)
    assert session.choose(2).chosen is photo.faces[1]
    assert not np.array_equal(photo.faces[0].crop, photo.faces[1].crop)
    with pytest.raises(UserError, match="no such face"):
        session.choose(3)


def test_a_face_that_the_frame_cuts_is_shown_but_not_learned(session, sessions, tmp_path):
    photo = session.take(upload(sessions, png(skimage.data.astronaut()[:, 222:], tmp_path)))
    assert photo.chosen.crop is None
    with pytest.raises(UserError, match="the face in your photo is cut by the frame"):
        finish(session.personalise(agreed=True))


def test_bad_uploads_are_refused_in_a_line_and_leave_nothing(session, sessions, tmp_path):
    bad = {
        b"no picture": "your photo is not an image",
        png(np.full((99, 99, 3), 120, np.uint8), tmp_path): "no face found in your photo; .* tick that it is a",
        png(np.zeros((8, 8, 3), np.uint8), tmp_path): "your photo has 8x8 px",
        b"0" * 20_000_001: "more than 20 megabytes",
    }
    for content, said in bad.items():
        session.example(SEED)
        with pytest.raises(UserError, match=said) as error:
            session.take(upload(sessions, content))
        assert str(sessions.root) not in str(error.value)
        with pytest.raises(UserError, match="choose a photo first"):
            finish(session.personalise())
        assert [path for path in sessions.root.rglob("*") if path.is_file()] == []


def test_a_crop_is_taken_as_it_is(session, sessions, tmp_path):
    photo = session.take(upload(sessions, png(np.full((99, 99, 3), 120, np.uint8), tmp_path)), aligned=False)
    assert (photo.chosen.crop == 120).all()


def test_no_path_but_that_of_an_upload_is_opened(session, sessions, tmp_path):
    other = sessions.of("another")
    other.example(SEED)
    (tmp_path / "secret.png").write_bytes(png(skimage.data.astronaut(), tmp_path))
    linked = sessions.root / ("a" * 64)
    linked.mkdir()
    (linked / "me.png").symlink_to(tmp_path / "secret.png")
    named = [other.photo.path, tmp_path / "secret.png", "/etc/passwd", linked / "me.png", linked, sessions.root,
             f"{linked}/../../secret.png", "https://example.org/a.png", "", None, {"path": "x"}]  # fmt: skip
    for path in named:
        with pytest.raises(UserError, match="no file that was uploaded here"):
            session.take(path)
    assert (tmp_path / "secret.png").is_file()
    assert other.photo.path.is_file()


def test_visitors_are_apart(sessions):
    one, other = sessions.of("one"), sessions.of("other")
    one.example(SEED)
    finish(one.personalise("Ada"))
    assert (other.people, other.photo, other.pictures) == ({}, None, [])
    for do in (lambda: finish(other.draw(Wish("Ada", "a [V] face"))), lambda: other.export("Ada", "kohya")):
        with pytest.raises(UserError, match="choose a person of the shelf"):
            do()
    assert one.folder.stat().st_mode & 0o077 == 0
    assert len(one.folder.name) == 32
    sessions.end("one")
    assert not one.folder.exists()
    assert sessions.of("one") is not one
    sessions.end("nobody")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "a" * 501}, "501 characters"),
        ({"count": 13}, "expected 1 to 12"),
        ({"seed": "x"}, "seed=x: expected a number"),
        ({"strength": [1]}, "strength=.*expected a number"),
    ],
)
def test_a_wish_is_checked(wish, said):
    with pytest.raises(UserError, match=said):
        Wish(**{"person": "Ada", "prompt": "a [V] face", **wish})


def test_what_the_command_line_refuses_is_refused_in_its_words(session, person):
    with pytest.raises(UserError, match="strength=nan: expected a finite number"):
        finish(session.draw(Wish("Ada", "a [V] face", strength=float("nan"))))
    with pytest.raises(UserError, match="picture i has seed"):
        finish(session.draw(Wish("Ada", "a [V] face", seed=2**64)))


def test_the_shelf_has_room_for_so_many(session, person):
    session.people |= {str(i): person for i in range(PEOPLE)}
    with pytest.raises(UserError, match="the shelf is full"):
        finish(session.personalise())
    session.forget("Ada")
    assert "Ada" not in session.people


def test_one_thing_at_a_time(session):
    session.example(SEED)
    first = session.personalise("Ada")
    next(first)
    with pytest.raises(UserError, match="one thing at a time"):
        finish(session.personalise("Bob"))
    assert finish(first)[1].name == "Ada"


def test_who_leaves_is_forgotten_also_in_the_middle(session, sessions, config):
    slow = dataclasses.replace(config.finetune, steps=2000)
    session.config = dataclasses.replace(config, finetune=slow)
    free = list(session.line._free)
    model = free[0][0]
    model.config, before = session.config, model.config
    try:
        session.example(SEED)
        steps = session.personalise("Ada")
        while next(steps).phase != "fine-tuning":
            pass
        began = time.monotonic()
        sessions.end("somebody")
        assert time.monotonic() - began < 30
        assert not session.folder.exists()
        with pytest.raises(Left):
            finish(steps)
    finally:
        model.config = before
    assert sessions.line._free == free
    for do in (lambda: session.example(SEED), session.archive, lambda: session.export("Ada", "kohya")):
        with pytest.raises(UserError):
            do()
    assert not session.folder.exists()


def test_who_does_nothing_for_long_is_forgotten_and_so_is_what_nobody_took(sessions):
    session = sessions.of("somebody")
    session.example(SEED)
    left = upload(sessions, b"x")
    sessions.sweep()
    assert session.folder.exists()
    session.used -= 3601
    os.utime(os.path.dirname(left), (1, 1))
    fresh = sessions.of("another")
    assert not session.folder.exists()
    assert not os.path.exists(left)
    assert sessions.of("another") is fresh
    with pytest.raises(UserError, match="this visit has ended"):
        sessions.of("somebody")
    with pytest.raises(UserError, match="reload"):
        sessions.of(None)


def test_who_waits_is_told_how_many_are_in_front(sessions):
    first, second = sessions.of("first"), sessions.of("second")
    with sessions.line.turn(lambda ahead: None):
        told: list = []
        for session in (first, second):
            session.example(SEED)
        steps = [first.personalise(), second.personalise()]
        for one in steps:
            told.append(next(one))
        assert [(one.phase, one.done) for one in told] == [("waiting", 0), ("waiting", 1)]
    made = [threading.Thread(target=finish, args=(one,)) for one in steps]
    for one in made:
        one.start()
    for one in made:
        one.join()
    assert [list(session.people) for session in (first, second)] == [["Person 1"], ["Person 1"]]
    assert load_json(first.people["Person 1"].folder / "report.json")["seconds"]["finetune"] > 0
