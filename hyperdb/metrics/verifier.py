"""The verifier as a recogniser: is this picture, in whatever style, of that person?"""

from __future__ import annotations

from hyperdb.metrics.dino import Dino


class Verifier(Dino):
    """A timm model of this repository, trained on rendered people in all styles: `hyperdb.metrics.objectives.verifier`.

    It sees the whole picture and looks for no face. So no row of features is NaN, the rate of detection is always 1,
    and a picture without a face has a cosine too. Hair, beard and skin count as much as the features of the face.
    """

    name = "verifier"
    made_by = "hyperdb train_judge judge=verifier"
    without = "or take it out of recognisers"
