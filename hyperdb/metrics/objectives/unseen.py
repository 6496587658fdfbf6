"""What is measured of a trained judge, on people whom it has not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperdb.metrics.score import auc

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base
    from hyperdb.metrics.objectives.objective import Objective

RIDGE = 1e-2  # of the mean variance of a feature


def split(people: People, held_out: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the people to learn from, and those of the last `held_out`, whom it is measured on."""
    seen = people.identity < people.identities - held_out
    return seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]


def told_apart(features: Tensor, people: People, rows: Tensor) -> dict[str, dict[str, float]]:
    """Return by style how well photos tell of pictures whom they show, from features `[N, C]` of length 1 of the rows.

    `auc` is the chance that a photo of the person is nearer to a picture than a photo of somebody else, `rank1` how
    often the nearest photo of all is the person's. No photo is compared with itself. A style in which no picture has
    another photo of its person is left out.
    """
    photo, who = people.is_style("photo")[rows], people.identity[rows]
    cosine = features @ features.mT  #                                                 [N, N]
    same = (who[:, None] == who) & photo & ~torch.eye(len(rows), dtype=torch.bool)
    other = (who[:, None] != who) & photo
    nearest = cosine.masked_fill(~(same | other), -2).argmax(1, keepdim=True)
    hit = same.gather(1, nearest)[:, 0]
    found: dict[str, dict[str, float]] = {"auc": {}, "rank1": {}}
    for style in people.names["style"]:
        mine = people.is_style(style)[rows] & same.any(1)
        if mine.any() and other[mine].any():
            found["auc"][style] = auc(cosine[mine][same[mine]], cosine[mine][other[mine]])
            found["rank1"][style] = hit[mine].float().mean().item()
    return found


def probe(features: Tensor, labels: Tensor, half: Tensor) -> float:
    """Return how often linear classifiers of features `[N, C]` name the label `[N]` of the other half of the pictures.

    Each is the closed-form ridge regression of the labels, as zeros and ones, on one of the two halves.
    """
    features, right = features.double(), 0
    for mine in (half, ~half):
        known = F.one_hot(labels[mine], int(labels.max()) + 1).double()
        x, y = features[mine] - features[mine].mean(0), known - known.mean(0)
        square = x.mT @ x
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-12) * torch.eye(len(square), dtype=square.dtype)
        told = (features[~mine] - features[mine].mean(0)) @ torch.linalg.solve(square + ridge, x.mT @ y)
        right += int(((told + known.mean(0)).argmax(1) == labels[~mine]).sum())
    return right / len(labels)


def probed(features: Tensor, people: People, rows: Tensor) -> dict[str, float]:
    """Return how often a linear probe of features `[N, C]` of the rows tells the style, and how often the place.

    It is asked of one half of the people, and learns from the other.
    """
    half = people.identity[rows] % 2 == 0
    return {name: probe(features, people.labels[name][rows], half) for name in ("style", "place")}


def measured(
    objective: Objective, judge: Any, base: Base, moments: Tensor, rows: Tensor
) -> dict[str, dict[str, float]]:
    """Return {figure and kind: {of what: value}}, of the rows' renders and of these through the autoencoder.

    `moments [N, 2, c, h, w]` are those of all pictures.
    """
    found = {}
    seen = {"renders": objective.people.images[rows], "reconstructions": base.decode(moments[rows, 0].float())}
    for kind, images in seen.items():
        for figure, values in objective.measure(judge, images, rows).items():
            found[f"{figure}_{kind}"] = {name: round(value, 4) for name, value in values.items()}
            print(f"{kind}, {figure}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    return found
