"""The head mesh with its morphs, loaded once a process from the packaged archive."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hyperdb.heads.raster import rasterise, vertex_normals

SKIN, LEFT_EYE, RIGHT_EYE, UPPER_TEETH, LOWER_TEETH, TONGUE = range(6)
HAIR, CLOTH = 6, 7

_LOCAL_GROUPS = (
    *("head", "nose", "mouth", "eyes", "ears", "cheek"),
    *("chin", "forehead", "eyebrows", "neck"),
)
_OPPOSITE = {
    "decr": "incr",
    "down": "up",
    "in": "out",
    "concave": "convex",
    "compress": "uncompress",
    "backward": "forward",
}
_AMBIENT_DIRECTIONS = 32


@dataclass(frozen=True)
class HeadMesh:
    """Neutral mesh, sparse morphs and per-vertex lookups."""

    vertices: np.ndarray  # [5447, 3] float32, x right of the viewer, y up, z towards the viewer
    faces: np.ndarray  # [10700, 3] int32
    groups: np.ndarray  # [10700] material of each face
    names: tuple[str, ...]
    morphs: np.ndarray  # [470, 5447, 3] float32
    lips: np.ndarray  # [5447] 0..1
    lids: np.ndarray  # [5447] 0..1
    eyes: tuple[np.ndarray, np.ndarray]  # vertex indices of the eyeballs
    mouth_corners: np.ndarray  # two vertex indices

    def index(self, name: str) -> int:
        """Find a morph by name."""
        return _positions()[name]

    def blend(self, weights: np.ndarray) -> np.ndarray:
        """Add weighted morphs [470] to the neutral mesh -> [5447, 3]."""
        active = np.flatnonzero(weights)
        return self.vertices + np.tensordot(weights[active], self.morphs[active], 1)


@functools.cache
def head_mesh() -> HeadMesh:
    """Load the archive (about 30 MB once unpacked)."""
    with np.load(Path(__file__).with_name("heads.npz")) as archive:
        data = {key: archive[key] for key in archive.files}
    shape = tuple(int(n) for n in data["shape"])
    dense = np.zeros((shape[0] * shape[1], 3), np.float32)
    dense[np.cumsum(data["idx"])] = data["val"] * float(data["scale"])
    vertices = data["v"].astype(np.float32)
    faces = data["F"].astype(np.int32)
    groups = data["FG"].astype(np.int32)

    column = (data["uv"][:, 0] * 1023).clip(0, 1023).astype(int)
    row = ((1 - data["uv"][:, 1]) * 1023).clip(0, 1023).astype(int)
    lips = cv2.GaussianBlur(data["lips"].astype(np.float32) / 255, (0, 0), 1.2)[row, column]
    lids = cv2.GaussianBlur(data["lids"].astype(np.float32) / 255, (0, 0), 3)[row, column]
    body = np.unique(faces[groups == SKIN])
    corners = [
        body[np.argmin(np.abs(vertices[body] - (side * 0.252, 6.618, 1.42)).sum(1))] for side in (-1, 1)
    ]
    left, right = (np.unique(faces[groups == g]) for g in (LEFT_EYE, RIGHT_EYE))
    return HeadMesh(
        vertices=vertices,
        faces=faces,
        groups=groups,
        names=tuple(str(name) for name in data["names"]),
        morphs=dense.reshape(shape),
        lips=lips,
        lids=lids,
        eyes=(left, right),
        mouth_corners=np.array(corners),
    )


@functools.cache
def throat_faces() -> np.ndarray:
    """Faces at the back of the head that an open mouth would otherwise look through."""
    mesh = head_mesh()
    x, y, z = mesh.vertices[mesh.faces].mean(1).T
    behind = (np.abs(x) < 0.5) & (y > 6.0) & (y < 7.2) & (z < 0.2) & (mesh.groups == SKIN)
    return mesh.faces[behind]


@functools.cache
def shadow_faces() -> np.ndarray:
    """Faces that can cast a shadow on the face: the outer skin above the shoulders."""
    mesh = head_mesh()
    high = mesh.vertices[mesh.faces][..., 1].min(1) > 6.0
    return mesh.faces[high & (mesh.groups == SKIN)]


@functools.cache
def front_vertices() -> np.ndarray:
    """Every eighth vertex of the front of the face, from chin to forehead, eyes included."""
    x, y, z = head_mesh().vertices.T
    return np.flatnonzero((np.abs(x) < 1.1) & (y > 5.7) & (y < 8.2) & (z > 0.55))[::8]


@functools.cache
def _positions() -> dict[str, int]:
    return {name: i for i, name in enumerate(head_mesh().names)}


@functools.cache
def local_axes() -> tuple[tuple[tuple[str, str | None], ...], ...]:
    """Group local morphs into axes: (plus, minus) pairs, left and right moved together."""
    mesh = head_mesh()
    known = set(mesh.names)
    done: set[str] = set()
    axes: dict[str, list[tuple[str, str | None]]] = {}
    for name in mesh.names:
        if name.split("/")[0] not in _LOCAL_GROUPS or name in done:
            continue
        stem, _, suffix = name.rpartition("-")
        opposite = f"{stem}-{_OPPOSITE.get(suffix, '')}"
        pair = (opposite, name) if opposite in known else (name, None)
        done.update(pair if pair[1] is not None else (name,))
        key = pair[0].replace("/l-", "/*-").replace("/r-", "/*-")
        axes.setdefault(key, []).append(pair)
    return tuple(tuple(pairs) for pairs in axes.values())


@functools.cache
def ambient_occlusion() -> np.ndarray:
    """Estimate how much of the sky each vertex of the neutral head sees, [5447] in 0..1."""
    mesh = head_mesh()
    rng = np.random.default_rng(0)
    normals = vertex_normals(mesh.vertices, mesh.faces)
    seen, total = np.zeros(len(normals)), np.zeros(len(normals))
    size, scale = 160, 160 / 7.0
    for _ in range(_AMBIENT_DIRECTIONS):
        d = rng.standard_normal(3)
        d /= np.linalg.norm(d)
        d[1] = 0.8 * abs(d[1]) + 0.2 * d[1]
        d /= np.linalg.norm(d)
        u = np.cross(d, (0, 1, 0.01))
        u /= np.linalg.norm(u)
        v = np.cross(d, u)
        centred = mesh.vertices - np.float32([0, 6.9, 0.6])
        points = np.stack([centred @ u, centred @ v], 1) * scale + size / 2
        depth = centred @ d
        pixel, face, weights = rasterise(points, depth, mesh.faces, size)
        nearest = np.full(size * size, -1e9)
        nearest[pixel] = (depth[mesh.faces[face]] * weights).sum(1)
        column, row = points.astype(int).clip(0, size - 1).T
        facing = np.maximum(normals @ d, 0)
        seen += facing * (depth >= nearest[row * size + column] - 0.09)
        total += facing
    return (seen / np.maximum(total, 1e-6)).astype(np.float32)
