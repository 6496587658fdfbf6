"""E4T (Gal et al. 2023, arXiv 2302.12228): a word near the class word, and offsets of the attention's weights.

An encoder that was trained on many people predicts where a person's training begins (`hyperdb.hypernet.e4t`). Then the
reference tunes the encoder and the offsets on the one photo, with the penalty on the word and, for faces, with the loss
masked to the face. Here the word itself is tuned and the person's own copy of the offsets, by `FitConfig`'s loss alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hyperdb.adapters.base import Changes, DenseChange, Frozen
from hyperdb.adapters.custom import CustomConfig, CustomDiffusion
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class E4TConfig(CustomConfig):
    """The vector of the rare token, and an offset of rank one for each weight of the UNet's attention.

    `encoder` is the file of `hyperdb train_e4t` that predicts where both begin; null: at the class word and at nothing.
    It is no part of what was trained, and is not kept with it.

    The reference makes an offset of two vectors and two square matrices a layer, which it trains in their place. Their
    product is of rank one as well, but for what the biases add.
    """

    encoder: FilePath | None = None
    sites: str = "e4t"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors != 1:
            raise UserError(f"vectors={self.vectors}: E4T names a person by one")

    def bound(self, rare: list[int], noun: list[int]) -> E4TConfig:
        """Fill in the rows from the token ids of the two words, and leave out the encoder."""
        return replace(super().bound(rare, noun), encoder=None)  # type: ignore[return-value, call-arg]

    def begins(self) -> str | None:
        """Return the file of its encoder."""
        return self.encoder

    def build(self, layout: Layout) -> E4T:
        """Return the adapter over `layout`, of which the first place is the embedding of the words."""
        return E4T(*self.parts(layout))

    def tokens(self, layout: Layout) -> Word:
        """Return what its encoder predicts of it. No other hypernetwork can: `predictable` stays false."""
        return Word(self, layout)


class Scaled(DenseChange):
    """`W (1 + up down^T)`, number by number: down `[I, n]` and up `[I, m]` of a weight `[m, n]`."""

    def dense(self, weight: Tensor) -> Tensor:
        """Return `W up down^T`, `[I, m, n]`."""
        down, up = (x.to(weight) for x in self)
        return weight * (up[:, :, None] * down[:, None, :])

    def check(self, site: Site) -> None:
        """Raise `UserError` unless there is one number an input and one an output."""
        down, up = self
        if (found := (*up.shape[1:], *down.shape[1:])) != site.shape:
            raise UserError(f"{site.name} {list(site.shape)} takes no offset of {list(found)}")


class Offsets(Frozen):
    """`W (1 + up down^T)` in each layer; at the start down is 1 and up 0, alike for everyone."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return `{layer.down: [n], layer.up: [m]}`."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in self.layout.layers:
            found |= {f"{layer.name}.down": (layer.in_,), f"{layer.name}.up": (layer.out,)}
        return found

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{layer.down: [I, n], layer.up: [I, m]}`, float32."""
        return {k: x + 1 if k.endswith(".down") else x for k, x in super().init(identities).items()}

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the offsets, by layer."""
        return {name: Scaled(params[f"{name}.down"], params[f"{name}.up"]) for name in self.layout.names}


class E4T(CustomDiffusion):
    """Offsets of the layers' weights, and the vector of one word: the first place of the layout."""

    rest = Offsets


class Word:
    """The word alone, as one token `[1, C]`: what an encoder predicts. The offsets are everybody's until the tuning."""

    fingerprint = ""  # nothing in it is random

    def __init__(self, config: E4TConfig, layout: Layout) -> None:
        import torch

        self.config, self.layout, self.adapter = config, layout, config.build(layout)
        width = layout.layers[0].shape[1]
        self.mask, self.template = torch.ones(1, width, dtype=torch.bool), torch.zeros(1, width)

    def to(self, device: Any = None, dtype: Any = None) -> Word:
        """Return it as it is: who begins at it moves the numbers."""
        return self
