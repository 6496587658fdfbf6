"""The eight ways to depict a person; each takes painted, lit surfaces to a whole picture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from hyperdb.heads.identity import Identity
from hyperdb.heads.mesh import CLOTH, HAIR, LEFT_EYE, RIGHT_EYE, SKIN
from hyperdb.heads.paint import brow_mask
from hyperdb.heads.places import backdrop
from hyperdb.heads.props import draw_glasses
from hyperdb.heads.raster import smoothstep
from hyperdb.heads.scene import Buffer
from hyperdb.heads.shade import Light, Surface, develop
from hyperdb.heads.view import View


@dataclass(frozen=True)
class Stage:
    """Everything a style may use."""

    identity: Identity
    view: View
    buffer: Buffer
    surface: Surface
    light: Light

    @property
    def size(self) -> int:
        """Side of the supersampled picture."""
        return self.buffer.size

    def rng(self) -> np.random.Generator:
        """Draw the strokes and grain of this very picture."""
        return np.random.default_rng((self.view.place_seed, self.identity.seed, 41))

    def compose(self, colour: np.ndarray) -> np.ndarray:
        """Put coloured surfaces before the place, then the glasses; [size, size, 3]."""
        image = backdrop(self.view.place, self.view.place_seed, self.size).astype(np.float32)
        image.reshape(-1, 3)[self.surface.pixel] = colour
        if self.buffer.overlay is not None:
            lines, lenses = self.buffer.overlay
            draw_glasses(image, lines, lenses, self.view.yaw, self.view.accessory_seed)
        return image

    def plane(self, values: np.ndarray, empty: float = 0.0) -> np.ndarray:
        """Spread per-surface values [k] over the frame."""
        plane = np.full(self.size * self.size, empty, np.float32)
        plane[self.surface.pixel] = values
        return plane.reshape(self.size, self.size)


def _gradient(plane: np.ndarray) -> np.ndarray:
    return np.hypot(cv2.Sobel(plane, cv2.CV_32F, 1, 0), cv2.Sobel(plane, cv2.CV_32F, 0, 1))


def _outlines(stage: Stage) -> np.ndarray:
    """Contours of shapes, materials and painted features, 0..1."""
    unit = stage.size / 128
    depth = stage.plane(stage.buffer.z[stage.surface.pixel], -2.0)
    edges = smoothstep(0.25, 0.9, _gradient(depth) * 0.5 * unit)
    gray = stage.plane(stage.surface.albedo @ (0.3, 0.59, 0.11), 0.5)
    edges = np.maximum(edges, smoothstep(0.30, 0.95, _gradient(gray) * unit))
    facing = stage.plane(stage.buffer.normal[stage.surface.pixel, 2], 0.0)
    edges = np.maximum(edges, 0.8 * smoothstep(0.7, 1.7, _gradient(facing) * unit))
    return cv2.GaussianBlur(edges.astype(np.float32), (0, 0), 0.7 * unit)


def _photo(stage: Stage) -> np.ndarray:
    return stage.compose(develop(stage.surface.albedo, stage.light))


def _cartoon(stage: Stage) -> np.ndarray:
    tone = stage.light.diffuse.mean(1) + 0.25
    steps = np.floor(np.clip(tone, 0, 1.2) * 2.5) / 2.5
    albedo = stage.surface.albedo
    gray = albedo.mean(1, keepdims=True)
    vivid = np.clip(gray + (albedo - gray) * 1.45, 0, 1) ** 0.9
    colour = np.clip(vivid * (0.70 + 0.42 * steps)[:, None], 0, 1)
    image = stage.compose(colour)
    behind = stage.plane(np.ones(len(albedo))) < 0.5
    flat = np.round(cv2.GaussianBlur(image, (0, 0), 1.0) * 4) / 4
    mean = flat.mean(2, keepdims=True)
    flat = np.clip(mean + (flat - mean) * 1.3 + 0.04, 0, 1)
    if stage.view.place == "plain":
        flat[:] = image[behind].mean(0) if behind.any() else 0.5
    image = np.where(behind[..., None], flat, image)
    return image * (1 - 0.92 * _outlines(stage))[..., None]


def _sketch(stage: Stage) -> np.ndarray:
    size = stage.size
    shaded = stage.compose(develop(stage.surface.albedo, stage.light))
    gray = cv2.cvtColor(shaded.astype(np.float32), cv2.COLOR_RGB2GRAY)
    person = stage.plane(np.ones(len(stage.surface.pixel)))
    lines = np.maximum(_outlines(stage), 0.7 * smoothstep(0.35, 1.0, _gradient(gray) * size / 128))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (128 / size)
    hatch = 0.5 + 0.5 * np.sin((x + y) * 1.25)
    cross = 0.5 + 0.5 * np.sin((x - y) * 1.25)
    skin = stage.plane(np.isin(stage.surface.material, (SKIN, CLOTH)).astype(np.float32))
    level = stage.plane(np.clip(stage.light.diffuse.mean(1) + 0.5 * stage.light.fill, 0, 1.2))
    paint_tone = stage.plane(stage.surface.albedo @ (0.3, 0.59, 0.11), 1.0)
    relative = paint_tone / max(0.3, float(stage.identity.paint.skin @ (0.3, 0.59, 0.11)))
    tone = np.where(skin > 0.5, np.minimum(level * 0.85 + 0.25, 1) * np.minimum(relative, 1), gray)
    tone = np.where(person > 0.5, tone, 0.62 + 0.38 * gray)
    dark = np.clip(0.95 - tone, 0, 1)
    graphite = 0.72 * dark * (0.72 + 0.28 * hatch) + 0.25 * np.clip(dark - 0.3, 0, 1) * cross
    weight = np.where(person > 0.5, 0.85, 0.35)
    paper = 0.975 - graphite - weight * lines * 0.75
    paper = paper + 0.015 * stage.rng().standard_normal((size, size))
    return np.clip(paper, 0.08, 1)[..., None] * np.array([1.0, 0.99, 0.96])


def _sculpt(stage: Stage, low: tuple, high: tuple, gloss: float, sharp: float) -> np.ndarray:
    """One material for all: cavities take `low`, open surfaces `high`."""
    surface, light = stage.surface, stage.light
    relief = np.ones(len(surface.pixel))
    skin = surface.material == SKIN
    canonical = stage.buffer.canonical[surface.pixel]
    relief[skin] -= 0.45 * brow_mask(stage.identity, canonical[skin])
    lips = stage.buffer.extra[surface.pixel, 1] * skin
    relief -= 0.14 * lips
    hair = surface.material == HAIR
    if hair.any():
        strands = surface.albedo[hair].mean(1) / max(1e-3, stage.identity.hair.colour.mean())
        relief[hair] *= np.clip(0.42 + 0.42 * strands, 0.4, 1.05)
    tone = surface.albedo.mean(1)
    eye = np.isin(surface.material, (LEFT_EYE, RIGHT_EYE))
    relief[eye] *= 0.45 + 0.55 * smoothstep(0.15, 0.6, tone[eye])
    painted = skin & (tone < 0.72 * float(stage.identity.paint.skin.mean()))
    relief[painted] *= 0.85
    worn = surface.material == CLOTH
    relief[worn] *= 0.8 + 0.2 * stage.buffer.extra[surface.pixel[worn], 1]
    open_to_sky = (surface.ambient * relief)[:, None]
    albedo = np.array(low) + (np.array(high) - np.array(low)) * np.clip(open_to_sky, 0, 1)
    normal = stage.buffer.normal[surface.pixel]
    shine = gloss * np.clip(normal[:, 2] * 0.6 + light.diffuse.mean(1) * 0.6, 0, 1) ** sharp * relief**2
    cast = Light(light.diffuse.mean(1, keepdims=True), light.fill, shine, light.colour)
    return stage.compose(develop(albedo * np.sqrt(relief)[:, None], cast))


def _clay(stage: Stage) -> np.ndarray:
    return _sculpt(stage, (0.50, 0.44, 0.40), (0.84, 0.80, 0.76), 0.04, 6)


def _bronze(stage: Stage) -> np.ndarray:
    return _sculpt(stage, (0.12, 0.15, 0.11), (0.52, 0.33, 0.14), 0.75, 9)


def _strokes(image: np.ndarray, rng: np.random.Generator, count: int, length: float, thick: int) -> np.ndarray:
    """Repaint an image with straight brush strokes along its contours."""
    size = len(image)
    gray = cv2.GaussianBlur(image.mean(2).astype(np.float32), (0, 0), 2.0 * size / 128)
    angle = np.arctan2(cv2.Sobel(gray, cv2.CV_32F, 0, 1), cv2.Sobel(gray, cv2.CV_32F, 1, 0))
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), thick * 0.4)
    at = rng.integers(0, size, (count, 2))
    turn = angle[at[:, 1], at[:, 0]] + np.pi / 2 + 0.35 * rng.standard_normal(count)
    reach = length * rng.uniform(0.5, 1.0, count)
    step = np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None]
    start, stop = np.round((at - step) * 16).astype(int), np.round((at + step) * 16).astype(int)
    colour = smooth[at[:, 1], at[:, 0]] * rng.uniform(0.92, 1.08, (count, 1))
    canvas = smooth.copy()
    for p, q, c in zip(start.tolist(), stop.tolist(), colour.tolist(), strict=False):
        cv2.line(canvas, p, q, c, thick, cv2.LINE_8, 4)
    return canvas


def _oil(stage: Stage) -> np.ndarray:
    image, rng, unit = _photo(stage), stage.rng(), stage.size / 128
    mean = image.mean(2, keepdims=True)
    image = np.clip(mean + (image - mean) * 1.2, 0, 1)
    image = np.clip((image - 0.5) * 1.12 + 0.49, 0, 1) * np.array([1.03, 0.99, 0.92])
    broad = _strokes(image, rng, 900, 6 * unit, max(2, round(6 * unit)))
    fine = _strokes(image, rng, 1300, 3.0 * unit, max(1, round(2.2 * unit)))
    person = stage.plane(np.ones(len(stage.surface.pixel)))
    keep = cv2.GaussianBlur(person, (0, 0), 1.5 * unit)[..., None]
    image = broad * (1 - keep) + keep * (0.72 * fine + 0.28 * image)
    weave = cv2.GaussianBlur(rng.standard_normal((stage.size,) * 2), (0, 0), 0.9 * unit)
    return image * (1 + 0.10 * weave)[..., None]


def _pixel(stage: Stage) -> np.ndarray:
    image = _photo(stage)
    mean = image.mean(2, keepdims=True)
    image = np.clip(mean + (image - mean) * 1.2, 0, 1)
    image = np.clip((image - 0.5) * 1.1 + 0.5, 0, 1) * (1 - 0.3 * _outlines(stage))[..., None]
    cells = cv2.resize(image.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA)
    cells = np.round(np.clip(cells, 0, 1) * 9) / 9
    return cv2.resize(cells, (stage.size,) * 2, interpolation=cv2.INTER_NEAREST)


def _watercolour(stage: Stage) -> np.ndarray:
    size, unit, rng = stage.size, stage.size / 128, stage.rng()
    image = _photo(stage).astype(np.float32)
    wash = cv2.bilateralFilter(image, 7, 0.18, 4 * unit)
    wobble = cv2.resize(rng.standard_normal((12, 12, 2)).astype(np.float32), (size, size))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    person = cv2.GaussianBlur(stage.plane(np.ones(len(stage.surface.pixel))), (0, 0), 2 * unit)
    bleed = (4.0 - 3.0 * person)[..., None] * wobble * unit
    wash = cv2.remap(wash, x + bleed[..., 0], y + bleed[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)
    pigment = 1 - wash
    pigment = pigment.mean(2, keepdims=True) + (pigment - pigment.mean(2, keepdims=True)) * 1.5
    pooled = smoothstep(0.15, 0.7, _gradient(wash.mean(2)))[..., None]
    granules = cv2.resize(rng.standard_normal((size // 3, size // 3)).astype(np.float32), (size, size))
    amount = 0.72 * (1 + 0.25 * pooled + 0.05 * granules[..., None])
    radius = np.maximum(np.abs(x / size - 0.5), np.abs(y / size - 0.5))
    blot = cv2.resize(rng.standard_normal((7, 7)).astype(np.float32), (size, size))
    margin = smoothstep(0.52, 0.42, radius + 0.025 * blot)[..., None]
    return np.clip(np.array([0.99, 0.985, 0.96]) - pigment * amount * margin, 0, 1)


_RENDERERS = {
    "photo": _photo,
    "cartoon": _cartoon,
    "sketch": _sketch,
    "oil": _oil,
    "clay": _clay,
    "bronze": _bronze,
    "pixel": _pixel,
    "watercolour": _watercolour,
}


def depict(stage: Stage) -> np.ndarray:
    """Render the picture in the style of its view; float RGB [size, size, 3]."""
    return _RENDERERS[stage.view.style](stage)
