"""Ways to personalise people as data: where each begins, what it trains on the photos, and what it is called."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hyperdb.adapters import AdapterConfig
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.fit import FitConfig

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.base import Adapter, Changes, Factors
    from hyperdb.diffusion.base import Base
    from hyperdb.tuning.personalizer import Personalizer

STARTS = ("own", "average", "another")
TRAINED = ("relaxed", "lidb")
TOGETHER = 64  # photos that the hypernetwork sees in one pass
HELD = 2**30  # bytes of the adapters that are held at once, if a batch of people does not take more


@dataclass(kw_only=True)
class MethodConfig:
    """A way to personalise, a row of an evaluation: one yaml of conf/methods.

    `start` is the prediction that it begins at: the person's `own`, everybody's `average`, `another` person's, or null,
    the base alone. `refinements` says how many times the hypernetwork refines it; null is as many times as it was
    trained to. `train` is what is trained on the photos on top of that: `relaxed`, the factors of the fast fine-tuning,
    or `lidb` itself; `adapter` describes any other. With neither, nothing is trained. `strength` is a factor on all
    that the adapter changes, prediction and training alike, when pictures are drawn; the training knows nothing of it.
    """

    label: str  # what people read; {steps} in it stands for the number of iterations
    start: str | None = None
    refinements: int | None = None  # s of eq. 3
    train: str | None = None
    adapter: AdapterConfig | None = None
    finetune: dict[str, Any] = field(default_factory=dict)  # what differs from the stage's fine-tuning
    against: list[str] = field(default_factory=list)  # rows that it is compared with, person by person
    people: int | None = None  # the first so many alone, where it is slow; null: all
    strength: float = 1.0  # 0 is the base, 1 the person as trained
    photos: int | None = None
    hybrid: bool = True

    def __post_init__(self) -> None:
        if self.start not in (None, *STARTS):
            raise UserError(f"start={self.start!r}: expected of {', '.join(STARTS)}, or null")
        if self.refinements is not None and (self.start is None or self.refinements < 1):
            raise UserError(f"refinements={self.refinements}: expected at least 1, of a method that has a start")
        if self.train not in (None, *TRAINED):
            raise UserError(f"train={self.train!r}: expected of {', '.join(TRAINED)}, or null")
        if self.train is not None and self.adapter is not None:
            raise UserError(f"train={self.train} and an adapter: a method trains one of them")
        if self.people is not None and self.people < 2:
            raise UserError(f"people={self.people}: expected at least 2, or null for all")
        if self.photos is not None and self.photos < 1:
            raise UserError(f"photos={self.photos}: expected at least 1, or null for as many as the evaluation says")
        if not math.isfinite(self.strength) or (self.strength != 1 and self.start is None and not self.trains):
            raise UserError(f"strength={self.strength}: expected a finite number, of a method that has an adapter")
        try:
            self.text(0)
        except (LookupError, ValueError) as error:
            raise UserError(f"label={self.label!r}: the only word in braces is {{steps}}") from error

    @property
    def trains(self) -> bool:
        """Whether anything is trained on the photos."""
        return self.train is not None or self.adapter is not None

    def among(self, people: int) -> int:
        """Return on how many of so many people it is run: the first ones."""
        return people if self.people is None else min(self.people, people)

    def fit(self, shared: FitConfig) -> FitConfig | None:
        """Return the fine-tuning, as it differs from `shared`; None if nothing is trained. Raises `UserError`."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if not self.trains:
            return None
        try:
            found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(shared), self.finetune))
        except OmegaConfBaseException as error:
            raise UserError(f"finetune: {str(error).splitlines()[0]}") from error
        assert isinstance(found, FitConfig)
        return found

    def text(self, steps: int) -> str:
        """Return the label of so many iterations."""
        return self.label.format(steps=steps)


