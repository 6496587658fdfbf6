"""hyperdb: HyperDreamBooth, one photo of a face in, a tiny personalisation of a diffusion model out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperdb.tuning.personalizer import Personalizer

__version__ = "0.1.0"


def load(diffusion: str = "embedded", *overrides: str) -> Personalizer:
    """Load a base and its hypernetwork; `overrides` are `key=value` words of `hyperdb personalize`."""
    from hyperdb import config
    from hyperdb.tuning.personalizer import Personalizer

    return Personalizer(config.load("personalize", [f"diffusion={diffusion}", "image=none", *overrides]))
