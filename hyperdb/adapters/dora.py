"""DoRA (Liu et al. 2024, arXiv 2402.09353): a low-rank residual turns each row of a weight, a magnitude scales it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.adapters.base import Changes, DenseChange, LowRank
from hyperdb.adapters.lora import LoRA, LoRAConfig
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class DoRAConfig(LoRAConfig):
    """LoRA's settings; a magnitude an output comes on top."""

    def build(self, layout: Layout) -> DoRA:
        """Return the adapter over `layout`."""
        return DoRA(layout, self.rank, self.seed)


def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of each row, `[..., m]`, of weights `[I, m, ...]`."""
    return weight.flatten(2).norm(dim=2)


class Turned(DenseChange):
    """Low-rank factors down `[I, r, n]`, up `[I, m, r]` and magnitudes `[I, m]`."""

    # W' = magnitude (W + up down) / |W + up down|, the norm taken as a constant
    def dense(self, weight: Tensor) -> Tensor:
        """Return `W' - W`, `[I, *shape]`."""
        down, up, magnitude = self.tensors
        whole = weight + LowRank(down, up).dense(weight)
        gain = magnitude.to(weight) / row_norms(whole).detach().clamp_min(1e-12)  #  [I, m]
        return gain.view(*gain.shape, *[1] * (weight.ndim - 1)) * whole - weight

    def check(self, site: Site) -> None:
        """Raise `UserError` if the factors or magnitudes do not fit."""
        down, up, magnitude = self.tensors
        LowRank(down, up).check(site)
        if magnitude.shape[1:] != site.shape[:1]:
            raise UserError(f"{site.name} takes magnitudes [I, {site.shape[0]}], not {list(magnitude.shape)}")


class DoRA(LoRA):
    """`m (W + B A) / |W + B A|`; m is |W| at the start, and B zero."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return LoRA's and `{layer.magnitude: [m]}`."""
        return super().shapes() | {f"{layer.name}.magnitude": (layer.out,) for layer in self.layout.layers}

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return LoRA's and `{layer.magnitude: [I, m]}`, the norms of the frozen rows."""
        assert sites is not None, "magnitudes begin at the frozen weights"
        params = super().init(identities)
        for name in self.layout.names:
            norms = row_norms(sites[name].weight()[None]).float()
            params[f"{name}.magnitude"] = norms.repeat(identities, 1).to(self.device)
        return params

    def changes(self, params: dict[str, Tensor]) -> Changes:  # type: ignore[override]
        """Return the factors and magnitudes, by layer."""
        parts = ("down", "up", "magnitude")
        return {name: Turned(*(params[f"{name}.{part}"] for part in parts)) for name in self.layout.names}
