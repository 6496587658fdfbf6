"""What a personalisation is: low-rank residuals of linear layers, with a leading identity axis.

Knows no diffusion model. Configurations live here and import no torch; `build` loads the class it configures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.lidb import LiDB
    from hyperdb.adapters.lora import LoRA


def _check(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name}={value!r}: expected a whole number from {low} to {high}")


@dataclass
class LiDBConfig:
    """Lightweight DreamBooth: `rank * (a + b)` numbers a layer in bases from `seed` (paper: 100, 50, 1)."""

    a: int = 100
    b: int = 50
    rank: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check("a", self.a, 1, 4096)
        _check("b", self.b, 1, 4096)
        _check("rank", self.rank, 1, 256)
        _check("seed", self.seed, 0, 2**63 - 1)

    def build(self, layout: Layout) -> LiDB:
        """Return the adapter over `layout`."""
        from hyperdb.adapters.lidb import LiDB

        return LiDB(layout, self.a, self.b, self.rank, self.seed)


@dataclass
class LoRAConfig:
    """Plain low-rank residual, `rank * (m + n)` numbers a layer; zero at the start."""

    rank: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check("rank", self.rank, 1, 4096)
        _check("seed", self.seed, 0, 2**63 - 1)

    def build(self, layout: Layout) -> LoRA:
        """Return the adapter over `layout`."""
        from hyperdb.adapters.lora import LoRA

        return LoRA(layout, self.rank, self.seed)