def _joined(adapter: Adapter, parts: list[dict[str, Tensor]]) -> Changes:
    """Return the changes of the people of several passes, of whose parameters `parts` are."""
    import torch

    from hyperdb.adapters.base import LowRank

    made = [adapter.changes(part) for part in parts]
    if not all(isinstance(change, LowRank) for change in made[0].values()):
        return adapter.changes({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    # a product over more people at once may be rounded otherwise: these are the factors that were trained
    return {
        name: LowRank(*(torch.cat(side) for side in zip(*(changes[name] for changes in made), strict=True)))
        for name in made[0]
    }


def seconds_now(base: Base) -> float:
    """Return the seconds of a clock, once the base's device has done all that it was given."""
    import torch

    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter()


class Cohort:
    """I people, whose V photos each `[I, V, 3, H, W]` uint8 are given; `batch` of them are trained in one pass."""

    def __init__(self, model: Personalizer, photos: Tensor, batch: int) -> None:
        self.model, self.photos, self.batch = model, photos, batch
        self._predictions: dict[int | None, tuple[Tensor, float]] = {}

    def _prediction(self, refinements: int | None) -> tuple[Tensor, float]:
        """Return the mean prediction over each person's photos, `[I, N, D]`, and the seconds a person that it took."""
        import torch

        base, hypernet = self.model.base, self.model.hypernet
        assert hypernet is not None
        if refinements not in self._predictions:
            trained = hypernet.config.iterations
            hypernet.refine(trained if refinements is None else refinements)
            began = seconds_now(base)
            with torch.no_grad(), base.autocast():
                every = [hypernet(photos) for photos in self.photos.flatten(0, 1).split(TOGETHER)]
                tokens = torch.cat(every).unflatten(0, self.photos.shape[:2]).mean(1)
            self._predictions[refinements] = tokens, (seconds_now(base) - began) / len(self.photos)
            hypernet.refine(trained)
        return self._predictions[refinements]

    def start(self, method: MethodConfig) -> Factors | None:
        """Return what everybody begins at; None for the base alone."""
        from hyperdb.adapters.base import moved, select

        if method.start is None:
            return None
        tokens, count = self._prediction(method.refinements)[0], len(self.photos)
        if method.start == "average":
            tokens = tokens.mean(0, keepdim=True).expand_as(tokens)
        factors: Factors = moved(self.model.lidb.factors({"tokens": tokens}))
        return select(factors, [(i + 1) % count for i in range(count)]) if method.start == "another" else factors

    def adapter(self, method: MethodConfig) -> Adapter | None:
        """Return what a method trains."""
        from hyperdb.tuning.trainable import trainable

        if method.adapter is not None:
            return trainable(self.model.base, method.adapter)[1]
        return {None: None, "relaxed": self.model.trainable, "lidb": self.model.lidb}[method.train]

    def train(
        self, adapter: Adapter, settings: FitConfig, some: slice, start: Factors | None,
        progress: Callable[[int], Any], begins: AdapterConfig | None,
    ) -> Changes:  # fmt: skip
        """Return the trained changes of some people, without the start `[I, ...]` on top of which they were trained.

        `begins` are the settings that say where each training begins (`AdapterConfig.begins`).
        """
        from tqdm import tqdm

        from hyperdb.adapters.base import select
        from hyperdb.tuning.fit import fit

        parts, base = [], self.model.base
        for first in range(some.start, some.stop, self.batch):
            chosen = slice(first, min(some.stop, first + self.batch))
            photos = settings.sides(self.photos[chosen])
            moments = base.moments(photos.flatten(0, 1)).unflatten(0, photos.shape[:2])
            under = select(start, chosen) if start is not None else None
            begin = self.model.begin(begins, self.photos[chosen])
            with tqdm(total=settings.steps, desc="fine-tuning", unit="it", leave=False, dynamic_ncols=True) as bar:

                def step(number: int, _: float, bar: Any = bar) -> None:
                    bar.update()

                parts.append(fit(base, adapter, moments, settings, under, self.model.prior, step, begin))
            progress(len(photos))
        return _joined(adapter, parts)

    def draw(
        self, method: MethodConfig, settings: FitConfig | None, seed: int, prompts: list[str],
        progress: Callable[[int], Any], people: slice,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """Personalise some of the people with one seed, then draw the prompts, `[J, K, 3, H, W]` uint8.

        Returns also what one person's adapter costs: the numbers that are trained, its bytes in fp32, and its share of
        the seconds of a batch of people.
        """
        import torch

        from hyperdb.adapters.base import both, select
        from hyperdb.tuning.draw import draw
        from hyperdb.tuning.trainable import numbers

        count, base = people.stop - people.start, self.model.base
        start, adapter = self.start(method), self.adapter(method)
        trained = 0 if adapter is None else numbers(adapter)
        size = 4 * (trained + (0 if start is None else numbers(self.model.lidb)))
        noises = [seed * len(prompts) + k for k in range(len(prompts))]
        together = max(self.batch, HELD // max(1, size))
        images, seconds = [], 0.0
        for first in range(people.start, people.stop, together):
            some = slice(first, min(people.stop, first + together))
            began = seconds_now(base)
            changes = select(start, some) if start is not None else None
            if adapter is not None and settings is not None:
                seeded = replace(settings, seed=settings.seed + seed)
                changes = both(changes, self.train(adapter, seeded, some, start, progress, method.adapter))
            seconds += seconds_now(base) - began
            each = some.stop - some.start
            how: dict[str, Any] = {"strength": method.strength, "hybrid": method.hybrid}
            if method.trains or method.start in ("own", "another"):
                images.append(draw(base, changes, each, prompts, noises, **how, progress=progress))
            else:  # what is everybody's is drawn once
                one = None if changes is None else select(changes, slice(0, 1))
                drawn = draw(base, one, 1, prompts, noises, **how)
                images.append(drawn.expand(each, *drawn.shape[1:]))
                progress(each)
        seconds /= count
        if method.start in ("own", "another"):  # everybody's average is there before the person
            seconds += self._prediction(method.refinements)[1]
        return torch.cat(images), {"seconds": round(seconds, 3), "trained": float(trained), "bytes": float(size)}
