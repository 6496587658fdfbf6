"""What a metric's encoder is: a batch of pictures in, one row of numbers a picture out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import torch
from torch import Tensor

from hyperdb.runtime.files import hash_picture, load_made, save_tensors
from hyperdb.runtime.version import __version__


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


class Remembered:
    """A frozen encoder that keeps what it made of each picture in a file, so that it looks at none twice.

    Pictures are told by their content, whichever run shows them. A file of another encoder, or of another version of
    what finds faces, is made anew.
    """

    def __init__(self, feature: Feature, path: Path) -> None:
        self.feature, self.path = feature, path
        self.name, self.dim = feature.name, feature.dim
        by = {"hyperdb": __version__, "opencv": cv2.__version__}  # what finds and aligns a face
        self.told = {"name": feature.name, "digest": str(getattr(feature, "digest", "")), **by}
        self.seen: dict[int, Tensor] = {}
        made = load_made(path)
        if made is not None and made[1] == self.told:
            self.seen = dict(zip(made[0]["pictures"].tolist(), made[0]["features"], strict=True))

    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 [N, 3, H, W] as the encoder does, the new ones alone."""
        names = [hash_picture(image) for image in images]
        new = {name: row for row, name in enumerate(names) if name not in self.seen}
        if new:
            self.seen |= dict(zip(new, self.feature(images[list(new.values())]), strict=True))
            every = {"pictures": torch.tensor(list(self.seen)), "features": torch.stack(list(self.seen.values()))}
            save_tensors(self.path, every, self.told)
        return torch.stack([self.seen[name] for name in names])


def detection_rate(features: Tensor) -> float:
    """Return the share, in 0..1, of rows [N, C] that are not NaN; NaN for no rows."""
    return float(torch.isfinite(features).all(-1).float().mean())
