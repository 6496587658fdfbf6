"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): one word vector, and nothing else of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Changes, DenseChange, Frozen, whole_number
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


@dataclass
class TokenConfig(AdapterConfig):
    """The vector of the rare token, begun at the class word's.

    `row` and `start` are these two words' rows of the embedding; null: those of the base's `rare_token` and
    `class_word`.
    """

    row: int | None = None
    start: int | None = None
    sites: str = "token"
    kinds = ("embedding",)

    def __post_init__(self) -> None:
        for name in ("row", "start"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 0, 999_998)

    def bound(self, rare: list[int], noun: list[int]) -> TokenConfig:
        """Fill in the rows from the token ids of the two words. Raises `UserError` for a word of several tokens."""
        found = []
        for what, ids, told in (("rare_token", rare, self.row), ("class_word", noun, self.start)):
            if told is None and len(ids) != 1:
                raise UserError(f"the {what} is {len(ids)} tokens of this base; a word vector needs a word that is one")
            found.append(ids[0] if told is None else told)
        return replace(self, row=found[0], start=found[1])

    def build(self, layout: Layout) -> Token:
        """Return the adapter over `layout`."""
        if self.row is None or self.start is None or len(layout) != 1 or len(layout.layers[0].shape) != 2:
            raise UserError("a word vector needs its row, the row it begins at, and one embedding")
        return Token(layout, self.row, self.start)


class Row(DenseChange):
    """A vector `[I, C]` in place of one row of an embedding; the first tensor, `[1]`, is the row's number."""

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return the difference where the word stands, zero elsewhere: ids `[R, I, S, L]`, y `[R, I, S, L, C]`."""
        row, vector = self.tensors
        hit = (x == row.to(x)).unsqueeze(-1)
        return (vector.to(y)[:, None, None] - y) * hit

    def settled(self, site: Site) -> Row:
        """Return it on the site's device."""
        return Row(*(x.detach().to(site.parameter.device) for x in self))

    def dense(self, weight: Tensor) -> Tensor:
        """Return `[I, V, C]`, zero in every other row."""
        row, vector = self.tensors
        change = weight.new_zeros(len(vector), *weight.shape)
        change[:, int(row)] = vector.to(weight) - weight[int(row)]
        return change

    def check(self, site: Site) -> None:
        """Raise `UserError` if the embedding has no such row, or another width."""
        row, vector = self.tensors
        if site.kind != "embedding" or int(row) >= site.shape[0] or vector.shape[1:] != site.shape[1:]:
            raise UserError(
                f"{site.name} {list(site.shape)} takes no vector of {list(vector.shape[1:])} in row {int(row)}"
            )


class Token(Frozen):
    """One row of an embedding; every other row stays as it is, bit for bit."""

    def __init__(self, layout: Layout, row: int, start: int) -> None:
        super().__init__(layout)
        self.row, self.start = row, start

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the vector's."""
        return {"vector": self.layout.layers[0].shape[1:]}

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{vector: [I, C]}`, the class word's: the person begins as anybody."""
        assert sites is not None, "a word vector begins at a row of the embedding"
        vector = sites[self.layout.names[0]].weight()[self.start]
        return {"vector": vector.repeat(identities, 1).to(self.device)}

    # argmin_v E |eps(z_t, c(v)) - eps|^2
    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the vector in its row."""
        vector = params["vector"]
        return {self.layout.names[0]: Row(vector.new_tensor([self.row]).long(), vector)}
