"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): the vectors of one word, and nothing else of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from hyperdb.adapters.base import AdapterConfig, Changes, DenseChange, Frozen, NotMergeableError, whole_number
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.base import Adapter
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site

MOST = 64  # vectors of a word: a prompt of CLIP has room for 75 tokens


@dataclass
class TokenConfig(AdapterConfig):
    """The vectors of the rare token, each begun at the class word's.

    `row` and `start` are these two words' rows of the embedding; null: those of the base's `rare_token` and
    `class_word`. More than one of the `vectors` is prompt tuning: in a prompt, which is written as before, the rare
    token then takes as many places.
    """

    row: int | None = None
    start: int | None = None
    vectors: int = 1
    sites: str = "token"
    kinds: ClassVar[tuple[str, ...]] = ("embedding",)

    def __post_init__(self) -> None:
        whole_number("vectors", self.vectors, 1, MOST)
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

    def build(self, layout: Layout) -> Adapter:
        """Return the adapter over `layout`."""
        if self.row is None or self.start is None or len(layout) != 1 or len(layout.layers[0].shape) != 2:
            raise UserError("a word vector needs its row, the row it begins at, and one embedding")
        return Token(layout, self.row, self.start, self.vectors)


class Row(DenseChange):
    """Vectors `[I, C]` or `[I, k, C]` in place of one row of an embedding; the first tensor, `[1]`, is its number.

    Where the word stands, its k vectors stand one after the other. What follows moves back by k - 1 places, and what
    finds no place is cut off before the last token, as a tokenizer cuts. Two such changes of k > 1 do not add up.
    """

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return the difference to the words as they stand: ids `[R, I, S, L]`, y `[R, I, S, L, C]`."""
        row, vector = self.tensors
        hit = x == row.to(x)
        if vector.ndim == 2:
            return (vector.to(y)[:, None, None] - y) * hit.unsqueeze(-1)
        import torch

        count, length = vector.shape[1], x.shape[-1]
        width = 1 + (count - 1) * hit.long()
        end = width.cumsum(-1)
        place = torch.arange(length, device=x.device).expand_as(end).contiguous()
        source = torch.searchsorted(end, place, right=True)  #       [R, I, S, L], the token that comes to a place
        source[..., -1] = length - 1
        which = (place - (end - width).gather(-1, source)).clamp(0, count - 1)  #   of its k vectors
        moved = y.gather(-2, source.unsqueeze(-1).expand_as(y))
        people = torch.arange(len(vector), device=x.device).view(-1, 1, 1)
        put = vector.to(y)[people, which]  #                          [R, I, S, L, C]
        return torch.where(hit.gather(-1, source).unsqueeze(-1), put, moved) - y

    def settled(self, site: Site) -> Row:
        """Return it on the site's device."""
        return Row(*(x.detach().to(site.parameter.device) for x in self))

    def dense(self, weight: Tensor) -> Tensor:
        """Return `[I, V, C]`, zero in every other row. Raises `NotMergeableError` for several vectors."""
        row, vector = self.tensors
        if vector.ndim > 2:
            raise NotMergeableError(f"a word of {vector.shape[1]} vectors takes as many places: no weight does that")
        change = weight.new_zeros(len(vector), *weight.shape)
        change[:, int(row)] = vector.to(weight) - weight[int(row)]
        return change

    def check(self, site: Site) -> None:
        """Raise `UserError` if the embedding has no such row, or another width."""
        row, vector = self.tensors
        fits = vector.ndim in (2, 3) and vector.shape[-1:] == site.shape[1:]
        if site.kind != "embedding" or int(row) >= site.shape[0] or not fits:
            raise UserError(
                f"{site.name} {list(site.shape)} takes no vector of {list(vector.shape[1:])} in row {int(row)}"
            )


class Token(Frozen):
    """One row of an embedding, or several in its place; every other row stays as it is, bit for bit."""

    def __init__(self, layout: Layout, row: int, start: int, vectors: int = 1) -> None:
        super().__init__(layout)
        words = layout.layers[0].shape[0]
        for name, value in (("row", row), ("start", start)):
            if value >= words:
                raise UserError(f"adapter.{name}={value}: the base has {words} words, the last is {words - 1}")
        self.row, self.start, self.places = row, start, vectors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return that of one vector, `(C,)`, or of several, `(k, C)`."""
        width = self.layout.layers[0].shape[1:]
        return {"vector": width if self.places == 1 else (self.places, *width)}

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{vector: [I, C] or [I, k, C]}`, each vector the class word's: the person begins as anybody."""
        assert sites is not None, "a word vector begins at a row of the embedding"
        vector = sites[self.layout.names[0]].weight()[self.start].float()
        return {"vector": vector.expand(identities, *self.shapes()["vector"]).clone().to(self.device)}

    # argmin_v E |eps(z_t, c(v)) - eps|^2
    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the vectors in their row."""
        vector = params["vector"]
        return {self.layout.names[0]: Row(vector.new_tensor([self.row]).long(), vector)}
