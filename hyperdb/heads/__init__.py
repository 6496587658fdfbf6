"""Procedural people: CC0 head mesh and morphs -> identities, views, styles, captions."""

from hyperdb.heads.captions import (
    ACCESSORY_PHRASES,
    PLACE_PHRASES,
    RARE_TOKEN,
    STYLE_PROMPTS,
    caption,
    prompt,
    vocabulary,
)
from hyperdb.heads.identity import AGES, CUTS, HAIRS, SEXES, SKINS, Identity
from hyperdb.heads.render import ALGORITHM, render
from hyperdb.heads.split import SPLITS, split_of
from hyperdb.heads.view import ACCESSORIES, CROP, EXPRESSIONS, PLACES, STYLES, View, sample_view

__all__ = [
    "ACCESSORIES",
    "ACCESSORY_PHRASES",
    "AGES",
    "ALGORITHM",
    "CROP",
    "CUTS",
    "EXPRESSIONS",
    "HAIRS",
    "PLACES",
    "PLACE_PHRASES",
    "RARE_TOKEN",
    "SEXES",
    "SKINS",
    "SPLITS",
    "STYLES",
    "STYLE_PROMPTS",
    "Identity",
    "View",
    "caption",
    "prompt",
    "render",
    "sample_view",
    "split_of",
    "vocabulary",
]
