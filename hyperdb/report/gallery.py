"""A gallery of what methods drew: people and prompts downwards, a column for each row of the results."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hyperdb.faces.image import grid
from hyperdb.report.sweep import Axis
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import atomic, load_metadata, load_parts, load_shapes

MOST = 300_000  # bytes of the file
SIDE = 96  # pixels of a picture in it
LONGEST = 16_383  # pixels on a side of a WebP
GIVEN = "copy"  # the row that shows the photo, which stands first
SAME = ("data", "persons", "images_a_person", "changed", "styled")  # alike in results that are shown side by side


class Column(NamedTuple):
    """A row of the results that is `number` among several, and the file with its pictures `[J, K, 3, H, W]` uint8."""

    row: str
    number: int
    file: Path
    people: int


def _prompts(results: Mapping[str, Any]) -> dict[int, str]:
    """Return which picture of a person shows which prompt; of those of the plain prompt the first."""
    word = results.get("settings", {}).get("diffusion", {}).get("class_word", "face")
    further = [*results.get("changed", []), *results.get("styled", [])]
    return {0: f"a [V] {word}"} | dict(enumerate(further, results.get("images_a_person", 1)))


def _chosen(prompts: Mapping[int, str], count: int) -> dict[int, str]:
    """Return at most so many prompts: the plain one, and others evenly among the rest."""
    plain, *rest = prompts
    count = min(count - 1, len(rest))
    return {k: prompts[k] for k in [plain, *(rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count))]}


def _columns(number: int, file: Path, results: Mapping[str, Any]) -> dict[tuple[str, str], Column]:
    """Return {(row, what made it): column} of the rows whose pictures are beside results, and are what was measured."""
    found = {}
    for row, how in results.get("methods", {}).items():
        path = file.parent / "rows" / f"{row}.safetensors"  # of the first seed
        told = json.dumps({"made_from": results.get("made_from"), **how}, sort_keys=True)
        if not path.is_file() or load_metadata(path).get("made_from") != told:
            continue
        people, *shape = load_shapes(path).get("images", [0])
        if len(shape) != 4 or shape[:2] != [results.get("images_a_person", 1) + len(_prompts(results)) - 1, 3]:
            raise UserError(f"{path} holds no pictures of {file}; delete it, and evaluate again")
        found[row, told] = Column(row, number, path, people)
    return found


def columns(named: Mapping[Path, Mapping[str, Any]], along: Axis | None) -> tuple[list[Column], list[Path]]:
    """Return the rows of several results whose pictures are at hand, and the results that are left out.

    Those have pictures of other people or prompts than the first. Pictures that several results share are one column.
    Results that differ in one setting, `along`, are in the order of its values.
    """
    found: dict[tuple[str, str], Column] = {}
    of: dict[str, Any] = {}
    left_out = []
    for number, (file, results) in enumerate(named.items()):
        if mine := _columns(number, file, results):
            what = {name: results.get(name) for name in SAME}
            of = of or what
            if what != of:
                left_out.append(file)
            for key, column in mine.items() if what == of else ():
                found.setdefault(key, column)
    names = list(dict.fromkeys([GIVEN, *(row for results in named.values() for row in results["rows"])]))
    order = along.order() if along else list(range(len(named)))
    return sorted(found.values(), key=lambda c: (names.index(c.row), order.index(c.number))), left_out


def _labels(shown: Sequence[Column], along: Axis | None) -> list[str]:
    """Return what stands above columns: the row, and of one that is there several times what tells it apart."""
    times = Counter(column.row for column in shown)
    values = [along.text(column.number) if along else f"({column.number + 1})" for column in shown]
    return [c.row if times[c.row] == 1 else f"{c.row} {value}" for c, value in zip(shown, values, strict=True)]


def _picture(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture `[3, H, W]` as `[SIDE, SIDE, 3]`."""
    return np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def save_webp(path: Path, pixels: NDArray[np.uint8]) -> bool:
    """Write a picture `[H, W, 3]` as a WebP of at most `MOST` bytes, as well as that goes; False if it is too large."""
    sheet = Image.fromarray(pixels)
    for quality in range(90, -1, -10) if max(sheet.size) <= LONGEST else ():
        sheet.save(written := io.BytesIO(), "WEBP", quality=quality, method=6)
        if written.tell() <= MOST:
            with atomic(path) as temporary:
                temporary.write_bytes(written.getvalue())
            return True
    return False


def draw_gallery(
    path: Path, shown: Sequence[Column], named: Mapping[Path, Mapping[str, Any]], along: Axis | None,
    people: int, count: int, across: int | None = None,
) -> Path:  # fmt: skip
    """Write the pictures of the first `people` under `count` prompts as a WebP of at most `MOST` bytes.

    `shown` are the `columns` of `named`; of more than `across`, if given, the further ones stand beneath. There are no
    more people than the row of the fewest has. Raises `UserError` if so many pictures have no room.
    """
    prompts = _chosen(_prompts(list(named.values())[shown[0].number]), count)
    people = min(people, *(column.people for column in shown))
    labels, blocks = _labels(shown, along), []
    lines = -(-len(shown) // (across or len(shown)))
    across = -(-len(shown) // lines)  # as many in each line, but for the last
    white = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    for person in range(people):
        for first in range(0, len(shown), across):
            some = shown[first : first + across]
            parts = [load_parts(column.file, "images", [(person, k) for k in prompts]) for column in some]
            empty = [white] * (across - len(some))
            pictures = [x for line in zip(*parts, strict=True) for x in (*map(_picture, line), *empty)]
            blocks.append(grid(pictures, across, labels[first : first + across], list(prompts.values())))
    if save_webp(path, np.concatenate(blocks)):
        return path
    raise UserError(
        f"gallery_people={people}, gallery_prompts={len(prompts)}: {people * len(prompts) * len(shown)} pictures are "
        f"too many for {MOST / 1000:g} kB; ask for fewer"
    )
