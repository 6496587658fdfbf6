"""An adapter over the places of a base that its settings ask for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hyperdb.adapters import KINDS

if TYPE_CHECKING:
    from hyperdb.adapters.base import Adapter, AdapterConfig
    from hyperdb.diffusion.base import Base


def kind_of(settings: AdapterConfig) -> str:
    """Return the name of an adapter's kind in `hyperdb.adapters.KINDS`."""
    return next(kind for kind, config in KINDS.items() if type(settings) is config)


def numbers(adapter: Adapter) -> int:
    """Return how many numbers an adapter trains for one person, padding left out."""
    mask = getattr(adapter, "mask", None)  # of tokens, which are padded to the largest layer
    return int(mask.sum()) if mask is not None else sum(map(math.prod, adapter.shapes().values()))


def trainable(base: Base, settings: AdapterConfig) -> tuple[AdapterConfig, Adapter]:
    """Return the settings with the base's words filled in, and the adapter over the sites of the base that they name.

    Raises `UserError` where the base has no such sites or words.
    """
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site

    words = base.config.rare_token, base.config.class_word
    settings = settings.bound(*(base.tokenizer(word, add_special_tokens=False).input_ids for word in words))
    sites = {name: Site(name, module) for name, module in base.places(settings.where()).items()}
    fitting = {name: site for name, site in sites.items() if site.kind in settings.kinds}
    return settings, settings.build(Layout.listing(fitting))
