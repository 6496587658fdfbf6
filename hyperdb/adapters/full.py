"""Full fine-tuning, what DreamBooth trains (Ruiz et al. 2023, arXiv 2208.12242): every weight and bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Changes, DenseChange, Frozen
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


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


class Dense(DenseChange):
    """A free change `[I, *shape]` of one weight."""

    def dense(self, weight: Tensor) -> Tensor:
        """Return it, in the dtype of the weight."""
        return self.tensors[0].to(weight)

    def check(self, site: Site) -> None:
        """Raise `UserError` if it does not have the site's shape."""
        if (shape := tuple(self.tensors[0].shape[1:])) != site.shape:
            raise UserError(f"{site.name} takes a change of {list(site.shape)}, not {list(shape)}")


class Full(Frozen):
    """`W + dW`, dW zero at the start."""

    def __init__(self, layout: Layout, text_rate: float = 1.0) -> None:
        super().__init__(layout)
        self.text_rate = text_rate

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{site: [I, *shape]}`, zero."""
        import torch

        return {x.name: torch.zeros(identities, *x.shape, device=self.device) for x in self.layout.layers}

    def rate(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""
        return self.text_rate if name.startswith("text_encoder.") else 1.0

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the parameters themselves."""
        return {name: Dense(params[name]) for name in self.layout.names}
