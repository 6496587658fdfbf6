"""What every judge that is trained here has in common: what it draws, its loss, its file, its measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.metrics.obedience import SIDE

if TYPE_CHECKING:
    from hyperdb.data.people import People


def pixels(images: Tensor) -> Tensor:
    """Return images `[B, 3, H, W]` in [0, 255] as small networks take them: `[B, 3, SIDE, SIDE]` in [-1, 1]."""
    x = images.float()
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return x / 127.5 - 1


def reduced(images: Tensor) -> Tensor:
    """Return images `[B, 3, H, W]` as floats, those larger than networks see them at `[B, 3, SIDE, SIDE]`."""
    x = images.float()
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True) if x.shape[-1] > SIDE else x


class Objective(nn.Module, ABC):
    """What is trained on rendered people, the rows `seen` of them: its parameters, the loss, and what comes out."""

    def __init__(self, people: People, seen: Tensor) -> None:
        super().__init__()
        self.people, self.seen = people, seen

    def draw(self, count: int, g: torch.Generator) -> Tensor:
        """Return the rows of a step, about `count`. The first half of them goes through the autoencoder."""
        return self.seen[torch.randint(0, len(self.seen), (count,), generator=g)]

    @abstractmethod
    def forward(self, images: Tensor, rows: Tensor, g: torch.Generator) -> Any:
        """Return what the networks make of images `[B, 3, H, W]` in [0, 255], the rows `[B]`; bf16 is allowed."""

    @abstractmethod
    def loss(self, found: Any, rows: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, in float32, of what `forward` found."""

    @abstractmethod
    def save(self, out: Path, metadata: dict[str, str]) -> Any:
        """Write the judge as `out/judge.safetensors` or a folder `out/judge`; return it as it is read from there."""

    @abstractmethod
    def measure(self, judge: Any, images: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
        """Return {figure: {of what: value}} of a judge, on images `[B, 3, H, W]` uint8 of rows it has not seen."""
