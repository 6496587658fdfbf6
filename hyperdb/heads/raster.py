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
    a, b, c = points[faces[:, 0]], points[faces[:, 1]], points[faces[:, 2]]
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    low = np.clip(np.floor(np.minimum(np.minimum(a, b), c) - 0.5) + 1, 0, size).astype(np.int32)
    high = np.clip(np.floor(np.maximum(np.maximum(a, b), c) - 0.5) + 1, 0, size).astype(np.int32)
    extent = high - low
    visible = area < -1e-9 if cull else np.abs(area) > 1e-9
    keep = np.flatnonzero((extent[:, 0] > 0) & (extent[:, 1] > 0) & visible)
    width = extent[keep, 0]
    count = width * extent[keep, 1]
    index = np.repeat(np.arange(len(keep)), count)
    offset = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    width = width[index]
    face = keep[index]
    row, column = offset // width, offset % width
    x, y = low[face, 0] + column, low[face, 1] + row

    origin, twice = a[face], area[face]
    edge_b, edge_c = (b - a)[face], (c - a)[face]
    dx, dy = x + np.float32(0.5) - origin[:, 0], y + np.float32(0.5) - origin[:, 1]
    u = (dx * edge_c[:, 1] - dy * edge_c[:, 0]) / twice
    v = (edge_b[:, 0] * dy - edge_b[:, 1] * dx) / twice
    inside = np.flatnonzero((u >= -1e-6) & (v >= -1e-6) & (u + v <= 1 + 1e-6))
    face, u, v = face[inside], u[inside], v[inside]
    pixel = y[inside] * size + x[inside]
    weights = np.stack([1 - u - v, u, v], axis=1).astype(np.float32)
    z = (depth[faces[face]] * weights).sum(1)

    order = np.argsort(z, kind="stable")
    winner = np.full(size * size, -1, np.int64)
    winner[pixel[order]] = order
    covered = np.flatnonzero(winner >= 0)
    winner = winner[covered]
    return covered, face[winner], weights[winner]


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
