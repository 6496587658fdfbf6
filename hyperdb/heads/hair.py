"""Hair as a shell over the skull: thick where the cut is long, fading into the skin at the line.

The shell is a grid of azimuth (0 = front, positive to the viewer's right) and rows that go from
the crown down. Its points are found once by casting rays at the neutral head and then follow
every person's morphs. Below the ears, long cuts leave the skull and hang as a curtain.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from hyperdb.heads.identity import Hair, Identity
from hyperdb.heads.mesh import SKIN, head_mesh
from hyperdb.heads.raster import noise, smoothstep

_COLUMNS, _CAP, _SKIRT = 72, 16, 14
_CENTRE = np.float32([0.0, 7.50, 0.50])
_HANGING = ("medium", "bob", "long")

# cut: (thickness on top, thickness at the sides, canonical height of the lower end)
_SHAPE = {
    "short": (0.13, 0.035, 6.9),
    "parted": (0.17, 0.045, 6.9),
    "receding": (0.08, 0.04, 6.9),
    "curly": (0.24, 0.12, 6.85),
    "afro": (0.42, 0.34, 6.85),
    "fringe": (0.13, 0.09, 6.9),
    "medium": (0.14, 0.13, 6.75),
    "bob": (0.14, 0.16, 6.42),
    "long": (0.13, 0.15, 5.2),
}


@dataclass(frozen=True)
class Shell:
    """The hair surface, in head space."""

    vertices: np.ndarray  # [rows * columns, 3]
    canonical: np.ndarray  # [rows * columns, 3] azimuth, height, thickness
    faces: np.ndarray


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cast one ray a grid point: mesh triangle [n, 3], weights [n, 3], direction, azimuth, faces."""
    mesh = head_mesh()
    azimuth = np.linspace(-np.pi, np.pi, _COLUMNS, endpoint=False)
    elevation = np.concatenate([np.linspace(1.5, 0.0, _CAP), np.linspace(-0.07, -0.8, _SKIRT)])
    el, az = (grid.ravel() for grid in np.meshgrid(elevation, azimuth, indexing="ij"))
    ray = np.stack([np.cos(el) * np.sin(az), np.sin(el), np.cos(el) * np.cos(az)], 1)
    triangles = mesh.faces[mesh.groups == SKIN]
    a, b, c = (mesh.vertices[triangles[:, k]].astype(np.float64) for k in range(3))
    e1, e2, s = b - a, c - a, _CENTRE - a
    q = np.cross(s, e1)
    corner, weight = np.zeros((len(ray), 3), np.int64), np.zeros((len(ray), 3), np.float32)
    for i, d in enumerate(ray):
        h = np.cross(d, e2)
        det = (e1 * h).sum(1)
        det = np.where(np.abs(det) < 1e-12, 1e-12, det)
        u, v, t = (s * h).sum(1) / det, (q @ d) / det, (e2 * q).sum(1) / det
        hit = (u >= -1e-5) & (v >= -1e-5) & (u + v <= 1 + 1e-5) & (t > 0.45)
        k = int(np.argmin(np.where(hit, t, 1e9)))
        corner[i], weight[i] = triangles[k], (1 - u[k] - v[k], u[k], v[k])
    row, column = np.meshgrid(np.arange(len(elevation) - 1), np.arange(_COLUMNS), indexing="ij")
    row, column = row.ravel(), column.ravel()
    after = (column + 1) % _COLUMNS
    p, r = row * _COLUMNS, (row + 1) * _COLUMNS
    quads = np.stack([p + column, r + column, r + after, p + after], 1)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int32)
    return corner, weight, ray.astype(np.float32), az.astype(np.float32), faces


def _skull(vertices: np.ndarray) -> np.ndarray:
    corner, weight, *_ = _grid()
    return (vertices[corner] * weight[..., None]).sum(1)


