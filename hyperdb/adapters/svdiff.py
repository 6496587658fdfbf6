"""SVDiff (Han et al. 2023, arXiv 2303.11305): the weights' singular values move, their singular vectors stay."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Changes, Dense, DenseChange, Frozen
from hyperdb.adapters.site import decomposed
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class SVDiffConfig(AdapterConfig):
    """A shift of every singular value of every weight of `sites`; a vector has one, learned at `vector_rate` times the
    rate.
    """

    sites: str = "unet"
    vector_rate: float = 1e-3
    kinds = ("linear", "conv", "embedding", "norm")

    def __post_init__(self) -> None:
        if not 0 < self.vector_rate < float("inf"):
            raise UserError(f"vector_rate={self.vector_rate}: expected above 0")

    def build(self, layout: Layout) -> SVDiff:
        """Return the adapter over `layout`."""
        return SVDiff(layout, self.vector_rate)


class Spectral(DenseChange):
    """Shifts `[I, k]` of the singular values of a weight `W = U diag(s) V^T`."""

    # W' = U diag(relu(s + d)) V^T
    def _of(self, u: Tensor, s: Tensor, vt: Tensor, shape: tuple[int, ...]) -> Tensor:
        moved = (s + self.tensors[0].to(s)).relu() - s  #                 [I, k], zero at d = 0
        return (u @ (moved[..., None] * vt)).reshape(-1, *shape)

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return what the module makes of the rows with the change as its only parameter."""
        return site.apply(x, self._of(*site.svd, site.shape))

    def settled(self, site: Site) -> Dense:
        """Return the dense change itself."""
        moved = Spectral(self.tensors[0].detach().to(site.parameter.device))
        return Dense(moved._of(*site.svd, site.shape))

    def dense(self, weight: Tensor) -> Tensor:
        """Return `U diag(relu(s + d) - s) V^T`, `[I, *shape]`."""
        return self._of(*decomposed(weight), tuple(weight.shape))

    def check(self, site: Site) -> None:
        """Raise `UserError` if there is not one shift a singular value, or the weight is stored in fewer bits."""
        site.require_whole()
        if (found := self.tensors[0].shape[1]) != (wanted := values(site.shape)):
            raise UserError(f"{site.name} has {wanted} singular values, not {found}")


def values(shape: tuple[int, ...]) -> int:
    """Return how many singular values a weight of a shape has."""
    return min(shape[0], prod(shape[1:])) if len(shape) > 1 else 1


def narrowest(layout: Layout) -> int:
    """Return how many singular values the narrowest linear layer has: on a UNet alone the width of its first level.

    A layout without linear layers has its narrowest weight instead.
    """
    linear = [values(layer.shape) for layer in layout.layers if len(layer.shape) == 2]
    return min(linear or [values(layer.shape) for layer in layout.layers])


class SVDiff(Frozen):
    """`U diag(relu(s + d)) V^T` with `d` zero at the start."""

    def __init__(self, layout: Layout, vector_rate: float = 1.0) -> None:
        super().__init__(layout)
        self.vector_rate = vector_rate
        self.vectors = {layer.name for layer in layout.layers if len(layer.shape) == 1}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return one number a singular value, by the sites' names."""
        return {layer.name: (values(layer.shape),) for layer in self.layout.layers}

    def rate(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""
        return self.vector_rate if name in self.vectors else 1.0

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the shifts, by site."""
        return {name: Spectral(params[name]) for name in self.layout.names}
