"""From an identity and a view to a buffer of surface attributes a pixel."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hyperdb.heads.hair import hair_mask, hair_shell
from hyperdb.heads.identity import Identity
from hyperdb.heads.mesh import (
    CLOTH,
    HAIR,
    TONGUE,
    ambient_occlusion,
    head_mesh,
    shadow_faces,
    throat_faces,
)
from hyperdb.heads.props import glasses_lines, prop_mesh
from hyperdb.heads.raster import rasterise, vertex_normals
from hyperdb.heads.view import CROP, View

_CAMERA = 12.0  # distance in head units
_PIVOT = np.float32([0.0, 7.0, 0.45])

_MOVES: dict[str, dict[str, float]] = {
    "neutral": {},
    "smiling": {"mouthSmile": 0.75, "cheekSquint": 0.5, "mouthDimple": 0.2},
    "laughing": {"mouthSmile": 0.9, "jawOpen": 0.33, "cheekSquint": 0.7, "eyeSquint": 0.4},
    "surprised": {"jawOpen": 0.42, "browInnerUp": 0.8, "browOuterUp": 0.8, "eyeWide": 0.55},
    "frowning": {"browDown": 0.85, "mouthFrown": 0.7, "eyeSquint": 0.25, "mouthPress": 0.3},
    "pouting": {"mouthPucker": 0.7, "browInnerUp": 0.3},
}


@dataclass
class Buffer:
    """Nearest surface under each pixel, flat over [size * size]."""

    size: int
    z: np.ndarray
    material: np.ndarray  # -1 where nothing is
    position: np.ndarray
    normal: np.ndarray
    canonical: np.ndarray
    extra: np.ndarray  # ambient light, lips (or shade), lids
    overlay: tuple[list[np.ndarray], list[np.ndarray]] | None = None
    occluders: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @classmethod
    def empty(cls, size: int) -> Buffer:
        """Start with nothing in the frame."""
        n = size * size
        triple = [np.zeros((n, 3), np.float32) for _ in range(4)]
        return cls(size, np.full(n, -1e9, np.float32), np.full(n, -1, np.int32), *triple)

    def write(self, pixel: np.ndarray, material: np.ndarray | int, attributes: np.ndarray) -> None:
        """Store interpolated attributes [k, 12] (position, normal, canonical, extra)."""
        self.z[pixel] = attributes[:, 2]
        self.material[pixel] = material
        self.position[pixel], self.normal[pixel] = attributes[:, :3], attributes[:, 3:6]
        self.canonical[pixel], self.extra[pixel] = attributes[:, 6:9], attributes[:, 9:]


def _expression(view: View) -> np.ndarray:
    mesh = head_mesh()
    weights = np.zeros(len(mesh.names), np.float32)
    for move, amount in _MOVES[view.expression].items():
        for suffix in ("", "Left", "Right"):
            name = f"arkit/{move}{suffix}"
            if name in mesh.names:
                weights[mesh.index(name)] = amount * view.intensity
    active = np.flatnonzero(weights)
    return np.tensordot(weights[active], mesh.morphs[active], 1)


def _rotation(yaw: float, pitch: float) -> np.ndarray:
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return (nod @ turn).astype(np.float32)


class Camera:
    """Places the frame: CROP times the FFHQ alignment square of the projected landmarks."""

    def __init__(self, identity: Identity, view: View, size: int) -> None:
        self.size, self.rotation = size, _rotation(view.yaw, view.pitch)
        mesh, vertices = head_mesh(), identity.vertices
        eyes = [vertices[index].mean(0) + np.float32([0, 0, 0.08]) for index in mesh.eyes]
        mouth = vertices[mesh.mouth_corners].mean(0)
        right, left, mouth = self._flat(self.turn(np.stack([*eyes, mouth])))
        across, down = right - left, mouth - (left + right) / 2
        axis = across + np.array([down[1], -down[0]])
        axis /= np.linalg.norm(axis)
        half = CROP * max(2.0 * np.linalg.norm(across), 1.8 * np.linalg.norm(down))
        c, s = np.cos(view.roll), np.sin(view.roll)
        axis = np.array([c * axis[0] - s * axis[1], s * axis[0] + c * axis[1]])
        self._centre = (left + right) / 2 + 0.1 * down
        self._axes = np.stack([axis, [-axis[1], axis[0]]]) * view.zoom / (2 * half)
        self._shift = 0.5 + np.array([view.shift[0], -view.shift[1]])

    def turn(self, points: np.ndarray) -> np.ndarray:
        """Head space -> camera space."""
        return (points.astype(np.float32) - _PIVOT) @ self.rotation.T

    @staticmethod
    def _flat(points: np.ndarray) -> np.ndarray:
        scale = _CAMERA / (_CAMERA - points[:, 2:])
        return points[:, :2] * scale * (1, -1)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Camera space -> pixel coordinates [n, 2], y down."""
        unit = (self._flat(points) - self._centre) @ self._axes.T + self._shift
        return (unit * self.size).astype(np.float32)


