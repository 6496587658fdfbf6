"""Cut faces out: the FFHQ / CelebA-HQ crop, the crop that recognisers expect, a plain square."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from hyperdb.faces.detect import Face, detect_at, detect_turned
from hyperdb.runtime.errors import UserError

# Where ArcFace and SFace expect the five points in 112x112 (Deng et al. 2019, insightface).
ARCFACE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def _warp(
    rgb: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, border: int
) -> NDArray[np.uint8]:
    """Warp by source -> target `matrix` [2, 3]; drawn larger and averaged when it shrinks."""
    shrink = 1 / math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    k = max(1, min(math.ceil(shrink - 1e-6), 16_384 // size))
    larger = matrix * k
    larger[:, 2] += (k - 1) / 2  # pixel centres, not corners
    drawn = cv2.warpAffine(
        rgb, larger, (size * k, size * k), flags=cv2.INTER_CUBIC, borderMode=border
    )
    if k > 1:
        drawn = cv2.resize(drawn, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(drawn, dtype=np.uint8)


def ffhq_quad(points: NDArray[np.floating], scale: float = 1.0) -> NDArray[np.float64]:
    """Return the crop's corners [4, 2]: top left, bottom left, bottom right, top right.

    The formula of FFHQ (Karras et al. 2019, `recreate_aligned_images`) and CelebA-HQ on five
    points instead of 68; `scale` widens (> 1) or tightens (< 1) the frame around its centre.
    """
    p = np.asarray(points, dtype=np.float64)
    eyes, mouth = p[:2].mean(0), p[3:5].mean(0)
    eye_to_eye, eye_to_mouth = p[1] - p[0], mouth - eyes
    x = eye_to_eye - eye_to_mouth[::-1] * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8) * scale
    y = x[::-1] * [-1, 1]
    c = eyes + eye_to_mouth * 0.1
    return np.stack([c - x - y, c - x + y, c + x + y, c + x - y])


def _quad_matrix(quad: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    far = size - 0.5  # corners lie half a pixel outside the centres
    target = np.array([[-0.5, -0.5], [-0.5, far], [far, far]], dtype=np.float32)
    return np.asarray(cv2.getAffineTransform(quad[:3].astype(np.float32), target), np.float64)


def _look_closer(rgb: NDArray[np.uint8], face: Face) -> tuple[Face, int]:
    """Detect eight times in the face's upright crop; return it with the mean points, and how often it was seen.

    At four sizes, plain and mirrored (50 ms). Over one photo at many sizes the points of a single detection scatter by
    4 % of the eye distance, which shifts and scales a crop visibly; these scatter by 1 %.
    """
    size, order = 288, [1, 0, 2, 4, 3]  # left and right change places in the mirror
    matrix = _quad_matrix(ffhq_quad(face.points), size)
    back = np.asarray(cv2.invertAffineTransform(matrix), np.float64)
    upright = _warp(rgb, matrix, size, cv2.BORDER_REFLECT_101)
    mirror = np.ascontiguousarray(upright[:, ::-1])
    expected = face.points @ matrix[:, :2].T + matrix[:, 2]
    tolerance = np.linalg.norm(expected[1] - expected[0]) / 3
    kept: list[NDArray[np.floating]] = []
    for longest in (192, 224, 256, 288):
        seen: list[NDArray[np.floating]] = [f.points for f in detect_at(upright, longest)]
        seen += [(f.points * [-1, 1] + [size - 1, 0])[order] for f in detect_at(mirror, longest)]
        kept += [p for p in seen if np.linalg.norm(p - expected, axis=1).mean() < tolerance]
    if not kept:
        return face, 0
    points = np.mean(kept, axis=0) @ back[:, :2].T + back[:, 2]
    return replace(face, points=points.astype(np.float32)), len(kept)


def crop(
    rgb: NDArray[np.uint8], points: NDArray[np.floating], size: int, scale: float = 0.8
) -> NDArray[np.uint8]:
    """Cut the upright face out of [H, W, 3] as [size, size, 3], reflecting beyond the border.

    `scale` 1.0 is the framing of FFHQ; 0.8, which the embedded base uses, lets the face fill it.
    """
    matrix = _quad_matrix(ffhq_quad(points, scale), size)
    return _warp(rgb, matrix, size, cv2.BORDER_REFLECT_101)


def similarity(source: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the [2, 3] rotation, scale and shift that best maps points [n, 2] (Umeyama 1991)."""
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    mean, goal = source.mean(0), target.mean(0)
    a, b = source - mean, target - goal
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ np.diag(sign) @ vt * ((s * sign).sum() / (a**2).sum())
    return np.column_stack([rotation, goal - rotation @ mean])


def to_points(
    rgb: NDArray[np.uint8],
    points: NDArray[np.floating],
    target: NDArray[np.floating],
    size: int,
) -> NDArray[np.uint8]:
    """Warp [H, W, 3] to [size, size, 3] so that `points` fall on `target`; black beyond it."""
    return _warp(rgb, similarity(points, target), size, cv2.BORDER_CONSTANT)


