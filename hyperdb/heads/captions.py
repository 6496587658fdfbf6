"""The caption grammar: what is said about a picture, and every word that can be said.

    [a <medium> of] a [<expression>] [sks] face [of a <age> <sex>] [wearing <thing>][,] [<place>]

Some 30 % of photos carry no medium, so that "a face" alone means a photo. In about 2 % of all
captions, of every style and place and beside random people, the rare word stands before "face":
it becomes a known word that means nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hyperdb.heads.view import EXPRESSIONS, View

if TYPE_CHECKING:
    import numpy as np

    from hyperdb.heads.identity import Identity

RARE_TOKEN = "sks"

STYLE_PROMPTS: dict[str, str] = {
    "photo": "a photo of a {} face",
    "cartoon": "a cartoon of a {} face",
    "sketch": "a pencil sketch of a {} face",
    "oil": "an oil painting of a {} face",
    "clay": "a clay sculpture of a {} face",
    "bronze": "a bronze statue of a {} face",
    "pixel": "a pixel art picture of a {} face",
    "watercolour": "a watercolour painting of a {} face",
}
CLASS_PROMPT = "a {} face"
PLACE_PHRASES: dict[str, str] = {
    "plain": "in a studio",
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in a forest",
    "city": "in a city at night",
    "space": "in space",
    "desert": "in the desert",
    "library": "in a library",
}
ACCESSORY_PHRASES: dict[str, str] = {
    "none": "",
    "glasses": "wearing glasses",
    "hat": "wearing a hat",
    "scarf": "wearing a scarf",
}

_BARE_PHOTO = 0.30
_RARE = 0.02
_NAMED = {"expression": 0.85, "accessory": 0.92, "place": 0.92, "studio": 0.06, "person": 0.10}
_COMMA = 0.7


def words(text: str) -> list[str]:
    """Split a caption into words; a comma is a word."""
    return re.findall(r"[^\s,]+|,", text.lower())


def prompt(style: str | None, word: str = "", place: str | None = None) -> str:
    """Compose the canonical prompt of a style (None: the class prompt) with a subject word."""
    template = CLASS_PROMPT if style is None else STYLE_PROMPTS[style]
    text = " ".join(template.format(word).split())
    return text if place is None else f"{text}, {PLACE_PHRASES[place]}"


def caption(
    person: Identity | Mapping[str, Any],
    view: View,
    rng: np.random.Generator,
    rare_token: str = RARE_TOKEN,
) -> str:
    """Describe a view of a person (an Identity or its attributes)."""
    attributes = person if isinstance(person, Mapping) else person.attributes
    bare, rare, comma = rng.random(3)
    named = dict(zip(_NAMED, rng.random(len(_NAMED)) < list(_NAMED.values()), strict=False))
    subject = []
    if view.expression != "neutral" and named["expression"]:
        subject.append(view.expression)
    if rare < _RARE:
        subject.append(rare_token)
    style = None if view.style == "photo" and bare < _BARE_PHOTO else view.style
    text = prompt(style, " ".join(subject))
    if named["person"]:
        age = {"young": "a young ", "adult": "a ", "old": "an old "}[attributes["age"]]
        text += f" of {age}{attributes['sex']}"
    if view.accessory != "none" and named["accessory"]:
        text += f" {ACCESSORY_PHRASES[view.accessory]}"
    if named["studio" if view.place == "plain" else "place"]:
        text += f"{',' if comma < _COMMA else ''} {PLACE_PHRASES[view.place]}"
    return text


def vocabulary(rare_token: str = RARE_TOKEN) -> list[str]:
    """Every word that a caption can contain, sorted; with the comma and the rare word."""
    phrases = [*STYLE_PROMPTS.values(), CLASS_PROMPT, *PLACE_PHRASES.values()]
    phrases += [*ACCESSORY_PHRASES.values(), *EXPRESSIONS[1:], "of a young woman", "of an old man"]
    found = {word for phrase in phrases for word in words(phrase.replace("{}", " "))}
    return sorted(found | {",", rare_token})
