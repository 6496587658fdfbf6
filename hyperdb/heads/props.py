"""Glasses, hats and scarves: small meshes and projected outlines that follow the head."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from hyperdb.heads.hair import hair_shell, skull_shell
from hyperdb.heads.identity import Identity
from hyperdb.heads.mesh import head_mesh


@dataclass(frozen=True)
class Prop:
    """A worn thing, in head space."""

    vertices: np.ndarray  # [n, 3]
    faces: np.ndarray  # [m, 3]
    shade: np.ndarray  # [n] multiplies the colour: ribs, folds


def _strip(rows: int, columns: int, closed: bool) -> np.ndarray:
    row, column = np.meshgrid(
        np.arange(rows - 1), np.arange(columns if closed else columns - 1), indexing="ij"
    )
    p = (row * columns + column).ravel()
    q = (row * columns + (column + 1) % columns).ravel()
    first = np.stack([p, p + columns, q + columns], 1)
    return np.concatenate([first, np.stack([p, q + columns, q], 1)]).astype(np.int32)


def _hat(identity: Identity, seed: int) -> Prop:
    """A knitted cap with a folded rim, or a cap with a brim."""
    rng = np.random.default_rng((seed, 11))
    brimmed = rng.random() < 0.4
    base, ray, azimuth, height, faces = skull_shell(identity)
    shell = hair_shell(identity)
    under = np.zeros(len(base)) if shell is None else np.minimum(shell.canonical[:, 2], 0.12)
    around = np.abs(azimuth)
    line = 7.86 - 0.30 * np.clip(around / 1.6, 0, 1) ** 2 - 0.15 * np.clip(around - 1.6, 0, 2)
    line = line + rng.uniform(-0.05, 0.04)
    rim = np.exp(-(((height - line - 0.08) / 0.10) ** 2))
    ribs = np.cos(azimuth * 36)
    thickness = 0.07 + 0.45 * under + (0 if brimmed else 0.05) * rim
    thickness = thickness + (0 if brimmed else 0.008) * ribs
    vertices = base + ray * thickness[:, None]
    lifted = height[faces].min(1) > line[faces].min(1) - 0.06
    shade = np.ones(len(base)) if brimmed else 0.88 + 0.12 * ribs - 0.12 * (height > line + 0.22)
    if not brimmed:
        return Prop(vertices, faces[lifted], shade)

    sweep, steps = np.linspace(-1.15, 1.15, 25), np.linspace(0, 1, 5)
    anchor = np.array([np.argmin((azimuth - a) ** 2 * 4 + (height - 7.88) ** 2) for a in sweep])
    edge = base[anchor] + ray[anchor] * 0.06
    edge[:, 1] = edge[:, 1].max()
    reach = 0.50 * np.cos(sweep / 1.15 * np.pi / 2) ** 0.6
    brim = np.concatenate(
        [edge + np.stack([0.1 * t * sweep, -0.22 * t * reach, t * reach], 1) for t in steps]
    )
    brim_faces = _strip(len(steps), len(sweep), False) + len(vertices)
    shade = np.concatenate([shade, np.full(len(brim), 0.72)])
    return Prop(np.concatenate([vertices, brim]), np.concatenate([faces[lifted], brim_faces]), shade)


def _scarf(identity: Identity, seed: int) -> Prop:
    """A soft ring around the neck, a little higher on one side."""
    rng = np.random.default_rng((seed, 12))
    chin = identity.vertices[:, :][np.argmin(np.abs(head_mesh().vertices - (0, 6.28, 1.45)).sum(1))]
    tilt, phase = rng.uniform(-0.08, 0.08), rng.uniform(0, 6)
    ring, tube = np.linspace(-np.pi, np.pi, 40, endpoint=False), np.linspace(0, 2 * np.pi, 11)
    a, b = (grid.ravel() for grid in np.meshgrid(tube, ring, indexing="ij"))
    fold = 1 + 0.10 * np.sin(b * 5 + a * 2 + phase)
    radius = 0.27 * fold
    height = chin[1] - 0.02 + 0.10 * (1 - np.cos(b)) + tilt * np.sin(b)
    out = 0.74 + radius * np.cos(a)
    depth = 0.42 + (out + 0.02) * np.cos(b) * 0.98
    vertices = np.stack([out * np.sin(b), height + radius * 1.15 * np.sin(a), depth], 1)
    stripes = 0.78 + 0.22 * (np.sin(b * 9 + phase) > 0)
    return Prop(vertices, _strip(len(tube), len(ring), True), stripes)


def prop_mesh(identity: Identity, accessory: str, seed: int) -> Prop | None:
    """Mesh of a worn thing; None for 'none' and for glasses, which are drawn as outlines."""
    if accessory == "hat":
        return _hat(identity, seed)
    return _scarf(identity, seed) if accessory == "scarf" else None


def glasses_lines(vertices: np.ndarray, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frame lines and lens outlines [k, 3] in head space; the first four lines are always seen."""
    rng = np.random.default_rng((seed, 13))
    width, tall, square = rng.uniform(0.21, 0.25), rng.uniform(0.15, 0.20), rng.uniform(2.0, 3.6)
    mesh = head_mesh()
    left, right = (vertices[index].mean(0) for index in mesh.eyes)
    front = max(left[2], right[2]) + 0.30
    t = np.linspace(0, 2 * np.pi, 33)
    power = 2 / square
    x = width * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power
    y = tall * np.sign(np.sin(t)) * np.abs(np.sin(t)) ** power - 0.03
    rims, arms = [], []
    for eye in (left, right):
        bend = 0.25 * np.abs(eye[0] + x) ** 2
        rims.append(np.stack([eye[0] + x, eye[1] + y, front - bend], 1))
        side = np.sign(eye[0])
        start = np.array([eye[0] + side * width, eye[1] + 0.04, front - 0.08])
        arms.append(np.stack([start, [side * 0.86, eye[1] + 0.05, 0.55]]))
    inner = 0.5 * (abs(left[0]) + abs(right[0])) - width
    across = np.linspace(-inner, inner, 5)
    bridge = np.stack([across, 0 * across + (left[1] + right[1]) / 2 + 0.02, 0 * across + front], 1)
    return [*rims, bridge, *arms], rims


def draw_glasses(
    image: np.ndarray, lines: list[np.ndarray], lenses: list[np.ndarray], yaw: float, seed: int
) -> None:
    """Draw projected glasses (pixel coordinates) into a float RGB image, in place."""
    rng = np.random.default_rng((seed, 14))
    shade = rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])
    colour = ((0.06, 0.06, 0.07), (0.30, 0.16, 0.08), (0.55, 0.47, 0.30), (0.45, 0.08, 0.10))[shade]
    thick = max(1, round(len(image) / 64 * rng.choice([1.0, 1.5, 2.0])))

    def fixed(points: np.ndarray) -> np.ndarray:
        return np.round(points * 16).astype(np.int32)[:, None]

    tint = image.copy()
    for lens in lenses:
        cv2.fillPoly(tint, [fixed(lens)], (0.75, 0.80, 0.84), cv2.LINE_AA, 4)
    np.copyto(image, image + 0.07 * (tint - image))
    for k, line in enumerate(lines):
        hidden = (k == 3 and yaw < -0.05) or (k == 4 and yaw > 0.05)
        if not hidden:
            cv2.polylines(image, [fixed(line)], False, colour, thick, cv2.LINE_AA, 4)