def _attributes(
    position: np.ndarray, normal: np.ndarray, canonical: np.ndarray, extra: np.ndarray
) -> np.ndarray:
    return np.concatenate([position, normal, canonical, extra], 1).astype(np.float32)


def _interpolate(attributes: np.ndarray, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    a, b, c = (attributes[faces[:, k]] * weights[:, k, None] for k in range(3))
    return a + b + c


def _draw_head(buffer: Buffer, camera: Camera, vertices: np.ndarray) -> None:
    mesh = head_mesh()
    position = camera.turn(vertices)
    normal = vertex_normals(position, mesh.faces)
    extra = np.stack([ambient_occlusion(), mesh.lips, mesh.lids], 1)
    points = camera.pixels(position)
    table = _attributes(position, normal, mesh.vertices, extra)
    throat = throat_faces()  # seen from inside through an open mouth
    pixel, face, weights = rasterise(points, position[:, 2], throat, buffer.size)
    values = _interpolate(table, throat[face], weights)
    values[:, 9] = 0.05
    buffer.write(pixel, TONGUE, values)
    pixel, face, weights = rasterise(points, position[:, 2], mesh.faces, buffer.size, cull=True)
    buffer.write(pixel, mesh.groups[face], _interpolate(table, mesh.faces[face], weights))
    buffer.occluders.append((position, shadow_faces()))


def _draw_prop(buffer: Buffer, camera: Camera, identity: Identity, view: View) -> None:
    prop = prop_mesh(identity, view.accessory, view.accessory_seed)
    if prop is None:
        return
    position = camera.turn(prop.vertices)
    normal = vertex_normals(position, prop.faces)
    extra = np.stack([np.full(len(position), 0.8), prop.shade, 0 * prop.shade], 1)
    points = camera.pixels(position)
    pixel, face, weights = rasterise(points, position[:, 2], prop.faces, buffer.size)
    table = _attributes(position, normal, prop.vertices, extra)
    values = _interpolate(table, prop.faces[face], weights)
    values[:, 3:6] *= np.where(values[:, 5:6] < 0, -1, 1)
    near = values[:, 2] > buffer.z[pixel]
    buffer.write(pixel[near], CLOTH, values[near])
    buffer.occluders.append((position, prop.faces))


def _draw_hair(buffer: Buffer, camera: Camera, identity: Identity, view: View) -> None:
    shell = hair_shell(identity, hat=view.accessory == "hat")
    if shell is None:
        return
    position = camera.turn(shell.vertices)
    normal = vertex_normals(position, shell.faces)
    extra = np.stack([np.ones(len(position)), np.zeros(len(position))] * 2, 1)[:, :3]
    table = _attributes(position, normal, shell.canonical, extra)
    points = camera.pixels(position)
    corners = points[shell.faces]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    front = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] < 0
    for outer in (False, True):  # the far inside first, then the side that faces us
        faces = shell.faces[front == outer]
        pixel, face, weights = rasterise(points, position[:, 2], faces, buffer.size)
        values = _interpolate(table, faces[face], weights)
        near = (values[:, 2] > buffer.z[pixel]) & hair_mask(identity, values[:, 6], values[:, 7])
        values[:, 3:6] *= np.where(values[:, 5:6] < 0, -1, 1)
        values[:, 9] = 1.0 if outer else 0.35
        buffer.write(pixel[near], HAIR, values[near])


def build(identity: Identity, view: View, size: int) -> Buffer:
    """Rasterise head, worn things and hair; glasses come as projected outlines."""
    camera, buffer = Camera(identity, view, size), Buffer.empty(size)
    vertices = identity.vertices
    if view.expression != "neutral":
        vertices = vertices + _expression(view)
    _draw_head(buffer, camera, vertices)
    _draw_prop(buffer, camera, identity, view)
    _draw_hair(buffer, camera, identity, view)
    if view.accessory == "glasses":
        lines, lenses = glasses_lines(identity.vertices, view.accessory_seed)
        project = lambda line: camera.pixels(camera.turn(line))  # noqa: E731
        buffer.overlay = ([project(x) for x in lines], [project(x) for x in lenses])
    return buffer
