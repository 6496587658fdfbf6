"""Full fine-tuning, what DreamBooth trains (Ruiz et al. 2023, arXiv 2208.12242): every weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Changes, Dense, Frozen
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout


@dataclass
class FullConfig(AdapterConfig):
    """Every weight of `sites`; with `text_encoder` the text encoder's too, at `text_rate` times the rate."""

    sites: str = "unet"
    text_encoder: bool = False
    text_rate: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.text_rate < float("inf"):
            raise UserError(f"text_rate={self.text_rate}: expected above 0")

    def where(self) -> str:
        """Return the name of the set of sites."""
        return "everything" if self.text_encoder else self.sites

    def build(self, layout: Layout) -> Full:
        """Return the adapter over `layout`."""
        return Full(layout, self.text_rate)


class Full(Frozen):
    """`W + dW`, dW zero at the start."""

    def __init__(self, layout: Layout, text_rate: float = 1.0) -> None:
        super().__init__(layout)
        self.text_rate = text_rate

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the sites' own, by their names."""
        return {layer.name: layer.shape for layer in self.layout.layers}

    def rate(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""
        return self.text_rate if name.startswith("text_encoder.") else 1.0

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the parameters themselves."""
        return {name: Dense(params[name]) for name in self.layout.names}
