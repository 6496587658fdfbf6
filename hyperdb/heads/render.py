"""One call from a person and a view to a picture."""

from __future__ import annotations

import cv2
import numpy as np

from hyperdb.heads import scene, shade, styles
from hyperdb.heads.identity import Identity
from hyperdb.heads.view import View

# The name of what this code and heads.npz draw. Every data set carries it, and those of two names are never mixed. It
# changes with any pixel, label or caption, and with nothing else: tests/heads/test_golden_people.py keeps pictures.
ALGORITHM = "d3c370320a9a893a7fc266ebe002834f207f22af4774dc3cae6ffed44db8e5b0"

_SUPERSAMPLE = 2


def render(identity: Identity, view: View, size: int = 64) -> np.ndarray:
    """Render RGB uint8 [size, size, 3]; the same identity and view give the same bytes."""
    buffer = scene.build(identity, view, size * _SUPERSAMPLE)
    surface = shade.paint(identity, view, buffer)
    light = shade.illuminate(view, buffer, surface)
    image = styles.depict(styles.Stage(identity, view, buffer, surface, light))
    image = cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
