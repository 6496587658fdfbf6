"""hyperdb: HyperDreamBooth, one photo of a face in, a tiny personalisation of a diffusion model out.

The axes of every tensor, as docstrings and margins name them:

| letter | axis |
| --- | --- |
| I | identities (people); 1 where one adapter serves every row |
| S | samples (images) of an identity; rows of a batch are identity-major, B = I * S |
| B | batch |
| N | adapted layers, one weight token each |
| D | token width: the numbers of one layer, padded to the widest |
| r | rank of a residual |
| n, m | inputs and outputs of a linear layer, W: [m, n]; of a convolution, n is (channels, height, width) |
| a, b | LiDB's trainable numbers a rank on the input and on the output side |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperdb.runtime.version import __version__ as __version__

if TYPE_CHECKING:
    from hyperdb.tuning.personalizer import Personalizer


def load(diffusion: str = "embedded", *overrides: str) -> Personalizer:
    """Load a base and its hypernetwork; `overrides` are `key=value` words of `hyperdb personalize`."""
    from hyperdb import config
    from hyperdb.tuning.personalizer import Personalizer

    return Personalizer(config.load("personalize", [f"diffusion={diffusion}", "image=none", *overrides]))
