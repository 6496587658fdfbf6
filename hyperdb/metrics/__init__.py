"""Judges of pictures: frozen encoders, and the scores made from what they say. The registry imports no torch.

A judge is one file of this package and one line here. It is a `hyperdb.metrics.feature.Feature`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from hyperdb.runtime.paths import FilePath

RECOGNISERS = {
    "sface": "face.SFace",
    "dlib": "face.Dlib",
    "facenet": "facenet.Facenet",
    "verifier": "verifier.Verifier",
}
"""{name: where the class is}, of judges of who it is."""

ENCODERS = {
    "clip": "clip.Clip",
    "dino": "dino.Dino",
    "vicreg": "vicreg.VICReg",
}
"""{name: where the class is}, of judges of whole pictures, which `JudgesConfig` gives their weights."""


@dataclass
class JudgesConfig:
    """The weights of judges that bring none: a folder in the hub's layout, or a hub id. null: it is not asked.

    The recognisers are asked where `recognisers` name them. An id may end in `@REVISION`. Weights are read from
    `model.safetensors` alone.
    """

    clip: FilePath | None  # of transformers: the figures clip_i and clip_t
    dino: FilePath | None  # of timm: the figure dino
    vicreg: FilePath | None  # `hyperdb train_judge judge=vicreg`, or another of timm: the figure vicreg
    facenet: FilePath | None  # docs/stable_diffusion.md makes one: the recogniser facenet
    verifier: FilePath | None  # `hyperdb train_judge judge=verifier`: the recogniser verifier

    def asked(self) -> dict[str, str]:
        """Return {name: folder or hub id} of the judges of whole pictures that are asked."""
        return {name: path for name in ENCODERS if (path := getattr(self, name)) is not None}


def judge(name: str, *settings: Any) -> Any:
    """Return the judge called `name`, made with `settings`. Raises `UserError` if what it needs is missing."""
    module, _, kind = (RECOGNISERS | ENCODERS)[name].partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(*settings)
