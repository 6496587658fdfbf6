"""hyperdb: HyperDreamBooth, one photo of a face in, a tiny personalisation of a diffusion model out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperdb.stages.personalize import Personalizer

__version__ = "0.1.0"


def load(diffusion: str = "embedded", *overrides: str) -> Personalizer:
    """Load a base and its hypernetwork; `overrides` are `key=value` words of `hyperdb personalize`."""
    import importlib

    # by name: every module imports this package, and the layers of imports go down only
    config, personalize = (importlib.import_module(f"hyperdb.{name}") for name in ("config", "stages.personalize"))
    model: Personalizer = personalize.Personalizer(
        config.load("personalize", [f"diffusion={diffusion}", "image=none", *overrides])
    )
    return model