def skull_shell(
    identity: Identity,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Skull grid of a person: points, outward rays, azimuth, canonical height, faces."""
    _, _, ray, azimuth, faces = _grid()
    height = _skull(head_mesh().vertices)[:, 1]
    return _skull(identity.vertices), ray, azimuth, height, faces


def hairline(hair: Hair, azimuth: np.ndarray) -> np.ndarray:
    """Canonical height below which the skin is bare, along the azimuth."""
    around = np.abs(azimuth)
    top = 7.90 + hair.line
    top = top + hair.recede * 1.6 * np.exp(-(((around - 0.62) / 0.26) ** 2)) + 0.5 * hair.recede
    top = top + 0.035 * np.sin(3.0 * azimuth + hair.parting * 9) + 0.02 * np.cos(7 * azimuth)
    side = 7.02 + 0.03 * np.sin(hair.parting * 40)
    line = top + (side - top) * smoothstep(0.72, 1.22, around)
    line = np.where(around > 1.42, line + 0.33 * smoothstep(1.42, 1.55, around), line)
    return line + (6.72 - line) * smoothstep(1.95, 2.25, around)


def density(hair: Hair, azimuth: np.ndarray, height: np.ndarray, seed: int) -> np.ndarray:
    """Signed distance into the hair (positive: hair), ragged along the line; skull part only."""
    ragged = noise(azimuth * 5, height * 0, 0.5, seed + 31) - 0.5
    fine = noise(azimuth * 16, height * 0, 0.5, seed + 32) - 0.5
    line = hairline(hair, azimuth)
    if hair.fringe > 0:
        swept = azimuth - hair.parting
        fall = hair.fringe * smoothstep(0.95, 0.55, np.abs(azimuth))
        line = line - fall * (0.55 + 0.45 * np.tanh(2.5 * np.abs(swept))) * (1 + 0.45 * ragged)
    return height - line + 0.045 * ragged + 0.035 * fine


def hair_shell(identity: Identity, hat: bool = False) -> Shell | None:
    """Build the hair of a person, or None for bald and buzz cuts."""
    hair = identity.hair
    if hair.cut not in _SHAPE:
        return None
    _, _, ray, azimuth, faces = _grid()
    top, side, end = _SHAPE[hair.cut]
    base = _skull(identity.vertices)
    height = _skull(head_mesh().vertices)[:, 1].copy()
    around = np.abs(azimuth)
    rows = np.arange(len(ray)) // _COLUMNS
    upper = smoothstep(7.55, 8.15, height)
    thickness = (side + (top - side) * upper) * hair.volume
    lumps = noise(ray[:, 0] * 2.2, ray[:, 1] * 2.2, ray[:, 2] * 2.2, identity.seed + 41) - 0.5
    bumps = noise(ray[:, 0] * 7, ray[:, 1] * 7, ray[:, 2] * 7, identity.seed + 42) - 0.5
    thickness = thickness * (1 + 0.45 * lumps + 0.7 * hair.curl * bumps)
    if hair.cut in ("parted", "medium", "long", "bob"):
        crease = np.exp(-(((azimuth - hair.parting) / 0.10) ** 2)) * smoothstep(7.7, 8.0, height)
        sweep = 0.35 * np.tanh((azimuth - hair.parting) * -np.sign(hair.parting) * 2)
        thickness = thickness * (1 - 0.6 * crease) * (1 + sweep * upper * (around < 1.5))
    inside = density(hair, azimuth, height, identity.seed)
    swell = smoothstep(0.0, 0.22, inside)
    if hair.cut in _HANGING:
        swell = np.maximum(swell, smoothstep(hair.opening, hair.opening + 0.25, around))
    thickness = thickness * swell + 0.004
    if hat:
        thickness = thickness * (1 - 0.9 * smoothstep(7.6, 7.8, height))
    outward = ray * np.float32([1.0, 0.75, 1.0])
    vertices = base + outward * thickness[:, None]
    if hair.cut in _HANGING:
        _hang(hair, vertices, height, azimuth, rows, end, identity.seed)
    canonical = np.stack([azimuth, height, thickness], 1).astype(np.float32)
    kept = ~((around[faces].max(1) < 0.75) & (height[faces].max(1) < 7.45))
    seam = np.abs(azimuth[faces].max(1) - azimuth[faces].min(1)) > 5  # behind, never seen
    return Shell(vertices.astype(np.float32), canonical, faces[kept & ~seam])


def _hang(
    hair: Hair,
    vertices: np.ndarray,
    height: np.ndarray,
    azimuth: np.ndarray,
    rows: np.ndarray,
    end: float,
    seed: int,
) -> None:
    """Let the rows below ear height hang from the last cap row, in place."""
    root = vertices[(_CAP - 1) * _COLUMNS : _CAP * _COLUMNS]
    level = height[(_CAP - 1) * _COLUMNS : _CAP * _COLUMNS]
    bottom = max(end, 5.6)
    for k in range(_SKIRT):
        t = (k + 1) / _SKIRT
        here = rows == _CAP + k
        ring = root.copy()
        flare = 1 + 0.10 * np.sin(np.pi * min(1.0, t * 1.1)) + 0.05 * hair.curl * t
        if hair.cut == "bob":
            flare -= 0.16 * max(0.0, t - 0.75) / 0.25
        wave = 0.035 * hair.curl * np.sin(t * 14 + azimuth[here] * 3 + seed % 7)
        ring[:, 0] *= flare + wave
        ring[:, 2] = (ring[:, 2] - _CENTRE[2]) * (flare + wave) + _CENTRE[2] - 0.10 * t
        uneven = 0.06 * np.sin(azimuth[here] * 2 + seed % 11)
        fall = t * (7.45 - bottom + uneven)
        ring[:, 1] = root[:, 1] - fall
        vertices[here] = ring
        height[here] = level - fall


def hair_mask(identity: Identity, azimuth: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Tell which shell samples carry hair (strand-wise, ragged)."""
    hair, seed = identity.hair, identity.seed
    strand = noise(azimuth * 26, height * 2, 0.5, seed + 33) - 0.5
    visible = density(hair, azimuth, height, seed) + 0.08 * strand > 0
    if hair.cut in _HANGING:
        around = np.abs(azimuth)
        wander = 0.10 * (noise(height * 3, azimuth * 0, np.sign(azimuth), seed + 34) - 0.5)
        open_at = hair.opening + wander + 0.10 * strand
        open_at = open_at + 0.10 * smoothstep(7.0, 6.3, height)
        end = _SHAPE[hair.cut][2]
        hanging = (around > open_at) & (height > end + 0.25 * strand) & (height < 7.9)
        visible = np.where(height < 7.35, hanging, visible | hanging)
    return visible


def scalp_mask(identity: Identity, points: np.ndarray) -> np.ndarray:
    """Opacity of the hair colour painted on the skin at canonical points [n, 3]."""
    cut = identity.hair.cut
    if cut == "bald":
        return np.zeros(len(points), np.float32)
    x, height, z = points.T
    azimuth = np.arctan2(x, z - _CENTRE[2])
    inside = density(identity.hair, azimuth, height, identity.seed)
    soft = smoothstep(-0.05, 0.07, inside)
    ear = smoothstep(0.80, 0.76, np.abs(x)) + smoothstep(7.45, 7.55, height)
    return soft * np.minimum(ear, 1) * (0.72 if cut == "buzz" else 0.94)


def hair_colour(identity: Identity, azimuth: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Albedo [n, 3] with strands; waves and curls bend them."""
    hair, seed = identity.hair, identity.seed
    bend = np.sin(height * 6 + 2 * np.sin(azimuth * 4)) * hair.curl
    along = height * (1.0 + 5 * hair.curl)
    coarse = noise(azimuth * 9 + bend * 1.2, along, 0.5, seed + 35)
    fine = noise(azimuth * 17 + bend * 2.5, along * 1.2, 0.5, seed + 36)
    part = np.exp(-(((azimuth - hair.parting) / 0.05) ** 2)) * (height > 7.9)
    shade = (0.38 + 0.55 * coarse + 0.70 * fine) * (1 - 0.3 * part)
    return hair.colour * shade[:, None]
