"""FouRA (Borse et al. 2024, arXiv 2406.08798): low-rank factors in the cosine transform of the features, gated by rank.

Of the paper's transforms this is the discrete cosine one, along the features of linear layers. The gate is a sigmoid
for each rank. Left out are the paper's thresholds by entropy, which shut a gate for good, their schedule, and freezing
a gate that has followed the input: what can be merged is trained with a gate that does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.adapters import site as sites
from hyperdb.adapters.base import AdapterConfig, Changes, LowRank, NotMergeableError, OfTensors, whole_number
from hyperdb.adapters.lora import LoRA
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class FouRAConfig(AdapterConfig):
    """Low-rank residuals of the linear layers among `sites`, in the cosine transform of their features.

    Each rank has a gate. It is learned, and the same for every input, so that the residual can be merged into the
    weight. With `adaptive` it follows the input, as in the paper, and nothing can be merged.
    """

    rank: int = 64
    seed: int = 0
    adaptive: bool = False
    sites: str = "attention"
    kinds = ("linear",)

    def __post_init__(self) -> None:
        whole_number("rank", self.rank, 1, 4096)
        whole_number("seed", self.seed, 0, 2**63 - 1)

    def build(self, layout: Layout) -> FouRA:
        """Return the adapter over `layout`."""
        return FouRA(layout, self.rank, self.seed, self.adaptive)


# x_j = sum_k c_k X_k cos(pi (2 j + 1) k / 2 n), c_0 = sqrt(1 / n), else sqrt(2 / n)
def inverse_dct(x: Tensor) -> Tensor:
    """Undo the orthonormal discrete cosine transform (DCT-II) along the last axis; float32 or wider."""
    import torch

    n, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    k = torch.arange(n, device=x.device, dtype=dtype)
    c = ((k > 0) + 1.0).to(dtype).div(n).sqrt()
    # a cosine is the real part of a turn of the plane: a Fourier transform of twice the length
    turned = x.to(dtype) * torch.polar(c, k * (math.pi / (2 * n)))
    return torch.fft.ifft(turned, 2 * n, norm="forward")[..., :n].real


class Gated(OfTensors):
    """Low-rank factors down `[I, r, n]`, up `[I, m, r]`, and a gate by the input: weight `[I, r, r]`, bias `[I, r]`."""

    # z = down x, g = sigmoid(weight mean(z) + bias), the mean over the tokens of a picture
    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return `up (g z)`: x `[R, I, S, ..., n]`, of which each row has its own gate."""
        down, up, weight, bias = (t.to(x) for t in self.tensors)
        z = sites.linear(x, down)  #                                        [R, I, S, ..., r]
        mean = z.flatten(3, -2).mean(3) if z.ndim > 4 else z  #             [R, I, S, r]
        gate = (sites.linear(mean, weight) + bias[:, None]).sigmoid()
        return sites.linear(z * gate.view(*gate.shape[:3], *[1] * (z.ndim - 4), -1), up)

    def dense(self, weight: Tensor) -> Tensor:
        """Raise `NotMergeableError`."""
        raise NotMergeableError(
            "the gate of this FouRA depends on its input, so that no weight can stand for it; use it as it is, with "
            "`hyperdb generate`, or train one that can be merged: adapter.adaptive=false"
        )

    def check(self, site: Site) -> None:
        """Raise `UserError` if the factors or the gate do not fit."""
        down, up, weight, bias = self.tensors
        LowRank(down, up).check(site)
        rank = down.shape[1]
        if site.kind != "linear" or weight.shape[1:] != (rank, rank) or bias.shape[1:] != (rank,):
            raise UserError(f"{site.name} takes a gate of {rank} ranks, not {list(bias.shape)}")

    def settled(self, site: Site) -> Gated:
        """Return it in the dtype of the weight."""
        return Gated(*(t.detach().to(*site.home) for t in self))


class FouRA(LoRA):
    """`F^-1 B g A F`, with F the cosine transform; at the start A and B are LoRA's, and the gate g is half open."""

    def __init__(self, layout: Layout, rank: int = 64, seed: int = 0, adaptive: bool = False) -> None:
        super().__init__(layout, rank, seed)
        self.adaptive = adaptive

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return LoRA's, `{layer.gate: [r]}`, and of an adaptive gate `{layer.gate_weight: [r, r]}`."""
        found = super().shapes()
        for name in self.layout.names:
            found[f"{name}.gate"] = (self.rank,)
            if self.adaptive:
                found[f"{name}.gate_weight"] = (self.rank, self.rank)
        return found

    # the transform is linear: it goes into the factors, once for all rows
    def changes(self, params: dict[str, Tensor]) -> Changes:  # type: ignore[override]
        """Return low-rank factors that the gate scales, or with an adaptive gate factors and gate, by layer."""
        found: dict[str, LowRank | Gated] = {}
        for name in self.layout.names:
            down, up, gate = (params[f"{name}.{part}"] for part in ("down", "up", "gate"))
            down, up = inverse_dct(down), inverse_dct(up.mT).mT  #          A F, F^-1 B
            if self.adaptive:
                found[name] = Gated(down, up, params[f"{name}.gate_weight"], gate)
            else:
                found[name] = LowRank(gate.sigmoid().to(down)[..., None] * down, up)
        return found
