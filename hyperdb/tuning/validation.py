"""What a hypernetwork does for people it was not trained on: losses, likeness, and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hyperdb.adapters.base import Changes, identities_of, select
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.lidb import LiDB
from hyperdb.data.fits import FitStore
from hyperdb.data.people import People
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.loss import face_focus, predict, signal_weight, stratified_timesteps, target
from hyperdb.faces.image import grid, save_png
from hyperdb.hypernet.loss import WeightSpace
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics.face import SFace
from hyperdb.metrics.likeness import face_cosine, galleries
from hyperdb.metrics.score import paired
from hyperdb.runtime.seed import generator
from hyperdb.tuning.draw import draw, together

LEVELS = 4  # noise levels for each person
PLAIN = 2  # pictures of each person under the instance prompt
SHOWN = 10  # people on the sheet


def group(size: int) -> int:
    """Return of how many people the losses are computed in one pass, at pictures of `size` px."""
    return max(1, together(size) // LEVELS)


@dataclass(kw_only=True)
class Validation:
    """Unseen people, who are measured at the same noise every time.

    The hypernetwork sees a person's first photo. The training's diffusion loss on the second, and the face cosine of
    pictures with all but the first, are measured in three ways: with the person's `own` prediction, with another
    person's (`shuffled`), and with the `mean` of all. Of a network that sees who somebody is, the own one does best.
    The pictures are two of "a [V] face", and one under each of the prompts `changed`, whose figures stand apart.

    `people` have two photos or more each. `logit_normal`, `signal_weight` and `face_weight` are those of the training.
    With `fits`, a store that holds some of these people, the `weight_space` loss to them is measured too.
    """

    base: Base
    lidb: LiDB
    people: People
    style: str  # prompt of the last row of the sheet
    changed: list[str]
    logit_normal: list[float] | None
    signal_weight: float | None
    face_weight: float
    fits: FitStore | None = None
    weight_space: WeightSpace | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rows = self.people.photos
        views = min(len(r) for r in rows)
        first = torch.stack([r[0] for r in rows])
        others = torch.stack([r[1:views] for r in rows])  #                         [I, K]
        self.shown = self.people.images[first]  #                                   [I, 3, H, W]
        self.others = self.people.images[others.flatten()].unflatten(0, others.shape)
        self.latents = self.base.moments(self.others[:, 0])[:, 0]  #                [I, c, h, w]
        # each person's row in the store, -1 where it has none
        self.fit_rows = self.fits.rows_of(self.people.keys(self.fits.by, first)) if self.fits is not None else None

    @cached_property
    def _recogniser(self) -> SFace:
        return SFace()

    @cached_property
    def _gallery(self) -> Tensor:
        return galleries(self._recogniser, self.others)

    def measure(self, model: Hypernet, sheet: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Return the scores and, of own - another's and own - mean, mean and interval over people; write the sheet."""
        count, seed = len(self.shown), self.seed
        model.eval()
        with torch.no_grad(), self.base.autocast():
            tokens = model(self.shown)
        model.train()
        own = self.lidb.factors({"tokens": tokens})
        shuffled = select(own, [(i + 1) % count for i in range(count)])
        mean = self.lidb.factors({"tokens": tokens.mean(0, keepdim=True)})
        losses = self._losses({"own": own, "shuffled": shuffled, "mean": mean})
        scores = {f"diffusion_{name}": round(loss.mean().item(), 5) for name, loss in losses.items()}
        if self.fits is not None and self.fit_rows is not None and self.weight_space is not None:
            distance = self.weight_space(tokens, self.fits.tokens, self.fit_rows)
            scores["weights"] = round(distance.mean().item(), 5)
        prompts = [self.base.config.instance_prompt] * PLAIN + self.changed
        seeds = list(range(len(prompts)))
        with tqdm(total=3 * count + 1, desc="pictures", unit="person", leave=False, dynamic_ncols=True) as bar:
            drawn = {
                name: draw(self.base, changes, count, prompts, seeds, progress=bar.update)
                for name, changes in (("own", own), ("shuffled", shuffled))
            }
            alike = draw(self.base, mean, 1, prompts, seeds, progress=bar.update)  # for all
            drawn["mean"] = alike.expand_as(drawn["own"])
            styled = draw(self.base, own, count, [self.style], [0], progress=bar.update)
        cosines = {n: face_cosine(self._recogniser, images, self._gallery) for n, images in drawn.items()}
        faces = {"face_cosine": {n: x[:, :PLAIN].mean(1) for n, x in cosines.items()}}
        if self.changed:
            faces["face_cosine_changed"] = {n: x[:, PLAIN:].mean(1) for n, x in cosines.items()}
        for kind, values in faces.items():
            scores |= {f"{kind}_{name}": round(cosine.mean().item(), 4) for name, cosine in values.items()}
        pairs = {
            f"{kind}_own-{name}": paired(values["own"].numpy(), values[name].numpy(), seed)
            for kind, values in {"diffusion": losses, **faces}.items()
            for name in ("shuffled", "mean")
        }
        self._save(sheet, drawn["own"], drawn["shuffled"], styled)
        return scores, pairs

    def _losses(self, ways: Mapping[str, Changes]) -> dict[str, Tensor]:
        """Return each person's diffusion loss `[I]` in each of the ways, as many people in a pass as `group` says."""
        base, count, schedule = self.base, len(self.shown), self.base.schedule
        g = generator(self.seed, "validation")
        t = stratified_timesteps(count, LEVELS, schedule.config.num_train_timesteps, g, self.logit_normal)
        t = t.flatten().to(base.device)  #                                          [I * S]
        z = self.latents.repeat_interleave(LEVELS, 0).to(base.device)
        noise = torch.randn(z.shape, generator=g).to(base.device)
        ids = base.tokenize([base.config.instance_prompt]).expand(len(t), -1)
        weight = signal_weight(schedule, t, self.signal_weight)[:, None, None, None]
        weight = weight * face_focus(self.face_weight, *base.latent_shape[1:]).to(base.device)
        losses, each = {}, group(base.config.size)
        injection = Injection(base.targets())
        for name, changes in ways.items():
            found = []
            for first in range(0, count, each):
                people = slice(first, first + each)
                part = slice(people.start * LEVELS, people.stop * LEVELS)
                theirs = changes if identities_of(changes) == 1 else select(changes, people)
                rows = z[part], noise[part], t[part]
                with torch.no_grad(), injection.using(theirs):
                    error = weight[part] * (predict(base, *rows, ids[part]) - target(schedule, *rows)).square()
                found.append(error.flatten(1).mean(1).view(-1, LEVELS).mean(1).cpu())
            losses[name] = torch.cat(found)
        injection.remove()
        return losses

    def _save(self, path: Path, own: Tensor, shuffled: Tensor, styled: Tensor) -> None:
        """Write pictures `[I, K, 3, H, W]` of the first people, a column each, below their photos."""
        few = min(len(self.shown), SHOWN)
        rows = [self.shown, own[:, 0], own[:, 1], shuffled[:, 0], styled[:, 0]]
        pixels = torch.cat([x[:few] for x in rows]).permute(0, 2, 3, 1).numpy()
        labels = ["photo", "predicted", "predicted", "another's", "styled"]
        save_png(path, grid(list(pixels), few, rows=labels))


def verdict(found: Mapping[str, Any]) -> str:
    """Say in words whether unseen people's own predictions denoise them better than another's and than the average.

    `found` holds the pairs of `Validation.measure`, how many `people` there are, and after which `step` it was.
    """
    lines = [f"on {found['people']} unseen people after {found['step']} steps, the own prediction against"]
    for other, word in (("shuffled", "another person's"), ("mean", "everybody's average")):
        loss, face = (found[f"{kind}_own-{other}"] for kind in ("diffusion", "face_cosine"))
        said = "it carries the person" if loss["hi"] < 0 else "it is not better"
        line = (
            f"  {word}: loss {loss['mean']:+.5f} [{loss['lo']:+.5f}, {loss['hi']:+.5f}], "
            f"face cosine {face['mean']:+.3f} [{face['lo']:+.3f}, {face['hi']:+.3f}]: {said}"
        )
        if changed := found.get(f"face_cosine_changed_own-{other}"):
            line += (
                f"; under other prompts face cosine {changed['mean']:+.3f} [{changed['lo']:+.3f}, {changed['hi']:+.3f}]"
            )
        lines.append(line)
    return "\n".join(lines)