def arcface(rgb: NDArray[np.uint8], points: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the [112, 112, 3] alignment on which ArcFace-like recognisers were trained."""
    return to_points(rgb, points, ARCFACE, 112)


def square(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cut the central square out and resize it: for pictures that are face crops already."""
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(cut, (size, size), interpolation=how), dtype=np.uint8)


def choose(
    faces: Sequence[Face], face: int | None = None, name: str = "the picture"
) -> tuple[Face, str | None]:
    """Pick the largest face, or the `face`-th largest (from 1), and a notice if there are others.

    Raises `UserError` naming the file when there is no face, or none of that number.
    """
    if face is not None and face < 1:
        raise UserError(f"face={face} is no face of {name}; face=1 is the largest one")
    if not faces:
        raise UserError(
            f"no face found in {name}; use a picture with a clearly visible face, "
            "or align=false if it is a face crop already"
        )
    if face is None:
        notice = f"{name} shows {len(faces)} faces; the largest is used, choose with face=2 etc."
        return faces[0], notice if len(faces) > 1 else None
    if face > len(faces):
        shown = "1 face" if len(faces) == 1 else f"{len(faces)} faces"
        raise UserError(f"face={face}, but {name} shows {shown}; choose 1 to {len(faces)}")
    return faces[face - 1], None


def invented(rgb: NDArray[np.uint8], quad: NDArray[np.float64]) -> float:
    """Return the share of a crop's corners [4, 2] that lies beyond the picture, where it is reflected."""
    height, width = rgb.shape[:2]
    frame = np.array([[0, 0], [0, height], [width, height], [width, 0]], np.float32) - 0.5
    corners = quad.astype(np.float32)
    return max(0.0, 1 - cv2.intersectConvexConvex(corners, np.asarray(frame, np.float32))[0] / cv2.contourArea(corners))


def _is_cut(rgb: NDArray[np.uint8], face: Face) -> bool:
    """Whether the frame of the picture cuts through the face itself, the middle half of its FFHQ crop."""
    # Of whole faces, portraits cut tightly at forehead and cheeks among them, at most .17 lay outside.
    eyes, mouth = face.points[:2], face.points[3:]
    unit = max(np.linalg.norm(eyes[1] - eyes[0]), np.linalg.norm(mouth.mean(0) - eyes.mean(0)))
    last = np.array([rgb.shape[1], rgb.shape[0]]) - 1
    margin = min(face.points.min(), (last - face.points).min())
    return bool(margin < 0.2 * unit or invented(rgb, ffhq_quad(face.points, 0.5)) > 0.18)


def require_whole(
    rgb: NDArray[np.uint8], face: Face, scale: float = 0.8, name: str = "the picture"
) -> tuple[Face, list[str]]:
    """Return the face refined, and notices about what its crop will not show as it is.

    Raises `UserError` for a face whose crop would show somebody else: cut by the frame of the picture (its other half
    would be a reflection), not found again in its own crop, or with a crop that lies mostly outside the picture.
    """
    refined, often = _look_closer(rgb, face)
    another = f"use another picture of this person, or another face of {name}"
    if _is_cut(rgb, face) or _is_cut(rgb, refined):
        raise UserError(f"the face in {name} is cut by the frame of the picture; {another}")
    if often < 3:
        raise UserError(
            f"what looks like a face in {name} is not plausible: {often} of 8 closer looks find it again, so it may be "
            f"turned away, covered, badly tilted or no face at all; {another}"
        )
    share = invented(rgb, ffhq_quad(refined.points, scale))
    if share > 0.5:
        raise UserError(
            f"{share:.0%} of the crop of the face in {name} would lie outside the picture; use one that shows more "
            "around the face, a smaller crop, or align=false if it is a face crop already"
        )
    notices = []
    if face.turn:
        way = ("90 degrees counter-clockwise", "180 degrees", "90 degrees clockwise")[face.turn - 1]
        notices.append(f"{name} does not stand upright; it is turned by {way}")
    if share >= 0.1:
        notices.append(f"{share:.0%} of the crop of {name} lie outside the picture and are invented by reflection")
    return refined, notices


def face_crop(
    rgb: NDArray[np.uint8],
    size: int,
    scale: float = 0.8,
    face: int | None = None,
    name: str = "the picture",
    align: bool = True,
) -> tuple[NDArray[np.uint8], str | None]:
    """Detect, choose and crop: [H, W, 3] -> ([size, size, 3], a notice for the user or None).

    `align=False` takes the central square as it is. Raises the errors of `choose` and `require_whole`.
    """
    if not align:
        return square(rgb, size), None
    chosen, notice = choose(detect_turned(rgb), face, name)
    refined, notices = require_whole(rgb, chosen, scale, name)
    notices = ([notice] if notice else []) + notices
    return crop(rgb, refined.points, size, scale), "; ".join(notices) or None
