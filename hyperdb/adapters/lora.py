"""LoRA: a free low-rank residual, zero at the start; what rank relaxation trains on top of LiDB."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdb.adapters.base import Factors
from hyperdb.adapters.layout import Layout
from hyperdb.runtime.seed import generator


class LoRA:
    """`dW = up @ down`; at the start `down` is normal of variance 1/n, alike for everyone, and `up` zero."""

    def __init__(self, layout: Layout, rank: int = 4, seed: int = 0) -> None:
        self.layout, self.rank, self.seed = layout, rank, seed
        self.device = torch.device("cpu")

    @property
    def numbers(self) -> int:
        """Count of trainable numbers of one identity."""
        return sum(self.rank * (layer.in_ + layer.out) for layer in self.layout.layers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoRA:
        """Set the device on which `init` places tensors; nothing is frozen here, so `dtype` has no effect."""
        self.device = torch.device(device) if device is not None else self.device
        return self

    def init(self, identities: int) -> dict[str, Tensor]:
        """Return `{layer.down: [I, r, n], layer.up: [I, m, r]}`, float32."""
        params = {}
        for layer in self.layout.layers:
            stream = generator(self.seed, "lora", layer.name, layer.in_, self.rank)
            down = torch.randn(1, self.rank, layer.in_, generator=stream) / layer.in_**0.5
            params[f"{layer.name}.down"] = down.repeat(identities, 1, 1).to(self.device)  # [I, r, n]
            up = torch.zeros(identities, layer.out, self.rank)
            params[f"{layer.name}.up"] = up.to(self.device)  # [I, m, r]
        return params

    def factors(self, params: dict[str, Tensor]) -> Factors:
        """Return the parameters, paired by layer."""
        return {name: (params[f"{name}.down"], params[f"{name}.up"]) for name in self.layout.names}
