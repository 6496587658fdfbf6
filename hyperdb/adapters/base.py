"""What every additive adapter is: trainable tensors with an identity axis, and the factors they stand for.

Laws, tested for every adapter: the residual is zero at init; applying is `x @ delta^T`; a batch of identities
equals a loop over them; merging equals hooking; gradient reaches the trainable tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hyperdb.adapters.layout import Layout
from hyperdb.runtime.errors import UserError
from hyperdb.types import Delta, Down, Up

Factors: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""{layer: (down [I, r, n], up [I, m, r])}; the residual of a layer is `up @ down`.

That of a convolution of c channels and a kernel of h x w has down `[I, r, c, h, w]`: a convolution to r channels, then
`up` on each pixel.
"""


class Adapter(Protocol):
    """A family of personalisations over one layout."""

    layout: Layout

    def init(self, identities: int) -> dict[str, Tensor]:
        """Return trainable tensors `[I, ...]` of zero residual, float32, alike for all."""

    def factors(self, params: dict[str, Tensor]) -> Factors:
        """Return the factors that `params` stand for; differentiable."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """Move what is frozen in the adapter; return the adapter."""


def delta(down: Down, up: Up) -> Delta:
    """Return the dense residual `dW = up @ down`, of a convolution `[I, m, c, h, w]`."""
    if down.ndim > 3:
        return (up @ down.flatten(2)).unflatten(2, down.shape[2:])
    return up @ down  #                                                [I, m, r] @ [I, r, n] -> [I, m, n]


def rank_of(factors: Factors) -> int:
    """Return the largest rank of any layer."""
    return max(down.shape[1] for down, _ in factors.values())


def select(factors: Factors, index: int | slice | Sequence[int]) -> Factors:
    """Return the factors of some identities; the identity axis stays."""
    rows = [index] if isinstance(index, int) else index
    return {name: (down[rows], up[rows]) for name, (down, up) in factors.items()}


def scale(factors: Factors, strength: float) -> Factors:
    """Return factors of `strength` times the residual."""
    return {name: (down, up * strength) for name, (down, up) in factors.items()}


def concatenate(*factors: Factors) -> Factors:
    """Return factors of the sum of residuals, exactly: ranks side by side (the paper's rank relaxation).

    A layer that some of them lack is zero there. An identity axis of 1 is shared by all. Raises `UserError` when the
    identities differ.
    """
    sizes = {down.shape[0] for f in factors for down, _ in f.values()}
    if len(sizes - {1}) > 1:
        raise UserError(f"cannot concatenate factors of {sorted(sizes)} identities")
    count = max(sizes, default=1)
    joined: Factors = {}
    for name in dict.fromkeys(name for f in factors for name in f):
        downs, ups = zip(*(f[name] for f in factors if name in f), strict=True)
        joined[name] = (
            torch.cat([down.expand(count, *down.shape[1:]) for down in downs], dim=1),  #  [I, R, n]
            torch.cat([up.expand(count, -1, -1) for up in ups], dim=2),  #                 [I, m, R]
        )
    return joined
