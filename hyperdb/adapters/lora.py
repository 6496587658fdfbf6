"""LoRA (Hu et al. 2022, arXiv 2106.09685): a free low-rank residual; what rank relaxation trains on top of LiDB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Factors, Frozen, LowRank, whole_number
from hyperdb.runtime.seed import generator

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class LoRAConfig(AdapterConfig):
    """Low-rank residuals, `rank * (m + n)` numbers a layer; of linear layers and convolutions among `sites`."""

    rank: int = 4
    seed: int = 0
    sites: str = "attention"
    kinds = ("linear", "conv")

    def __post_init__(self) -> None:
        whole_number("rank", self.rank, 1, 4096)
        whole_number("seed", self.seed, 0, 2**63 - 1)

    def build(self, layout: Layout) -> LoRA:
        """Return the adapter over `layout`."""
        return LoRA(layout, self.rank, self.seed)


class LoRA(Frozen):
    """`dW = up @ down`; at the start `down` is normal of variance 1/n, alike for everyone, and `up` zero."""

    def __init__(self, layout: Layout, rank: int = 4, seed: int = 0) -> None:
        super().__init__(layout)
        self.rank, self.seed = rank, seed

    @property
    def numbers(self) -> int:
        """Count of trainable numbers of one identity."""
        return sum(map(prod, self.shapes().values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return `{layer.down: [r, n], layer.up: [m, r]}`."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in self.layout.layers:
            found[f"{layer.name}.down"] = (self.rank, *layer.shape[1:])
            found[f"{layer.name}.up"] = (layer.out, self.rank)
        return found

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{layer.down: [I, r, n], layer.up: [I, m, r]}`, float32."""
        import torch

        params = super().init(identities)
        for layer in self.layout.layers:
            stream = generator(self.seed, "lora", layer.name, layer.in_, self.rank)
            down = torch.randn(1, self.rank, layer.in_, generator=stream) / layer.in_**0.5
            down = down.reshape(1, self.rank, *layer.shape[1:])
            params[f"{layer.name}.down"] = down.repeat(identities, *[1] * (down.ndim - 1)).to(self.device)
        return params

    # dW = B A, B = 0 at the start
    def changes(self, params: dict[str, Tensor]) -> Factors:
        """Return the parameters, paired by layer."""
        return {name: LowRank(params[f"{name}.down"], params[f"{name}.up"]) for name in self.layout.names}
