"""Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): keys and values of the attention to the text, and a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hyperdb.adapters.base import Changes, Frozen
from hyperdb.adapters.full import Full
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.token import Token, TokenConfig
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hyperdb.adapters.site import Site


@dataclass
class CustomConfig(TokenConfig):
    """The vectors of the rare token, as of Textual Inversion, and every weight of the keys and values of the text.

    The word begins at the class word, where the paper takes another rare word. Keys and values of a prompt's first
    token, which say nothing of it, are trained with the others: the reference's code takes their gradient away.
    """

    sites: str = "custom"
    kinds = ("linear", "embedding")

    def build(self, layout: Layout) -> CustomDiffusion:
        """Return the adapter over `layout`, of which the first place is the embedding of the words."""
        return CustomDiffusion(*self.parts(layout))

    def parts(self, layout: Layout) -> tuple[Layout, int, int, int]:
        """Return the layout, the word's row, the row that it begins at, and how many vectors it has."""
        if self.row is None or self.start is None or len(layout) < 2 or {len(x.shape) for x in layout.layers} != {2}:
            raise UserError("a word among layers needs its row, the row it begins at, one embedding, and layers")
        return layout, self.row, self.start, self.vectors


class CustomDiffusion(Frozen):
    """`W + dW` in the layers, dW zero at the start, and the vectors of one word: the first place of the layout."""

    rest: ClassVar[type[Frozen]] = Full

    def __init__(self, layout: Layout, row: int, start: int, vectors: int = 1) -> None:
        super().__init__(layout)
        self.word = Token(Layout(layout.layers[:1]), row, start, vectors)
        self.places = vectors
        self.layers = self.rest(Layout(layout.layers[1:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Set the device on which `init` places tensors."""
        for part in (self.word, self.layers):
            part.to(device, dtype)
        return super().to(device, dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return those of the word, as `vector`, and of the layers, by their names."""
        return {**self.word.shapes(), **self.layers.shapes()}

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return zeros, and the class word's vector."""
        return {**self.word.init(identities, sites), **self.layers.init(identities)}

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the word's change and the layers'."""
        return {**self.word.changes(params), **self.layers.changes(params)}


RIDGE = 1e-6  # of the mean square of the features: directions that no caption has are as cheap as this


# min_W ||W C_reg^T - W0 C_reg^T||_F  s.t.  W C^T = V
def merge(weight: Tensor, regular: Tensor, words: Tensor, values: Tensor) -> Tensor:
    """Return the weight `[m, n]` that makes of the `words` `[s, n]` the `values` `[s, m]`, the paper's equation 5.

    It makes of the features `regular` `[c, n]`, those of common captions, what the frozen `weight` makes of them, as
    nearly as it can. Words and values of several concepts stand one below the other. Computed in float64, on the CPU,
    with a small ridge, for there may be fewer captions than n. Raises `UserError` for words that depend on each other
    linearly.
    """
    import torch

    w, c_reg, c, v = (x.cpu().double() for x in (weight, regular, words, values))
    gram = c_reg.T @ c_reg
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    d = torch.linalg.solve(gram, c.T).T  #                                              [s, n], C (C_reg^T C_reg)^-1
    cross = d @ c.T  #                                                                  [s, s]
    if torch.linalg.cond(cross) > 1e12:
        raise UserError(f"the {len(c)} words to merge depend on each other linearly: give fewer, or train them further")
    return (w + (v - c @ w.T).T @ torch.linalg.solve(cross, d)).to(weight)  #           [m, n]
