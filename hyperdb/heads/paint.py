"""Albedo and gloss of skin, eyes, mouth and cloth, painted in canonical head coordinates."""

from __future__ import annotations

import numpy as np

from hyperdb.heads.hair import scalp_mask
from hyperdb.heads.identity import Identity
from hyperdb.heads.mesh import CLOTH, head_mesh
from hyperdb.heads.raster import noise, smoothstep


def _bell(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    return np.exp(-(((x - centre) / width) ** 2))


def _blend(albedo: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    albedo += mask[:, None] * (colour - albedo)


def brow_mask(identity: Identity, points: np.ndarray) -> np.ndarray:
    """Opacity of the eyebrows at canonical points [n, 3]."""
    paint = identity.paint
    x, y, z = points.T
    around = np.abs(x)
    along = np.clip((around - 0.10) / 0.50, 0, 1)
    arch = paint.brow_arch * np.sin(along * np.pi * 0.85) * 1.6
    centre = 7.50 + paint.brow_height + arch - 0.035 * along**2.2 - 0.02
    width = paint.brow_width * (1 - 0.55 * along) * smoothstep(0.0, 0.10, along)
    mask = np.exp(-(((y - centre) / np.maximum(width, 0.004)) ** 4))
    mask *= smoothstep(0.07, 0.13, around) * smoothstep(0.66, 0.52, around)
    mask *= smoothstep(0.9, 1.2, z) * paint.brow_density
    return mask * (0.7 + 0.3 * noise(x * 60 + y * 40, y * 12, z, identity.seed + 9))


def _beard_mask(identity: Identity, points: np.ndarray, lips: np.ndarray) -> np.ndarray:
    paint = identity.paint
    x, y, z = points.T
    around, front = np.abs(x), smoothstep(0.9, 1.2, z)
    jaw = smoothstep(6.95, 6.6, y - 0.28 * smoothstep(0.35, 0.75, around))
    jaw *= smoothstep(5.9, 6.25, y + 0.25 * front) * smoothstep(0.3, 0.75, z)
    cheek = np.exp(-(((around - 0.42) / 0.2) ** 2) - ((y - 6.95) / 0.18) ** 2)
    moustache = np.exp(-(((y - 6.865) / 0.05) ** 2) - (x / 0.30) ** 4) * front
    mask = jaw * (1 - 0.9 * cheek) * paint.beard + moustache * paint.moustache
    grain = noise(x * 30, y * 30, z * 30, identity.seed + 4)
    return np.clip(np.clip(mask, 0, 1) * (1 - lips) * (0.6 + 0.4 * grain), 0, 0.9)


def paint_skin(
    identity: Identity, points: np.ndarray, lips: np.ndarray, lids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Albedo [n, 3] and gloss [n] of the body surface at canonical points."""
    paint, seed = identity.paint, identity.seed
    x, y, z = points.T
    around, front = np.abs(x), smoothstep(0.9, 1.2, z)
    albedo = np.tile(paint.skin.astype(np.float32), (len(points), 1))
    mottle = 0.08 * (noise(x * 3, y * 3, z * 3, seed) - 0.5)
    mottle += 0.06 * (noise(x * 9, y * 9, z * 9, seed + 1) - 0.5)
    albedo *= (1 + mottle)[:, None]

    cheeks = np.exp(-(((around - 0.5) / 0.2) ** 2) - ((y - 6.95) / 0.2) ** 2)
    nose = np.exp(-((x / 0.13) ** 2) - ((y - 6.98) / 0.13) ** 2)
    albedo *= 1 - (paint.blush * (cheeks + 0.7 * nose) * front)[:, None] * (0.0, 0.20, 0.18)
    if paint.freckles > 0:
        spots = smoothstep(0.66, 0.78, noise(x * 22, y * 22, z * 22, seed + 5))
        spots *= np.exp(-(((around - 0.3) / 0.35) ** 2) - ((y - 7.0) / 0.22) ** 2)
        albedo *= 1 - (spots * paint.freckles * front)[:, None] * (0.3, 0.45, 0.55)
    for mole_x, mole_y in paint.moles:
        spot = np.exp(-((x - mole_x) ** 2 + (y - mole_y) ** 2) / 0.0005)
        albedo *= 1 - (0.42 * spot * front)[:, None]
    if paint.wrinkles > 0:
        lines = np.cos(y * 75 + 1.5 * np.sin(x * 3)) ** 8 * _bell(y, 7.78, 0.13)
        fold = np.exp(-(((around - 0.30 - 0.45 * (6.95 - y)) / 0.03) ** 2)) * _bell(y, 6.85, 0.14)
        bags = np.exp(-(((np.hypot(around - 0.32, (y - 7.27) * 1.3) - 0.24) / 0.03) ** 2)) * (y < 7.2)
        marks = (0.16 * lines + 0.28 * fold + 0.18 * bags) * paint.wrinkles * front
        albedo *= 1 - marks[:, None]

    _blend(albedo, lips * paint.lip_strength, paint.skin * paint.lip / 0.82)
    albedo *= 1 - (lids * paint.makeup * 0.7)[:, None] * (0.5, 0.6, 0.45)
    ring = np.hypot((around - 0.33) / 1.35, (y - 7.285) * 1.9)
    lashes = _bell(ring, 0.155, 0.03) * front * (0.6 + 0.4 * (y > 7.285))
    albedo *= 1 - (lashes * (0.28 + 0.4 * paint.makeup))[:, None]
    _blend(albedo, brow_mask(identity, points), paint.brow)
    if paint.beard > 0:
        _blend(albedo, _beard_mask(identity, points, lips), identity.hair.colour * 0.9)
    scalp = scalp_mask(identity, points)
    scalp *= 0.8 + 0.2 * noise(x * 26, y * 26, z * 26, seed + 6)
    _blend(albedo, scalp, identity.hair.colour * 0.9)
    shirt = smoothstep(5.60, 5.52, y - 0.10 * np.cos(x * 1.3) - 0.15 * smoothstep(0.2, 0.9, z))
    _blend(albedo, shirt, paint.cloth)
    return albedo, 0.20 * (1 - scalp) * (1 - shirt) + 0.22 * lips


def paint_eye(identity: Identity, points: np.ndarray, side: int, gaze: tuple[float, float]) -> np.ndarray:
    """Albedo [n, 3] of an eyeball at canonical points; side 0 or 1."""
    mesh = head_mesh()
    direction = points - mesh.vertices[mesh.eyes[side]].mean(0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) + 1e-9
    look = np.array([gaze[0], gaze[1] - 0.02, 1.0])
    look /= np.linalg.norm(look)
    angle = np.arccos(np.clip(direction @ look, -1, 1))
    white = np.array([0.80, 0.775, 0.76])
    albedo = white - 0.10 * smoothstep(0.5, 1.1, angle)[:, None] * (0.4, 1, 1)
    turn = np.arctan2(direction[:, 1] - look[1], direction[:, 0] - look[0])
    fibres = 0.8 + 0.4 * noise(turn * 8, angle * 8, 0.5, identity.seed + 8)
    iris = identity.paint.iris * 1.25 * (fibres * (1 - 0.5 * smoothstep(0.38, 0.49, angle)))[:, None]
    _blend(albedo, smoothstep(0.53, 0.48, angle), iris)
    albedo *= (1 - 0.96 * smoothstep(0.24, 0.20, angle))[:, None]
    return albedo * (1 - 0.6 * smoothstep(7.30, 7.39, points[:, 1]))[:, None]


MOUTH_COLOURS = {3: (0.82, 0.76, 0.66), 4: (0.76, 0.70, 0.60), 5: (0.58, 0.28, 0.28)}


def cloth_colour(seed: int) -> np.ndarray:
    """A colour for a hat, a scarf: seeded, seldom grey."""
    rng = np.random.default_rng((seed, CLOTH))
    hue, value, tone = rng.random(), rng.uniform(0.25, 0.75), rng.uniform(0.3, 0.8)
    rgb = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - tone + tone * rgb)
