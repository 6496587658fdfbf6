"""Change a person's attributes, average people, or go part of the way from one to another: adapters as vectors.

    hyperdb edit adapter=runs/personalize/ada age=2 name=older
    hyperdb edit adapter=[runs/personalize/ada,runs/personalize/bob] shares=[0.7,0.3] name=between

LiDB numbers lie in bases that are the same for everyone, so they add like vectors. Relaxed factors are kept, in a
mixture side by side, each with its person's share. Needs no base. `hyperdb weights` measures it, on predictions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.adapters.layout import SD15
from hyperdb.formats.directions import ATTRIBUTES, load_directions
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.words import typed

if TYPE_CHECKING:
    from hyperdb.formats.native import Personalization


WRITES = ("adapter.safetensors",)


@dataclass
class Config:
    """Which people are mixed, in which shares, and how the result is shifted.

    Several adapters are averaged, each weighted by its entry in `shares`. A share below 0 or above 1 goes beyond the
    people, away from one and past another. One adapter alone is only shifted.

    The attributes are shifts. A shift of 1 is one standard deviation of the attribute over the people whom `hyperdb
    weights` found the `directions` among, and 0 changes nothing. What the shifts do on the embedded base was measured
    (`experiments/embedded/base64/weights`): `smile` does nothing, and nobody gets younger.
    """

    adapter: list[FilePath] = "???"  # type: ignore[assignment]
    """files of `hyperdb personalize`, or their folders"""
    shares: list[float] = field(default_factory=list)  # one for each adapter, 1 in sum; empty: equal shares
    sex: float = 0.0  # above 0 towards a man, below 0 towards a woman
    age: float = 0.0  # above 0 older, below 0 younger
    skin: float = 0.0  # above 0 darker, below 0 lighter
    hair: float = 0.0  # above 0 lighter, below 0 darker
    smile: float = 0.0  # above 0 more of it
    # file of `hyperdb weights`, of the same base and hypernetwork as the adapters
    directions: FilePath = "package:embedded/directions.safetensors"
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/edit/default"  # folder that is written

    def __post_init__(self) -> None:
        if not self.adapter:
            raise UserError("adapter=[]: name an adapter, or several as [A,B]")
        if self.shares and len(self.shares) != len(self.adapter):
            raise UserError(f"shares={self.shares}: {len(self.adapter)} adapters need as many")
        if self.shares and not abs(sum(self.shares) - 1) < 1e-3:
            raise UserError(f"shares={self.shares}: expected to sum to 1; `generate` and `export` have a strength")
        for name in ATTRIBUTES:
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: expected a finite number")


def run(config: Config) -> Path:
    """Write `out/adapter.safetensors` and return `out`."""
    from hyperdb.formats.native import Personalization, find_adapter
    from hyperdb.runtime.files import hash_files
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.recipe import recipe

    files = [find_adapter(path) for path in config.adapter]
    people = [Personalization.load(file) for file in files]
    person = mix(people, config.shares or [1 / len(people)] * len(people))
    shifts = {name: getattr(config, name) for name in ATTRIBUTES if getattr(config, name)}
    if shifts:
        directions = load_directions(config.directions, person)
        if odd := sorted(shifts.keys() - directions.keys()):
            raise UserError(f"{config.directions} has no direction of {odd[0]}; there are {', '.join(directions)}")
        assert person.tokens is not None
        numbers = person.lidb.pack(person.tokens)
        for name, shift in shifts.items():
            numbers = numbers + shift * directions[name]
        if not numbers.isfinite().all():
            raise UserError(f"a shift of {max(map(abs, shifts.values())):g} is too large")
        person = dataclasses.replace(person, tokens=person.lidb.unpack(numbers))
    contents = {"adapter": [hash_files([file]) for file in files]}
    if shifts:
        contents["directions"] = [hash_files([resolve(config.directions)])]
    path = person.save(claim(config.out, WRITES, {**recipe(config), **contents}) / "adapter.safetensors")
    print(f"adapter in {path}")
    prompt = f"prompt='a photo of a [V] {person.class_word}'"
    base = " diffusion=sd15" if person.layout.digest == SD15 else ""
    print(f"next: hyperdb generate {typed('adapter', config.out)} {prompt}{base}")
    if base:
        print("of a descendant of Stable Diffusion 1.5, add its diffusion.path=FOLDER")
    return Path(config.out)


def mix(people: list[Personalization], shares: list[float]) -> Personalization:
    """Return the person of the weighted sum. Raises `UserError` for people of different models or bases of LiDB."""
    import torch

    from hyperdb.adapters.base import LowRank, concatenate, scale
    from hyperdb.adapters.lorax import truncated

    first = people[0]
    every = [p.tokens for p in people if p.tokens is not None and not p.parts]
    if len(every) < len(people):
        odd = next(p for p in people if p.tokens is None or p.parts)
        raise UserError(f"{odd.source} is not made of LiDB's numbers and low-rank factors alone: it cannot be edited")
    for other in people[1:]:
        first.layout.require(other.layout, other.source)
        for what in ("config", "fingerprint", "base", "rare_token", "class_word"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                raise UserError(
                    f"{other.source} has {what} {theirs or 'unknown'}, {first.source} has {mine or 'unknown'}: "
                    "they do not mix"
                )
    tokens = torch.stack([share * one for share, one in zip(shares, every, strict=True)]).sum(0)
    relaxed = [scale(p.relaxed, share) for share, p in zip(shares, people, strict=True) if p.relaxed and share]
    together = concatenate(*relaxed) if relaxed else {}
    for name, (down, up) in together.items():  # of many mixtures of mixtures too no more than the layer has
        if down.shape[1] > (most := min(down.shape[2:].numel(), up.shape[1])):
            together[name] = truncated(LowRank(down, up), most)
    return dataclasses.replace(first, tokens=tokens, relaxed=together)
