"""How a person is seen: pose, expression, light, place, style, accessory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CROP = 0.8  # side of our frame over the side of the FFHQ alignment crop

STYLES = (
    "photo",
    "cartoon",
    "sketch",
    "oil",
    "clay",
    "bronze",
    "pixel",
    "watercolour",
)
PLACES = ("plain", "beach", "snow", "forest", "city", "space", "desert", "library")
EXPRESSIONS = ("neutral", "smiling", "laughing", "surprised", "frowning", "pouting")
ACCESSORIES = ("none", "glasses", "hat", "scarf")

_PLAIN_SHARE = 0.5
_ACCESSORY_SHARES = (0.76, 0.10, 0.07, 0.07)
_EXPRESSION_SHARES = (0.40, 0.24, 0.09, 0.09, 0.09, 0.09)


@dataclass(frozen=True)
class View:
    """One picture of someone. Angles in radians; gaze and shift as (right, up) fractions."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    expression: str = "neutral"
    intensity: float = 1.0
    light_seed: int = 0
    place: str = "plain"
    place_seed: int = 0
    style: str = "photo"
    accessory: str = "none"
    accessory_seed: int = 0
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    gaze: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("style", STYLES),
            ("place", PLACES),
            ("expression", EXPRESSIONS),
            ("accessory", ACCESSORIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")


def _pick(rng: np.random.Generator, options: tuple[str, ...], shares: tuple[float, ...]) -> str:
    return options[int(rng.choice(len(options), p=shares))]


def sample_view(
    rng: np.random.Generator,
    style: str | None = None,
    place: str | None = None,
    expression: str | None = None,
    accessory: str | None = None,
) -> View:
    """Draw a view; named properties are kept. The draws do not depend on which are named."""
    named = (1 - _PLAIN_SHARE) / (len(PLACES) - 1)
    drawn_style = _pick(rng, STYLES, (1 / len(STYLES),) * len(STYLES))
    drawn_place = _pick(rng, PLACES, (_PLAIN_SHARE,) + (named,) * (len(PLACES) - 1))
    drawn_expression = _pick(rng, EXPRESSIONS, _EXPRESSION_SHARES)
    drawn_accessory = _pick(rng, ACCESSORIES, _ACCESSORY_SHARES)
    yaw, pitch, roll = np.clip(rng.standard_normal(3), -2.2, 2.2) * (0.24, 0.07, 0.04)
    light_seed, place_seed, accessory_seed = (int(s) for s in rng.integers(0, 2**31, 3))
    shift = rng.uniform(-0.02, 0.02, 2)
    gaze = np.clip(rng.standard_normal(2), -2, 2) * (0.10, 0.05)
    return View(
        yaw=float(yaw),
        pitch=float(pitch),
        roll=float(roll),
        expression=drawn_expression if expression is None else expression,
        intensity=float(rng.uniform(0.7, 1.05)),
        light_seed=light_seed,
        place=drawn_place if place is None else place,
        place_seed=place_seed,
        style=drawn_style if style is None else style,
        accessory=drawn_accessory if accessory is None else accessory,
        accessory_seed=accessory_seed,
        zoom=float(rng.uniform(0.93, 1.07)),
        shift=(float(shift[0]), float(shift[1])),
        gaze=(float(gaze[0]), float(gaze[1])),
    )
