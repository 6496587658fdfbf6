"""The one ordered list of adapted sites: saved in every artefact, compared on load."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from math import prod
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from hyperdb.adapters.site import Site

MAX_LAYERS, MAX_WIDTH = 10_000, 999_999
SD15 = "d10a533c76865b63"  # digest of Stable Diffusion 1.x's 192 layers
_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)
_ENTRY = re.compile(r"([\w.-]{1,200})((?: [1-9][0-9]{0,5}){1,4})", re.ASCII)


@dataclass(frozen=True)
class Layer:
    """A site by name and shape of its weight: `(out, in)` of a linear layer, `(out, c, h, w)` of a convolution."""

    name: str
    shape: tuple[int, ...]

    @property
    def out(self) -> int:
        """Outputs."""
        return self.shape[0]

    @property
    def in_(self) -> int:
        """Inputs of one output, of a convolution c * h * w; 1 of a vector."""
        return prod(self.shape[1:])

    def __str__(self) -> str:
        return " ".join(map(str, (self.name, *self.shape)))


@dataclass(frozen=True)
class Layout:
    """Layers in token order. Raises `UserError` for no layers, duplicates, odd names or impossible sizes."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise UserError(f"a layout needs 1 to {MAX_LAYERS} layers, not {len(self.layers)}")
        seen: set[str] = set()
        for layer in self.layers:
            if _NAME.fullmatch(layer.name) is None:
                raise UserError(
                    f"layer name {layer.name[:80]!r}: only letters, digits and . _ - (at most 200)"
                )
            if not (1 <= len(layer.shape) <= 4 and all(1 <= side <= MAX_WIDTH for side in layer.shape)):
                raise UserError(f"layer {layer}: sizes must lie in 1 to {MAX_WIDTH}")
            if layer.name in seen:
                raise UserError(f"layer {layer.name} stands twice in the layout")
            seen.add(layer.name)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names in token order."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that name this list."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]

    def to_text(self) -> str:
        """Return `name out in;name out in ...`: nothing in it grows when written as JSON."""
        return ";".join(map(str, self.layers))

    @classmethod
    def from_text(cls, text: str) -> Layout:
        """Parse `to_text`; anything else raises `UserError`."""
        entries = text.split(";", MAX_LAYERS)
        matches = [_ENTRY.fullmatch(entry) for entry in entries]
        for entry, match in zip(entries, matches, strict=True):
            if match is None:
                raise UserError(f"layout entry {entry[:80]!r} is not 'name out in'")
        return cls(tuple(Layer(m[1], tuple(map(int, m[2].split()))) for m in matches if m is not None))

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module]) -> Layout:
        """List linear layers in the order given: what LiDB adapts (also on the meta device)."""
        from torch import nn

        layers = []
        for name, module in modules.items():
            if not isinstance(module, nn.Linear):
                raise UserError(f"layer {name} is a {type(module).__name__}; only nn.Linear can be adapted")
            layers.append(Layer(name, (module.out_features, module.in_features)))
        return cls(tuple(layers))

    @classmethod
    def listing(cls, sites: Mapping[str, Site]) -> Layout:
        """List sites of any kind in the order given."""
        return cls(tuple(Layer(name, site.shape) for name, site in sites.items()))

    def require(self, other: Layout, what: str) -> None:
        """Raise `UserError` naming the first difference unless `other`, that of `what`, equals this."""
        for i, (ours, theirs) in enumerate(zip_longest(self.layers, other.layers)):
            if ours != theirs:
                raise UserError(
                    f"{what} was made for another model: its layer {i} is [{theirs or 'absent'}] "
                    f"and this model's is [{ours or 'absent'}] (name, outputs, inputs); "
                    "use the model it was made for"
                )
