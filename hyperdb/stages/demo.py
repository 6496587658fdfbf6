"""Personalise a rendered person that no training has seen and a real photo, and say where the pictures are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.paths import FilePath
from hyperdb.tuning import photos
from hyperdb.tuning.personalizer import PersonalizerConfig

if TYPE_CHECKING:
    from hyperdb.tuning.memory import Sketch

WRITES = ("rendered.png", "astronaut.png")


@dataclass(kw_only=True)
class Config(PersonalizerConfig):
    """`person`: a seed of the validation or test split; the photo is scikit-image's astronaut (NASA, public domain)."""

    image: FilePath = "none"
    out: FilePath = "runs/demo/default"
    person: int = 1_100_003


def passes(config: Config, sketch: Sketch) -> None:
    """Measure prediction, fine-tuning and preview of one of the two."""
    photos.passes(config, sketch)


def run(config: Config) -> Path:
    """Write `out/rendered` and `out/astronaut`, each what `hyperdb personalize` writes."""
    from skimage.data import astronaut

    from hyperdb.faces.image import save_png
    from hyperdb.heads import Identity, View, render
    from hyperdb.heads.split import SPLITS
    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.output import claim

    if not any(config.person in SPLITS[split] for split in ("validation", "test")):
        raise UserError(f"person={config.person} is of the training split or of none; take one from 1100000 to 1199999")
    out = claim(config.out, WRITES, {"person": config.person})
    pictures = {"rendered": render(Identity(config.person), View(), size=256), "astronaut": astronaut()}
    for name, pixels in pictures.items():
        print(f"--- {name}")
        photo = save_png(out / f"{name}.png", pixels)
        photos.personalize(dataclasses.replace(config, image=str(photo), out=str(out / name)))
    if config.preview:
        print("\nThe pictures:")
        for name in pictures:
            print(f"  {out / name / 'preview.png'}")
    return out
