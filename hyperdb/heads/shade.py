"""Light and surface colours: a key light with shadows, a fill light, the sky."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hyperdb.heads.hair import hair_colour
from hyperdb.heads.identity import Identity
from hyperdb.heads.mesh import CLOTH, HAIR, LEFT_EYE, RIGHT_EYE, SKIN
from hyperdb.heads.paint import MOUTH_COLOURS, cloth_colour, paint_eye, paint_skin
from hyperdb.heads.places import TINTS
from hyperdb.heads.raster import rasterise
from hyperdb.heads.scene import Buffer
from hyperdb.heads.view import View

_MAP = 112  # shadow map side
_SPAN = 5.0


@dataclass(frozen=True)
class Surface:
    """Painted attributes of the k covered pixels."""

    pixel: np.ndarray
    material: np.ndarray
    albedo: np.ndarray  # [k, 3] display colours
    gloss: np.ndarray
    tightness: np.ndarray
    ambient: np.ndarray


@dataclass(frozen=True)
class Light:
    """What falls on each covered pixel."""

    diffuse: np.ndarray  # [k, 3]
    fill: np.ndarray  # [k]
    shine: np.ndarray  # [k]
    colour: np.ndarray  # [3]


def paint(identity: Identity, view: View, buffer: Buffer) -> Surface:
    """Give every covered pixel its albedo."""
    pixel = np.flatnonzero(buffer.material >= 0)
    material, canonical = buffer.material[pixel], buffer.canonical[pixel]
    extra = buffer.extra[pixel]
    albedo = np.zeros((len(pixel), 3), np.float32)
    gloss, tightness = np.full(len(pixel), 0.2, np.float32), np.full(len(pixel), 16, np.float32)
    ambient = extra[:, 0].copy()

    skin = np.flatnonzero(material == SKIN)
    albedo[skin], gloss[skin] = paint_skin(identity, canonical[skin], extra[skin, 1], extra[skin, 2])
    tightness[skin] = np.where(extra[skin, 1] > 0.3, 40, 15)
    for side, group in enumerate((LEFT_EYE, RIGHT_EYE)):
        eye = np.flatnonzero(material == group)
        albedo[eye] = paint_eye(identity, canonical[eye], side, view.gaze)
        gloss[eye], tightness[eye] = 0.8, 120
        ambient[eye] = np.maximum(ambient[eye], 0.6) * 0.92
    for group, colour in MOUTH_COLOURS.items():
        albedo[material == group] = colour
    hair = np.flatnonzero(material == HAIR)
    if len(hair):
        azimuth, height, _thickness = canonical[hair].T
        albedo[hair] = hair_colour(identity, azimuth, height) * np.sqrt(ambient[hair])[:, None]
        gloss[hair], tightness[hair] = 0.16 * (1 - 0.6 * identity.hair.curl), 7
        ambient[hair] *= 0.55 + 0.45 * np.clip(buffer.normal[pixel[hair], 1] + 0.6, 0, 1)
    worn = np.flatnonzero(material == CLOTH)
    albedo[worn] = cloth_colour(view.accessory_seed) * extra[worn, 1, None]
    gloss[worn] = 0.04
    return Surface(pixel, material, albedo, gloss, tightness, ambient)


def _shadow(buffer: Buffer, position: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Share of the key light that reaches each position, from a small depth map."""
    u = np.cross(direction, (0, 1, 0))
    u /= np.linalg.norm(u)
    basis = np.stack([u, np.cross(direction, u)], 1).astype(np.float32)
    scale, direction = _MAP / _SPAN, direction.astype(np.float32)
    deepest = np.full(_MAP * _MAP, -99, np.float32)
    for vertices, faces in buffer.occluders:
        depth = vertices @ direction
        points = vertices @ basis * scale + _MAP / 2
        pixel, face, weights = rasterise(points, depth, faces, _MAP)
        z = (depth[faces[face]] * weights).sum(1)
        deepest[pixel] = np.maximum(deepest[pixel], z)
    at, own = position @ basis * scale + _MAP / 2, position @ direction
    lit = np.zeros(len(position), np.float32)
    offsets = ((0, 0), (1.1, 0.5), (-1.1, -0.5), (0.5, -1.1), (-0.5, 1.1))
    for dx, dy in offsets:
        column = (at[:, 0] + dx).astype(np.int32).clip(0, _MAP - 1)
        row = (at[:, 1] + dy).astype(np.int32).clip(0, _MAP - 1)
        lit += own >= deepest[row * _MAP + column] - 0.10
    return lit / len(offsets)


def illuminate(view: View, buffer: Buffer, surface: Surface) -> Light:
    """Evaluate the lights of the view at every covered pixel."""
    rng = np.random.default_rng((view.light_seed, 31))
    direction = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.7, 1.1)])
    direction /= np.linalg.norm(direction)
    tint, level = TINTS[view.place]
    colour = np.array([1.03, 1.0, 0.96]) * (1 + 0.05 * rng.standard_normal(3)) * tint
    key, sky = level * rng.uniform(0.80, 1.12), level * rng.uniform(0.36, 0.54)
    fill_from = np.array([-direction[0], 0.1, 0.5])
    fill_from /= np.linalg.norm(fill_from)

    normal = buffer.normal[surface.pixel]
    normal = normal / (np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9)
    position = buffer.position[surface.pixel]
    lit = _shadow(buffer, position, direction)
    facing = normal @ direction
    wrap = np.array([0.32, 0.18, 0.12]) * (surface.material == SKIN)[:, None]  # light in skin
    wrap = wrap + 0.35 * (surface.material == HAIR)[:, None]
    diffuse = np.clip((facing[:, None] + wrap) / (1 + wrap), 0, 1) * (0.3 + 0.7 * lit)[:, None]
    upward = 0.65 + 0.35 * normal[:, 1]
    fill = 0.24 * np.clip(normal @ fill_from, 0, 1)
    fill = fill + sky * upward * (0.25 + 0.75 * surface.ambient)
    half = direction + np.array([0, 0, 1])
    half /= np.linalg.norm(half)
    shine = np.clip(normal @ half, 0, 1) ** surface.tightness
    shine = surface.gloss * shine * np.clip(facing + 0.1, 0, 1) * lit
    shine = shine + 0.06 * surface.gloss * (1 - np.clip(normal[:, 2], 0, 1)) ** 4
    return Light(diffuse * key, fill, shine, colour)


def develop(albedo: np.ndarray, light: Light) -> np.ndarray:
    """Display colours [k, 3] of a photographed surface."""
    linear = np.clip(albedo, 0, 1) ** 1.9
    received = light.diffuse * light.colour + light.fill[:, None]
    colour = linear * received * 1.02 + light.shine[:, None] * 0.6 * light.colour
    return np.clip(colour / (1 + 0.15 * colour), 0, 1) ** (1 / 2.1)
