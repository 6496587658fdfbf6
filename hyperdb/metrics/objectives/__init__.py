"""What the judges that are trained here learn, from rendered people. The configurations import no torch.

An objective is one file of this package, its configuration here, and a yaml in conf/judge.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base
    from hyperdb.metrics.objectives.objective import Objective


@dataclass
class ObjectiveConfig:
    """Which judge is trained, with the settings that only this one has."""

    kind = ""  # the objective's file and class
    least = 1  # people that must be held out, for the judge to be measured

    def objective(self, people: People, seen: Tensor, base: Base) -> Objective:
        """Return what is trained, on the rows `seen` of people. Raises `UserError` if they are too few for it."""
        module, _, name = self.kind.partition(".")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(self, people, seen, base)


@dataclass
class PromptsConfig(ObjectiveConfig):
    """Learns to name the style and the place of a picture: whether a prompt is obeyed."""

    kind = "prompts.PromptsObjective"


@dataclass
class ClipConfig(ObjectiveConfig):
    """Learns which caption belongs to which picture (CLIP, Radford et al. 2021), with the vocabulary of the base."""

    kind = "clip.ClipObjective"
    least = 2  # a probe learns from one half of them and asks the other
    width: int = 128  # of the transformer that sees pictures; heads are 32 wide
    layers: int = 4
    patch: int = 8  # side in pixels
    text_width: int = 96  # of the transformer that reads captions, and of the features
    text_layers: int = 2

    def __post_init__(self) -> None:
        for name in ("width", "text_width"):
            if (value := getattr(self, name)) < 32 or value % 32:
                raise UserError(f"judge.{name}={value}: expected a multiple of 32")


@dataclass
class EncoderConfig(ObjectiveConfig):
    """What learns is a convolutional network of four levels, each twice as wide as the one before."""

    least = 2
    width: int = 24  # of the first level; features are 8 times as wide

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"judge.width={self.width}: expected at least 1")


@dataclass
class VICRegConfig(EncoderConfig):
    """Learns, without any label, what two views of one picture have in common (VICReg, Bardes et al. 2022)."""

    kind = "vicreg.VICRegObjective"
    expander: int = 1024  # width of the three layers between the features and the loss, which are thrown away


@dataclass
class VerifierConfig(EncoderConfig):
    """Learns whether pictures, in any styles, are of one person (supervised contrast, Khosla et al. 2020)."""

    kind = "verifier.VerifierObjective"
    pictures: int = 4  # of a person in a step; a person with fewer shows all
    temperature: float = 0.1  # that cosines are divided by

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 2:
            raise UserError(f"judge.pictures={self.pictures}: expected at least 2")
        if self.temperature <= 0:
            raise UserError(f"judge.temperature={self.temperature}: expected more than 0")
