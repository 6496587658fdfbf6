"""P+ (Voynov et al. 2023, arXiv 2303.09522): a vector of one word for each attention to the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from hyperdb.adapters.base import Changes, Frozen, Replacement
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.token import Row, Token, TokenConfig
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hyperdb.adapters.inject import Injection
    from hyperdb.adapters.site import Site


@dataclass
class PlusConfig(TokenConfig):
    """The vectors of the rare token, one for each attention of the UNet to the text, each begun at the class word's.

    The text encoder then runs once for each of these attentions, 16 times on Stable Diffusion 1.5. Several vectors for
    one attention (`vectors` above 1) are refused: they are `textual_inversion`'s.
    """

    sites: str = "plus"
    kinds: ClassVar[tuple[str, ...]] = ("text", "linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors != 1:
            raise UserError(f"vectors={self.vectors}: P+ has one an attention; adapter=textual_inversion has more")

    def build(self, layout: Layout) -> Plus:
        """Return the adapter over `layout`: the text encoder, then keys and values of every attention to the text."""
        named = [layer.name.rpartition(".") for layer in layout.layers[1:]]
        pairs = len(named) > 1 and all(one[0] == two[0] for one, two in zip(named[::2], named[1::2], strict=False))
        if self.row is None or self.start is None or len(layout) % 2 == 0 or not pairs:
            raise UserError("P+ needs a word's row, the row it begins at, a text encoder, and keys with their values")
        return Plus(layout, self.row, self.start)


class Contexts(Replacement):
    """Of the text encoder: `[B, G L, C]`, what it makes of the prompts with each vector; the first tensor is the row.

    The second are the vectors, `[I, G, C]`.
    """

    def replace(self, site: Site, x: Tensor, output: Any, use: Injection) -> Any:
        """Return the output with contexts of all vectors one behind the other."""
        import torch

        from hyperdb.adapters.inject import Injection

        row, vectors = self.tensors
        inner = Injection({"words": site.module.get_input_embeddings()})  # type: ignore[operator]
        found = []
        try:
            for vector in vectors.unbind(1):
                with inner.using({"words": Row(row, vector)}, use.strength, use.repeat, use.plain):
                    found.append(site.module.forward(x)[0])
        finally:
            inner.remove()
        output["last_hidden_state"] = torch.cat(found, 1)
        return output

    def check(self, site: Site) -> None:
        """Raise `UserError` if it is no text encoder, or its words are others."""
        row, vectors = self.tensors
        if site.kind != "text" or vectors.ndim != 3 or vectors.shape[-1] != site.shape[1] or int(row) >= site.shape[0]:
            raise UserError(
                f"{site.name} {list(site.shape)} takes no vectors of {list(vectors.shape[1:])} for word {int(row)}"
            )


class Part(Replacement):
    """Of keys or values: those of one vector's context alone. It has no numbers; `number` of `count` is in its type."""

    number, count = 0, 1

    def replace(self, site: Site, x: Tensor, output: Any, use: Injection) -> Any:
        """Return the part of the output `[B, G L, m]` that belongs to this attention, `[B, L, m]`."""
        length = output.shape[1] // self.count
        if length * self.count != output.shape[1]:
            raise UserError(f"{site.name} has read {output.shape[1]} words, not those of {self.count} vectors")
        return output[:, self.number * length : (self.number + 1) * length]

    def check(self, site: Site) -> None:
        """Raise `UserError` for what is no linear layer."""
        if site.kind != "linear":
            raise UserError(f"{site.name} is no linear layer: P+ changes keys and values")


@cache
def part_of(number: int, count: int) -> type[Part]:
    """Return the `Part` of one of so many attentions."""
    return type(f"Part_{number}_of_{count}", (Part,), {"number": number, "count": count})


class Plus(Frozen):
    """G vectors of one word, of which every attention to the text reads its own; everything else stays as it is."""

    def __init__(self, layout: Layout, row: int, start: int) -> None:
        super().__init__(layout)
        self.word = Token(Layout(layout.layers[:1]), row, start)
        self.keys = layout.names[1:]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Set the device on which `init` places tensors."""
        self.word.to(device, dtype)
        return super().to(device, dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return `{vector: (G, C)}`."""
        return {"vector": (len(self.keys) // 2, *self.layout.layers[0].shape[1:])}

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{vector: [I, G, C]}`, each the class word's."""
        vector = self.word.init(identities, sites)["vector"]
        return {"vector": vector[:, None].repeat(1, *self.shapes()["vector"][:1], 1)}

    # p+ = (p_1, ..., p_G): the attention g reads the prompt in which the word is v_g
    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the text encoder's change, and of keys and values which part they read."""
        vectors = params["vector"]
        count = vectors.shape[1]
        parts = {name: part_of(i // 2, count)() for i, name in enumerate(self.keys)}
        return {self.layout.names[0]: Contexts(vectors.new_tensor([self.word.row]).long(), vectors), **parts}
