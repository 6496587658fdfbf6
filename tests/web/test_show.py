"""What the page shows: escaped, with a text for every picture."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from hyperdb.faces.image import save_png
from hyperdb.web import show
from hyperdb.web.session import Found, Person, Photo, Picture, Progress, Wish

PIXELS = np.full((8, 8, 3), 200, np.uint8)
BAD = "<script>alert('x')</script>"


@pytest.fixture
def file(tmp_path):
    return save_png(tmp_path / "x.png", PIXELS)


def parsed(html: str) -> ElementTree.Element:
    """Read a fragment, whose tags are closed but for `img`."""
    closed = re.sub(r"(<img[^>]*)>", r"\1/>", html)
    return ElementTree.fromstring(f"<all>{closed}</all>")


def test_nothing_of_a_visitor_is_markup(file):
    wish = Wish(BAD, BAD)
    person = Person(BAD, file.parent, {BAD: file})
    photo = Photo(file, PIXELS, (Found(PIXELS, None, BAD),))
    fragments = [show.made(person), show.shelf([person]), show.about(Picture(file, wish, 0)), show.photo(photo),
                 show.error(BAD), show.notes([BAD])]  # fmt: skip
    for fragment in fragments:
        assert BAD in "".join(parsed(fragment).itertext())
        assert "<script" not in fragment


def test_every_picture_holds_itself_and_has_a_text(file):
    person = Person("Ada", file.parent, {"the photo": file, "fine-tuned": file}, seconds=12.34)
    photo = Photo(file, PIXELS, (Found(PIXELS, PIXELS), Found(PIXELS, PIXELS, "something")))
    for fragment, count in ((show.made(person), 2), (show.shelf([person, person]), 2), (show.photo(photo), 2)):
        pictures = parsed(fragment).findall(".//img")
        assert len(pictures) == count
        for picture in pictures:
            assert picture.get("alt")
            assert picture.get("src").startswith("data:image/png;base64,")
    assert "Ada, made in 12.3 s." in show.made(person)
    assert "2 faces, numbered from the largest" in show.photo(photo)


def test_the_curve_goes_from_the_first_loss_to_the_last():
    assert show.curve([0.5], 40) == ""
    svg = parsed(show.curve([0.5, 0.3, 0.1], 5))[0]
    assert svg.get("aria-label") == "loss from 0.5000 to 0.1000 after 3 of 5 iterations"
    points = [tuple(map(float, p.split(","))) for p in svg[0].get("points").split()]
    assert points == [(2, 2), (26, 20), (50, 38)]
    flat = parsed(show.curve([0.5, 0.5], 2))[0][0].get("points")
    assert flat == "2.0,38.0 98.0,38.0"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Progress("waiting", 0), "Waiting for your turn. You are next."),
        (Progress("waiting", 3), "Waiting for your turn. 3 before you."),
        (Progress("fine-tuning", 7, 40, 2.5, (0.5, 0.25)), "fine-tuning 7 of 40, loss 0.25002.5 s"),
        (Progress("prediction", 0, 1), "prediction 0.0 s"),
    ],
)
def test_how_far_a_work_is(now, said):
    assert "".join(parsed(show.progress(now)).itertext()) == said
    assert parsed(show.progress(now)).find(".//*[@role='status']") is not None
