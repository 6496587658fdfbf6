"""A person from a seed alone: shape, skin, hair and the few details one is known by."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from hyperdb.heads.mesh import front_vertices, head_mesh, local_axes

AGES = ("young", "adult", "old")
SEXES = ("woman", "man")
SKINS = ("light", "medium", "dark")
HAIRS = ("black", "brown", "blond", "red", "grey", "bald")
CUTS = (
    "bald",
    "buzz",
    "short",
    "parted",
    "receding",
    "curly",
    "afro",
    "fringe",
    "medium",
    "bob",
    "long",
)

_CUT_SHARES = {
    "man": (0.07, 0.13, 0.22, 0.17, 0.11, 0.09, 0.05, 0.08, 0.05, 0.00, 0.03),
    "woman": (0.01, 0.03, 0.07, 0.06, 0.00, 0.09, 0.07, 0.09, 0.17, 0.19, 0.22),
}
_LOCAL_SIGMA, _LOCAL_CLIP = 0.24, 0.48
_QUIET = ("neck", "ear-shape", "head-trans", "head-angle", "ear-rot", "head-age", "eye-push")
_SKIN_PALETTE = np.array(
    [
        (0.95, 0.80, 0.72),
        (0.90, 0.71, 0.59),
        (0.78, 0.56, 0.43),
        (0.60, 0.40, 0.285),
        (0.42, 0.27, 0.19),
        (0.31, 0.20, 0.145),
    ]
)
_HAIR_COLOURS = np.array(
    [
        (0.07, 0.06, 0.055),
        (0.13, 0.09, 0.065),
        (0.24, 0.145, 0.09),
        (0.38, 0.24, 0.14),
        (0.66, 0.50, 0.29),
        (0.50, 0.22, 0.10),
        (0.66, 0.65, 0.64),
    ]
)
_HAIR_WORDS = ("black", "black", "brown", "brown", "blond", "red", "grey")
_IRIS_COLOURS = np.array(
    [
        (0.16, 0.09, 0.05),
        (0.27, 0.16, 0.08),
        (0.32, 0.27, 0.13),
        (0.25, 0.36, 0.27),
        (0.28, 0.40, 0.53),
        (0.40, 0.46, 0.50),
    ]
)


@dataclass(frozen=True)
class Hair:
    """Cut, colour and the way hair falls."""

    cut: str
    colour: np.ndarray
    volume: float  # multiplies the thickness of the cut
    line: float  # raises the hairline
    recede: float  # opens the temples
    curl: float  # 0 straight .. 1 curly
    parting: float  # azimuth of the parting, radians
    fringe: float  # how far hair falls over the forehead
    opening: float  # azimuth at which long hair frames the face


@dataclass(frozen=True)
class Paint:
    """Colours and marks of the skin and eyes, all in canonical head coordinates."""

    skin: np.ndarray
    iris: np.ndarray
    lip: np.ndarray
    lip_strength: float
    brow: np.ndarray
    brow_width: float
    brow_arch: float
    brow_density: float
    brow_height: float
    beard: float
    moustache: float
    blush: float
    freckles: float
    makeup: float
    wrinkles: float
    cloth: np.ndarray
    moles: tuple[tuple[float, float], ...]


def _thirds(x: float) -> dict[str, float]:
    return {"min": max(0, 1 - 2 * x), "average": 1 - abs(2 * x - 1), "max": max(0, 2 * x - 1)}


def _weights_pick(rng: np.random.Generator, shares: np.ndarray) -> int:
    return int(rng.choice(len(shares), p=shares / shares.sum()))


class Identity:
    """Everything constant about a person; a function of `seed`, with no other state."""

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        rng = np.random.default_rng((self.seed, 1))
        self.sex = "man" if rng.random() < 0.5 else "woman"
        self.age = float(rng.beta(1.3, 2.0))  # 0 young .. 1 old
        self.ancestry = rng.dirichlet([0.4] * 3)  # african, asian, caucasian
        self.muscle, self.weight = np.clip(0.5 + 0.19 * rng.standard_normal(2), 0.08, 0.92)
        self._local = self._draw_local(rng)
        self._asymmetry = np.where(rng.random(62) < 0.25, 0.22 * rng.random(62), 0.0)
        melanin = self.ancestry @ (0.80, 0.36, 0.16) + 0.09 * rng.standard_normal()
        self.melanin = float(np.clip(melanin, 0.03, 1.0))
        self.hair, self._hair_word = self._draw_hair(rng)
        self.paint = self._draw_paint(rng)

    # -- shape -----------------------------------------------------------------------------

    @staticmethod
    def _draw_local(rng: np.random.Generator) -> np.ndarray:
        values = []
        for pairs in local_axes():
            name = pairs[0][0]
            x = float(np.clip(_LOCAL_SIGMA * rng.standard_normal(), -_LOCAL_CLIP, _LOCAL_CLIP))
            keep = rng.random() < 0.4
            if any(word in name for word in _QUIET):
                x *= 0.25
            if pairs[0][1] is None:  # one-sided shapes (round, square ...): some people, a little
                x = 0.7 * abs(x) if keep else 0.0
            values.append(x)
        return np.array(values)

    @functools.cached_property
    def morph_weights(self) -> np.ndarray:
        """Weights of the 470 morphs."""
        mesh = head_mesh()
        weights = np.zeros(len(mesh.names), np.float32)
        male = 0.95 if self.sex == "man" else 0.05
        for sex, sex_share in (("male", male), ("female", 1 - male)):
            for age, age_share in (("young", 1 - self.age), ("old", self.age)):
                share = sex_share * age_share
                for name, part in zip(("african", "asian", "caucasian"), self.ancestry, strict=False):
                    weights[mesh.index(f"macro/{name}-{sex}-{age}")] += share * part
                for muscle, muscle_share in _thirds(self.muscle).items():
                    for weight, weight_share in _thirds(self.weight).items():
                        name = f"macro/universal-{sex}-{age}-{muscle}muscle-{weight}weight"
                        if name in mesh.names:
                            weights[mesh.index(name)] += share * muscle_share * weight_share
        for pairs, x in zip(local_axes(), self._local, strict=False):
            for plus, minus in pairs:
                if x >= 0:
                    weights[mesh.index(plus)] += x
                elif minus is not None:
                    weights[mesh.index(minus)] -= x
        asymmetric = [i for i, name in enumerate(mesh.names) if name.startswith("asym/")]
        weights[asymmetric] += self._asymmetry
        return weights

    @functools.cached_property
    def vertices(self) -> np.ndarray:
        """The neutral mesh of this person, [5447, 3]."""
        return head_mesh().blend(self.morph_weights)

    @property
    def face(self) -> np.ndarray:
        """The shape of the face, [487, 3]: points of the neutral mesh, as it would be without asymmetry.

        It is centred and scaled to best agree with the mean head, because a photo's crop shows neither place nor size.
        """
        mesh, front = head_mesh(), front_vertices()
        symmetric = [0 if name.startswith("asym/") else 1 for name in mesh.names] * self.morph_weights
        points, mean = (v[front] - v[front].mean(0) for v in (mesh.blend(symmetric), mesh.vertices))
        return points * (points * mean).sum() / np.square(points).sum()

    # -- hair and paint --------------------------------------------------------------------

    def _draw_hair(self, rng: np.random.Generator) -> tuple[Hair, str]:
        shares = np.array(_CUT_SHARES[self.sex])
        african = self.ancestry[0]
        shares[CUTS.index("afro")] *= 0.1 + 3.0 * african**2
        shares[CUTS.index("receding")] *= 0.4 + 2 * self.age
        shares[CUTS.index("bald")] *= 0.5 + 1.6 * self.age
        cut = CUTS[_weights_pick(rng, shares)]
        light = 1 - self.melanin
        colour_shares = np.array(
            [
                0.4 + 2 * self.melanin,
                0.3 + self.melanin,
                0.5 * light + 0.1,
                0.5 * light**2,
                0.6 * light**4,
                0.3 * light**4,
                max(0.0, self.age - 0.42) * 4,
            ]
        )
        tone = _weights_pick(rng, colour_shares)
        colour = np.clip(_HAIR_COLOURS[tone] * (1 + 0.12 * rng.standard_normal()), 0.02, 0.9)
        curl = float(rng.choice([0.0, 0.35, 0.7], p=[0.5, 0.3, 0.2]))
        curl = {"afro": 1.0, "curly": 0.9}.get(cut, max(curl, 0.8 * african**2))
        side = 1.0 if rng.random() < 0.5 else -1.0
        hair = Hair(
            cut=cut,
            colour=colour,
            volume=float(rng.uniform(0.8, 1.25)),
            line=float(rng.uniform(-0.07, 0.07)) + (0.05 * self.age if self.sex == "man" else 0),
            recede=float(rng.uniform(0, 0.08)) + (rng.uniform(0.10, 0.22) if cut == "receding" else 0),
            curl=curl,
            parting=side * float(rng.uniform(0.15, 0.5)),
            fringe=float(rng.uniform(0.16, 0.30)) if cut == "fringe" or rng.random() < 0.2 else 0.0,
            opening=float(rng.uniform(1.0, 1.3)),
        )
        return hair, "bald" if cut == "bald" else _HAIR_WORDS[tone]

    def _draw_paint(self, rng: np.random.Generator) -> Paint:
        man = self.sex == "man"
        light = 1 - self.melanin
        position = min(self.melanin * 5, 4.999)
        low = int(position)
        skin = _SKIN_PALETTE[low] + (position - low) * np.diff(_SKIN_PALETTE, axis=0)[low]
        skin = np.clip(skin * (1 + 0.025 * rng.standard_normal(3)), 0.05, 0.97)
        iris_shares = [1 + 3 * self.melanin, 0.8, 0.5 * light, 0.4 * light**3]
        iris_shares += [0.7 * light**3, 0.3 * light**3]
        iris = _IRIS_COLOURS[_weights_pick(rng, np.array(iris_shares))]
        red_lips = not man and rng.random() < 0.4
        lip = np.array((0.82, 0.36, 0.38) if red_lips else (0.84, 0.52, 0.50))
        beard = float(rng.choice([0, 0.25, 0.6, 0.95], p=[0.42, 0.25, 0.19, 0.14])) if man else 0.0
        moles = int(rng.choice(3, p=[0.6, 0.3, 0.1]))
        return Paint(
            skin=skin,
            iris=iris * (1 + 0.1 * rng.standard_normal()),
            lip=lip,
            lip_strength=float(rng.uniform(0.3, 0.5) if man else rng.uniform(0.45, 0.8)),
            brow=self.hair.colour * (0.7 if self.hair.colour.mean() > 0.1 else 0.95),
            brow_width=float(rng.uniform(0.036, 0.062)) * (1.15 if man else 0.85),
            brow_arch=float(rng.uniform(0.005, 0.05)),
            brow_density=float(rng.uniform(0.6, 0.92)),
            brow_height=float(rng.uniform(-0.02, 0.03)),
            beard=beard,
            moustache=beard if rng.random() < 0.8 else 0.0,
            blush=float(rng.uniform(0.05, 0.35)),
            freckles=float(max(0, rng.normal(-0.3, 0.5)) * light),
            makeup=0.0 if man else float(np.clip(rng.normal(0.15, 0.3), 0, 0.7)),
            wrinkles=float(np.clip((self.age - 0.35) * 1.5, 0, 1)),
            cloth=rng.random(3) * 0.7 + 0.12,
            moles=tuple((float(rng.uniform(-0.6, 0.6)), float(rng.uniform(6.4, 7.25))) for _ in range(moles)),
        )

    # -- labels ----------------------------------------------------------------------------

    @property
    def attributes(self) -> dict[str, object]:
        """Known labels in words, plus `age_value` in 0..1 (young to old)."""
        age = AGES[0 if self.age < 0.3 else 1 if self.age < 0.62 else 2]
        skin = SKINS[0 if self.melanin < 0.34 else 1 if self.melanin < 0.62 else 2]
        return {
            "age": age,
            "age_value": self.age,
            "sex": self.sex,
            "skin": skin,
            "hair": self._hair_word,
            "hair_cut": self.hair.cut,
            "beard": self.paint.beard > 0.5,
        }

    @property
    def coefficients(self) -> np.ndarray:
        """Latent coefficients as one float32 vector: macro, skin, local axes, asymmetry."""
        macro = [self.sex == "man", self.age, *self.ancestry, self.muscle, self.weight]
        parts = (macro, [self.melanin], self._local, self._asymmetry)
        return np.concatenate([np.asarray(part, np.float32) for part in parts])
