"""What a metric's encoder is: a batch of pictures in, one row of numbers a picture out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Feature(Protocol):
    """A frozen encoder of pictures."""

    name: str
    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 [N, 3, H, W] as float32 [N, dim] of length 1, on the CPU.

        A picture without what the encoder looks for (a face) gives a row of NaN.
        """
        ...


@runtime_checkable
class TextFeature(Feature, Protocol):
    """A frozen encoder of pictures that reads words too, and puts both into one space."""

    def words(self, texts: list[str]) -> Tensor:
        """Encode texts as float32 [N, dim] of length 1, on the CPU."""
        ...


def detection_rate(features: Tensor) -> float:
    """Return the share, in 0..1, of rows [N, C] that are not NaN; NaN for no rows."""
    return float(torch.isfinite(features).all(-1).float().mean())
