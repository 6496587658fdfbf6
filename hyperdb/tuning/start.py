"""Where the fits of a store begin, and how far a step may move each of their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import resolve

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.lidb import LiDB
    from hyperdb.diffusion.base import Base
    from hyperdb.tuning.fit import FitConfig
    from hyperdb.tuning.prior import Prior

WORDS = ("template", "average")  # anything else names a hypernetwork
PARTS = ("all", "B")
PEOPLE, LEVELS = 64, 8  # whose gradients are measured, and the rows of each


@dataclass
class Start:
    """What all fits of a store have in common before their first step.

    `average [N, D]` is where everybody's fit begins, or the average of where they begin. `moment [N, D]` is the mean
    square of a person's gradient there, over people and over what is drawn. A number whose gradient is large for many
    people is one in which they differ visibly; so it is also the metric `fisher` of the weight-space loss.
    """

    average: Tensor
    moment: Tensor

    def gain(self, lidb: LiDB, trained: str) -> Tensor:
        """Return what a gradient `[N, D]` is multiplied by, so that every layer moves about equally far in a step.

        It is one over the length of a person's gradient in that layer, and 0 for numbers that stay as they are: those
        of A with `trained` B.
        """
        moving = lidb.mask.cpu() if trained == "all" else lidb.part("B").cpu()
        length = (self.moment * moving).sum(1, keepdim=True).sqrt()  #              [N, 1]
        return moving / length.clamp_min(1e-12)


def own_starts(start: Start, lidb: LiDB, predicted: Tensor | None, people: int, trained: str) -> Tensor:
    """Return where each of so many people begins, `[I, N, D]`: at the average, or at what is `predicted [I, N, D]`.

    Numbers that stay as they are, those of A with `trained` B, are everybody's average in either case.
    """
    import torch

    everybody = start.average.expand(people, -1, -1)
    if predicted is None:
        return everybody
    return torch.where(lidb.part("B").cpu(), predicted, everybody) if trained == "B" else predicted


def people_a_pass(config: FitConfig, batch: int) -> int:
    """Return the gradients of how many people are computed in one pass, where `batch` people are fitted in one."""
    return max(1, min(16, batch * config.levels // LEVELS))


def _gradients(base: Base, lidb: LiDB, tokens: Tensor, moments: Tensor, config: FitConfig, batch: int) -> Tensor:
    """Return each person's gradient `[I, N, D]` at the same `tokens [N, D]`.

    It is what one step of gradient descent at a rate of 1 takes away. A pass has no more rows than one of `batch` fits.
    """
    import torch

    from hyperdb.tuning.fit import Begin, fit

    once = replace(config, steps=1, warmup=0, rate=1.0, levels=LEVELS, optimizer="sgd", prior_weight=0.0)
    found = []
    for part in moments.split(people_a_pass(config, batch)):
        at = tokens.expand(len(part), -1, -1)
        begin = Begin({"tokens": at}, {"tokens": torch.ones_like(tokens)})
        found.append(at - fit(base, lidb, part, once, begin=begin)["tokens"].cpu())
    return torch.cat(found)


def load_start(
    base: Base, lidb: LiDB, crowd: Callable[[], tuple[Tensor, Tensor | None]], average: FitConfig, fit: FitConfig,
    prior: Prior | None, path: Path, key: str, batch: int,
) -> Start:  # fmt: skip
    """Make the start of a store once and keep it at `path`, under `key`.

    `crowd` returns the photos of some people, `moments [I, K, 2, c, h, w]`, and what a hypernetwork has
    `predicted [I, N, D]` for them, or None; it is called if the start is not there. The start is the mean of the
    predictions. Without predictions, it is one adapter fitted with the settings `average` to the photos of everybody at
    once: what portraits of this crop have in common. The gradients are those of the loss of `fit`, of
    which `batch` are made in one pass. Of several jobs that make it at once, all take what the first has written.
    """
    from tqdm import tqdm

    from hyperdb.runtime.files import load_made, load_tensors, save_tensors
    from hyperdb.tuning.fit import fit as fitted

    if (made := load_made(path)) is not None:
        tensors, metadata = made
        if metadata.get("key") == key:
            return Start(tensors["average"], tensors["moment"])
        path.unlink(missing_ok=True)
    moments, predicted = crowd()
    if predicted is not None:
        tokens = predicted.mean(0)
    else:
        with tqdm(total=average.steps, desc="everybody's average", unit="step", dynamic_ncols=True) as bar:
            together, advance = moments.flatten(0, 1)[None], lambda _step, _loss: bar.update()
            tokens = fitted(base, lidb, together, average, None, prior, advance)["tokens"][0].cpu()
    moment = _gradients(base, lidb, tokens, moments[:PEOPLE], fit, batch).square().mean(0)
    save_tensors(path, {"average": tokens, "moment": moment}, {"key": key}, first=True)
    tensors, _ = load_tensors(path)
    return Start(tensors["average"], tensors["moment"])


def check_start(kind: str) -> None:
    """Raise `UserError` unless `kind` is a word of `WORDS` or names a hypernetwork's folder or file."""
    if kind not in WORDS and not hypernet_file(kind).is_file():
        raise UserError(f"start={kind}: expected template, average, or the folder of a trained hypernetwork")


def hypernet_file(name: str) -> Path:
    """Return the file of the hypernetwork that `start` names by its folder or its file."""
    path = resolve(name)
    return path / "hypernet.safetensors" if path.is_dir() else path
