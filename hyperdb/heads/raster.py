"""Triangle rasteriser, vertex normals and lattice noise in plain numpy."""

from __future__ import annotations

import functools

import numpy as np


def smoothstep(low: float, high: float, x: np.ndarray | float) -> np.ndarray:
    """Ramp smoothly from 0 at `low` to 1 at `high` (descending when low > high)."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Average the area-weighted face normals at each vertex; unit length."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    face_normals = np.cross(b - a, c - a)
    corners = faces.T.ravel()
    normals = np.stack(
        [
            np.bincount(corners, np.tile(face_normals[:, axis], 3), minlength=len(vertices))
            for axis in range(3)
        ],
        axis=1,
    )
    length = np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    return (normals / length).astype(np.float32)


def rasterise(
    points: np.ndarray, depth: np.ndarray, faces: np.ndarray, size: int, cull: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the nearest triangle under every pixel.

    points [n, 2] are pixel coordinates (y down), a larger depth [n] is nearer.
    Returns pixel [k] (flat indices that are covered), face [k] and barycentric weights [k, 3].
    With `cull`, triangles that turn their back (outward-facing meshes) are dropped.
    """
    points = points.astype(np.float32)
    a, b, c = points[faces[:, 0]], points[faces[:, 1]], points[faces[:, 2]]
    ab, ac = b - a, c - a
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    low = np.ceil(np.minimum(np.minimum(a, b), c) - 0.5).clip(0, size).astype(np.int32)
    high = np.floor(np.maximum(np.maximum(a, b), c) + 0.5).clip(0, size).astype(np.int32)
    width, rows = (high - low).T
    visible = area < -1e-7 if cull else np.abs(area) > 1e-7
    keep = np.flatnonzero((width > 0) & (rows > 0) & visible)

    # Both weights are planes over the image: u = p0 x + p1 y + p2, v = p3 x + p4 y + p5.
    a, ab, ac, area = a[keep], ab[keep], ac[keep], area[keep]
    planes = np.stack([ac[:, 1], -ac[:, 0], -ab[:, 1], ab[:, 0]], 1) / area[:, None]
    start = (low[keep] + 0.5).astype(np.float32) - a
    u_start = planes[:, 0] * start[:, 0] + planes[:, 1] * start[:, 1]
    v_start = planes[:, 2] * start[:, 0] + planes[:, 3] * start[:, 1]
    corner = low[keep, 1] * size + low[keep, 0]

    width = width[keep]
    count = width * rows[keep]
    index = np.repeat(np.arange(len(keep), dtype=np.int32), count)
    first = np.cumsum(count) - count
    offset = np.arange(len(index), dtype=np.int32) - np.repeat(first.astype(np.int32), count)
    row, column = np.divmod(offset, width[index])
    plane = planes[index]
    u = u_start[index] + plane[:, 0] * column + plane[:, 1] * row
    v = v_start[index] + plane[:, 2] * column + plane[:, 3] * row
    inside = np.flatnonzero((u >= -1e-5) & (v >= -1e-5) & (u + v <= 1 + 1e-5))
    index, u, v = index[inside], u[inside], v[inside]
    pixel = corner[index] + row[inside] * size + column[inside]

    face = keep[index]
    near = depth[faces[keep]].astype(np.float32)
    z0, z1, z2 = near[index].T
    z = (z0 + u * (z1 - z0) + v * (z2 - z0)).astype(np.float32)
    best = np.full(size * size, -np.inf, np.float32)
    np.maximum.at(best, pixel, z)
    top = np.flatnonzero(z == best[pixel])
    winner = np.full(size * size, -1, np.int64)
    winner[pixel[top]] = top
    covered = np.flatnonzero(winner >= 0)
    winner = winner[covered]
    u, v = u[winner], v[winner]
    return covered, face[winner], np.stack([1 - u - v, u, v], axis=1).astype(np.float32)


_PERIOD = 16  # lattice cells
_FINE = 8  # samples a cell


@functools.cache
def _noise_volume() -> np.ndarray:
    """Tabulate periodic smooth value noise, flattened from [128, 128, 128]; values in 0..1."""
    lattice = np.random.default_rng(20_240_601).random((_PERIOD,) * 3).astype(np.float32)
    t = (np.arange(_FINE) / _FINE).astype(np.float32)
    t = t * t * (3 - 2 * t)
    for axis in range(3):
        ahead = np.roll(lattice, -1, axis)
        shape = [1] * 4
        shape[axis + 1] = _FINE
        blend = t.reshape(shape)
        mixed = np.expand_dims(lattice, axis + 1) * (1 - blend)
        mixed = mixed + np.expand_dims(ahead, axis + 1) * blend
        merged = list(lattice.shape)
        merged[axis] *= _FINE
        lattice = mixed.reshape(merged)
    return np.ascontiguousarray(lattice).ravel()


def noise(x: np.ndarray, y: np.ndarray, z: np.ndarray | float, seed: int) -> np.ndarray:
    """Sample value noise in 0..1 with unit-sized cells; the seed shifts the lattice."""
    size = _PERIOD * _FINE
    shift = (seed * 2_654_435_761) & 0x1F_FFFF

    def cell(value: np.ndarray | float, offset: int) -> np.ndarray:
        return (np.floor(np.asarray(value) * _FINE).astype(np.int32) + offset) & (size - 1)

    i, j, k = cell(x, shift & 127), cell(y, (shift >> 7) & 127), cell(z, (shift >> 14) & 127)
    return _noise_volume()[(i * size + j) * size + k]
