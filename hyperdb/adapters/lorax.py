"""LoRA-X (Farhadzadeh et al. 2025, arXiv 2501.16559): a diagonal in the leading singular vectors of the base's weights.

Unlike SVDiff it moves the first few singular values alone, and these to either side of zero. So it can be told of
another version of the base, whose weights have much the same leading singular vectors (`hyperdb transfer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Changes, DenseChange, Frozen, LowRank, whole_number
from hyperdb.adapters.site import decomposed
from hyperdb.adapters.svdiff import narrowest, values
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class LoRAXConfig(AdapterConfig):
    """A number for each of the first `rank` singular values of every linear layer and convolution of `sites`.

    A layer that has fewer singular values has a number for each of them. With null every layer has as many as the
    narrowest linear one: 320 on Stable Diffusion 1.5, the reference's.
    """

    rank: int | None = None
    sites: str = "attention"
    kinds = ("linear", "conv")

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole_number("rank", self.rank, 1, 4096)

    def build(self, layout: Layout) -> LoRAX:
        """Return the adapter over `layout`."""
        return LoRAX(layout, self.rank or narrowest(layout))


class Subspace(DenseChange):
    """Numbers `[I, r]` on the diagonal between the first r singular vectors of a weight `U diag(s) V^T`."""

    # dW = U_r diag(d) V_r^T
    def pair(self, u: Tensor, s: Tensor, vt: Tensor, shape: tuple[int, ...]) -> LowRank:
        """Return the change of a weight of a shape, given its decomposition, as low-rank factors."""
        d = self.tensors[0].to(s)  #                                      [I, r]
        rank = d.shape[1]
        down = d[..., None] * vt[:rank]  #                                [I, r, n]
        return LowRank(down.unflatten(2, shape[1:]), u[:, :rank].expand(len(d), -1, -1))

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return `x @ dW^T` in two thin products."""
        return self.pair(*site.svd, site.shape)(x, y, site)

    def dense(self, weight: Tensor) -> Tensor:
        """Return `[I, *shape]`, what is added to the frozen `weight`."""
        return self.pair(*decomposed(weight), tuple(weight.shape)).dense(weight)

    def settled(self, site: Site) -> LowRank:
        """Return the factors in the dtype of the weight."""
        moved = Subspace(self.tensors[0].detach().to(site.parameter.device))
        return moved.pair(*site.svd, site.shape).settled(site)

    def check(self, site: Site) -> None:
        """Raise `UserError` for no matrix, for more numbers than singular values, for a weight stored in fewer bits."""
        site.require_whole()
        rank = self.tensors[0].shape[1]
        if site.kind not in ("linear", "conv") or rank > values(site.shape):
            raise UserError(f"{site.name} {list(site.shape)} has not {rank} singular values")


class LoRAX(Frozen):
    """`W + U_r diag(d) V_r^T` with `d` zero at the start."""

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__(layout)
        self.rank = rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return `[r]` by the sites' names."""
        return {layer.name: (min(self.rank, values(layer.shape)),) for layer in self.layout.layers}

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the numbers, by site."""
        return {name: Subspace(params[name]) for name in self.layout.names}


# --- to another version of the base


# phi = |A^T B|_F^2 / r, over the first r singular vectors of each
def alike(a: Tensor, b: Tensor) -> float:
    """Return how much of one subspace lies in the other, 0 to 1; given their orthonormal columns `[m, r]`."""
    return float((a.mT @ b).square().sum() / a.shape[1])


# |dW|_F^2 = tr((up^T up) (down down^T))
def energy(pair: LowRank) -> float:
    """Return the sum of the squares of a low-rank change's numbers, over all identities."""
    down = pair.down.flatten(2)
    return float(((pair.up.mT @ pair.up) * (down @ down.mT)).sum())


# dW_t = U_t U_t^T dW V_t V_t^T
def projected(pair: LowRank, u: Tensor, vt: Tensor, rank: int | None) -> LowRank:
    """Return a change between the singular vectors `u [m, k]` and `vt [k, n]`, as factors of at most `rank`.

    Of more the largest singular values are kept: the nearest change of that rank; with None all.
    """
    up = u @ (u.mT @ pair.up)  #                                                      [I, m, r]
    down = pair.down.flatten(2) @ vt.mT @ vt  #                                       [I, r, n]
    return truncated(LowRank(down.unflatten(2, pair.down.shape[2:]), up), rank)


def truncated(pair: LowRank, rank: int | None) -> LowRank:
    """Return the nearest change of at most `rank`, that of the largest singular values; None: of all."""
    import torch

    # small in the middle: up down = Q_u (R_u R_d^T) Q_d^T
    (left, inner_left), (right, inner_right) = torch.linalg.qr(pair.up), torch.linalg.qr(pair.down.flatten(2).mT)
    a, s, b = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    root = s[:, :rank, None].sqrt()
    down = (root * b[:, :rank]) @ right.mT
    return LowRank(down.unflatten(2, pair.down.shape[2:]), left @ (root * a.mT[:, :rank]).mT)
