"""VICReg as a judge: how like pictures are as a whole, by an encoder of this repository, trained without labels."""

from __future__ import annotations

from hyperdb.metrics.dino import Dino


class VICReg(Dino):
    """What DINO is of photographs, of rendered people: `hyperdb.metrics.objectives.vicreg` says what it learned."""

    name = "vicreg"
    made_by = "hyperdb train_judge judge=vicreg"
