"""VICReg as a judge: how like pictures are as a whole, by an encoder of this repository, trained without labels."""

from __future__ import annotations

from typing import ClassVar

from hyperdb.metrics.dino import Dino


class VICReg(Dino):
    """What DINO is of photographs, of rendered people: `hyperdb.metrics.objectives.vicreg` says what it learned.

    In place of a classifier it has the map that whitens its features, or else the little in which people differ would
    count for nothing beside styles and places.
    """

    name = "vicreg"
    classes: ClassVar[dict[str, int]] = {}  # as `config.json` has it
    made_by = "hyperdb train_judge judge=vicreg"
