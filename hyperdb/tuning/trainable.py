"""An adapter over the places of a base that its settings ask for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperdb.adapters.base import Adapter, AdapterConfig
    from hyperdb.adapters.layout import Layout
    from hyperdb.diffusion.base import Base


def numbers(adapter: Adapter) -> int:
    """Return how many numbers an adapter trains for one person, padding left out."""
    mask = getattr(adapter, "mask", None)  # of tokens, which are padded to the largest layer
    return int(mask.sum()) if mask is not None else sum(map(math.prod, adapter.shapes().values()))


def layout_of(base: Base, settings: AdapterConfig) -> Layout:
    """Return the places of a base that settings ask for and that an adapter of their kind can change."""
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site

    sites = {name: Site(name, module) for name, module in base.places(settings.where()).items()}
    return Layout.listing({name: site for name, site in sites.items() if site.kind in settings.kinds})


def trainable(base: Base, settings: AdapterConfig) -> tuple[AdapterConfig, Adapter]:
    """Return the settings with the base's words filled in, and the adapter over the sites of the base that they name.

    Raises `UserError` where the base has no such sites or words.
    """
    words = base.config.rare_token, base.config.class_word
    settings = settings.bound(*(base.tokenizer(word, add_special_tokens=False).input_ids for word in words))
    return settings, settings.build(layout_of(base, settings))
