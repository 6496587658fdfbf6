"""Painted backdrops, recognisable at 64 pixels even around a face that fills the frame.

Each place has a few painted variants a process (cached); a view's seed picks one, mirrors it and
shifts it a little. Colours are RGB floats in 0..1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import cv2
import numpy as np

_VARIANTS = 12
_PAINT = 128
_MARGIN = 12


def _gradient(top: tuple[float, ...], bottom: tuple[float, ...], rows: int) -> np.ndarray:
    t = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    ramp = np.float32(top) * (1 - t) + np.float32(bottom) * t
    return np.ascontiguousarray(np.broadcast_to(ramp, (rows, _PAINT, 3)))


def _grain(rng: np.random.Generator, rows: int, cells: int) -> np.ndarray:
    small = rng.standard_normal((max(2, rows * cells // _PAINT), cells)).astype(np.float32)
    return cv2.resize(small, (_PAINT, rows), interpolation=cv2.INTER_CUBIC)[..., None]


def _beach(rng: np.random.Generator) -> np.ndarray:
    horizon, shore = int(rng.integers(52, 66)), int(rng.integers(84, 96))
    image = _gradient((0.33, 0.64, 0.95), (0.78, 0.90, 0.98), _PAINT)
    image[horizon:] = _gradient((0.05, 0.42, 0.62), (0.20, 0.72, 0.74), _PAINT - horizon)
    wave = shore + (3 * np.sin(np.arange(_PAINT) / 9 + rng.random() * 6)).astype(int)
    sand = np.float32([0.93, 0.82, 0.58]) * (1 + 0.03 * _grain(rng, _PAINT, 48))
    rows = np.arange(_PAINT)[:, None]
    image = np.where((rows > wave)[..., None], sand, image)
    foam = (np.abs(rows - wave) < 2.2)[..., None]
    image = np.where(foam, np.float32([0.97, 0.98, 0.98]), image)
    for _ in range(3):
        centre = (int(rng.integers(0, _PAINT)), int(rng.integers(6, horizon - 14)))
        cv2.ellipse(image, centre, (int(rng.integers(12, 24)), 4), 0, 0, 360, (0.97,) * 3, -1)
    return image


def _snow(rng: np.random.Generator) -> np.ndarray:
    horizon = int(rng.integers(58, 74))
    image = _gradient((0.66, 0.74, 0.84), (0.85, 0.90, 0.95), _PAINT)
    for x in range(-6, _PAINT + 10, 13):
        height = int(rng.integers(22, 46))
        foot = horizon + int(rng.integers(0, 8))
        tone = float(rng.uniform(0.8, 1.1))
        tree = np.array([(x - 9, foot), (x + 9, foot), (x, foot - height)])
        cv2.fillPoly(image, [tree], (0.22 * tone, 0.34 * tone, 0.36 * tone))
        cap = np.array([(x - 5, foot - height * 5 // 9), (x + 4, foot - height // 2), (x, foot - height)])
        cv2.fillPoly(image, [cap], (0.93, 0.95, 0.98))
    image[horizon + 4 :] = _gradient((0.90, 0.93, 0.97), (0.98, 0.99, 1.0), _PAINT - horizon - 4)
    for _ in range(110):
        centre = (int(rng.integers(0, _PAINT)), int(rng.integers(0, _PAINT)))
        cv2.circle(image, centre, int(rng.integers(1, 3)), (1.0, 1.0, 1.0), -1, cv2.LINE_AA)
    return image


def _forest(rng: np.random.Generator) -> np.ndarray:
    image = _gradient((0.30, 0.46, 0.18), (0.12, 0.26, 0.09), _PAINT)
    image *= 1 + 0.28 * _grain(rng, _PAINT, 20) + 0.15 * _grain(rng, _PAINT, 48)
    for x in range(int(rng.integers(0, 10)), _PAINT, 17):
        width, tone = int(rng.integers(3, 8)), float(rng.uniform(0.6, 1.2))
        x = x + int(rng.integers(-4, 5))
        bark = (0.24 * tone, 0.16 * tone, 0.09 * tone)
        cv2.rectangle(image, (x, 0), (x + width, 112), bark, -1)
    for _ in range(70):
        centre = (int(rng.integers(0, _PAINT)), int(abs(rng.normal(0, 34))))
        leaf = np.array([0.30, 0.55, 0.16]) * rng.uniform(0.5, 1.5)
        cv2.circle(image, centre, int(rng.integers(3, 8)), tuple(map(float, leaf)), -1)
    image[108:] = np.float32([0.26, 0.34, 0.10]) * (1 + 0.2 * _grain(rng, _PAINT - 108, 40))
    return image


def _city(rng: np.random.Generator) -> np.ndarray:
    image = _gradient((0.03, 0.03, 0.12), (0.16, 0.09, 0.28), _PAINT)
    x = -4
    while x < _PAINT:
        width, top = int(rng.integers(14, 26)), int(rng.integers(4, 52))
        wall = np.array([0.07, 0.07, 0.13]) * rng.uniform(0.6, 1.6)
        cv2.rectangle(image, (x, top), (x + width, _PAINT), tuple(map(float, wall)), -1)
        for wx in range(x + 2, x + width - 2, 5):
            for wy in range(top + 3, 112, 7):
                if rng.random() < 0.55:
                    lit = (1.0, 0.82, 0.35) if rng.random() < 0.75 else (0.55, 0.80, 1.0)
                    cv2.rectangle(image, (wx, wy), (wx + 2, wy + 3), lit, -1)
        x += width
    for _ in range(9):
        centre = (int(rng.integers(0, _PAINT)), int(rng.integers(100, _PAINT)))
        glow = ((1, 0.3, 0.2), (1, 0.8, 0.4), (0.3, 0.9, 0.8))[int(rng.integers(0, 3))]
        cv2.circle(image, centre, int(rng.integers(2, 5)), glow, -1, cv2.LINE_AA)
    return image


def _space(rng: np.random.Generator) -> np.ndarray:
    image = np.full((_PAINT, _PAINT, 3), np.float32([0.012, 0.012, 0.03]))
    cloud = np.clip(_grain(rng, _PAINT, 5), 0, 1)
    image += cloud * np.float32([0.16, 0.05, 0.24]) * float(rng.uniform(0.5, 1.2))
    for _ in range(130):
        centre = (int(rng.integers(0, _PAINT)), int(rng.integers(0, _PAINT)))
        light = float(rng.uniform(0.6, 1))
        cv2.circle(image, centre, int(rng.random() < 0.35), (light,) * 3, -1, cv2.LINE_AA)
    centre = (int(rng.choice([12, 116])), int(rng.integers(12, 44)))
    radius = int(rng.integers(11, 19))
    tone = ((0.85, 0.45, 0.25), (0.35, 0.55, 0.90), (0.85, 0.75, 0.5))[int(rng.integers(0, 3))]
    cv2.circle(image, centre, radius, tone, -1, cv2.LINE_AA)
    shade = tuple(0.55 * c for c in tone)
    cv2.ellipse(image, centre, (radius, radius // 3), 20, 0, 180, shade, 2, cv2.LINE_AA)
    return image


def _desert(rng: np.random.Generator) -> np.ndarray:
    image = _gradient((0.98, 0.62, 0.30), (1.0, 0.85, 0.60), _PAINT)
    columns = np.arange(_PAINT)
    for k, base in enumerate((58, 76, 98)):
        phase, length = rng.random() * 6, rng.uniform(14, 30)
        crest = base + 9 * np.sin(columns / length + phase)
        tone = np.float32([0.86, 0.50, 0.22]) * (0.82 + 0.12 * k)
        dune = np.arange(_PAINT)[:, None] > crest
        image = np.where(dune[..., None], tone * (1 + 0.03 * _grain(rng, _PAINT, 60)), image)
    sun = (int(rng.integers(8, _PAINT - 8)), int(rng.integers(12, 34)))
    cv2.circle(image, sun, 8, (1.0, 0.96, 0.80), -1, cv2.LINE_AA)
    return image


def _library(rng: np.random.Generator) -> np.ndarray:
    image = np.full((_PAINT, _PAINT, 3), np.float32([0.20, 0.11, 0.06]))
    for shelf in range(int(rng.integers(-20, 0)), _PAINT, 30):
        x = 0
        while x < _PAINT:
            width, tall = int(rng.integers(4, 9)), int(rng.integers(19, 26))
            hue = ((0.55, 0.12, 0.10), (0.12, 0.22, 0.42), (0.14, 0.34, 0.18), (0.72, 0.58, 0.32))
            book = np.array(hue[int(rng.integers(0, 4))]) * rng.uniform(0.7, 1.2)
            foot = shelf + 26
            cv2.rectangle(image, (x, foot - tall), (x + width - 2, foot), tuple(map(float, book)), -1)
            x += width
        cv2.rectangle(image, (0, shelf + 27), (_PAINT, shelf + 29), (0.42, 0.25, 0.12), -1)
    return image


_PAINTERS: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], float]] = {
    "beach": (_beach, 1.2),
    "snow": (_snow, 0.9),
    "forest": (_forest, 1.3),
    "city": (_city, 0.8),
    "space": (_space, 0.6),
    "desert": (_desert, 1.2),
    "library": (_library, 0.9),
}

# Light that a place throws on the face: tint and strength.
TINTS: dict[str, tuple[tuple[float, float, float], float]] = {
    "plain": ((1.0, 1.0, 1.0), 1.0),
    "beach": ((1.04, 1.0, 0.94), 1.06),
    "snow": ((0.96, 1.0, 1.06), 1.05),
    "forest": ((0.95, 1.02, 0.92), 0.94),
    "city": ((0.98, 0.93, 1.06), 0.84),
    "space": ((0.95, 0.97, 1.08), 0.88),
    "desert": ((1.08, 0.99, 0.88), 1.04),
    "library": ((1.05, 0.99, 0.90), 0.92),
}


@functools.lru_cache(maxsize=256)
def _variant(place: str, variant: int) -> np.ndarray:
    painter, blur = _PAINTERS[place]
    key = tuple(place.encode())
    image = painter(np.random.default_rng((variant, *key)))
    return np.clip(cv2.GaussianBlur(image, (0, 0), blur), 0, 1)


def _plain(rng: np.random.Generator, size: int) -> np.ndarray:
    """A studio wall: grey or a soft colour, lit from one side."""
    colour = np.full(3, rng.uniform(0.25, 0.92))
    if rng.random() < 0.6:
        colour = np.clip(colour + rng.uniform(-0.10, 0.10, 3), 0.1, 0.95)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    slope = rng.uniform(-0.22, 0.22, 2)
    wall = 1 + slope[0] * x + slope[1] * y - 0.25 * rng.random() * (x * x + y * y)
    return np.clip(colour.astype(np.float32) * wall[..., None].astype(np.float32), 0, 1)


def backdrop(place: str, seed: int, size: int) -> np.ndarray:
    """Paint the place as float RGB [size, size, 3]; a few seeded variations."""
    rng = np.random.default_rng((seed, 21))
    if place == "plain":
        return _plain(rng, size)
    image = _variant(place, int(rng.integers(0, _VARIANTS)))
    mirrored, shift = rng.random() < 0.5, rng.integers(0, _MARGIN, 2)
    if mirrored:
        image = image[:, ::-1]
    side = _PAINT - _MARGIN
    image = image[shift[0] : shift[0] + side, shift[1] : shift[1] + side]
    image = cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=cv2.INTER_AREA)
    tone = rng.uniform(0.93, 1.06) * (1 + rng.uniform(-0.03, 0.03, 3))
    return np.clip(image * tone.astype(np.float32), 0, 1)
