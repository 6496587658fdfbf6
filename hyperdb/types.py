"""Axis legend of the whole project, and names for the tensors that cross module borders.

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

jaxtyping is a development dependency: with it the aliases carry shapes that tests check,
without it they only document.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

try:
    from jaxtyping import Bool, Float
except ImportError:
    from typing import Annotated as Bool
    from typing import Annotated as Float

Tokens: TypeAlias = Float[Tensor, "I N D"]
Mask: TypeAlias = Bool[Tensor, "N D"]
Down: TypeAlias = Float[Tensor, "I r *n"]
Up: TypeAlias = Float[Tensor, "I m r"]
Delta: TypeAlias = Float[Tensor, "I m *n"]
