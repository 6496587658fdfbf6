"""The weight-space loss between predicted and fitted tokens (eq. 2, second term)."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdb.adapters.lidb import LiDB
from hyperdb.runtime.lazy import PART, Lazy, mean_std


def _inner(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """Return the Frobenius inner product of `A B` and `A2 B2` a layer, `[I, N]`, without forming either."""
    return ((A.mT @ A2) * (B @ B2.mT)).sum((-1, -2))


def gauge_free(lidb: LiDB, predicted: Tensor, fitted: Tensor, scale: Tensor) -> Tensor:
    """Return `||dW_hat - dW||_F^2` a layer over `scale [N]`, mean over layers, `[I]`.

    (c A, B / c) is the same residual: compare residuals, not factors.
    """
    A, B = lidb.split(predicted)
    A2, B2 = lidb.split(fitted)
    distance = _inner(A, B, A, B) + _inner(A2, B2, A2, B2) - 2 * _inner(A, B, A2, B2)
    return (distance / scale).mean(-1)


# eq. 2, second term as printed
def plain(lidb: LiDB, predicted: Tensor, fitted: Tensor, scale: Tensor) -> Tensor:
    """Return `||theta_hat - theta||^2` a layer over `scale [N]`, mean over layers, `[I]`."""
    square = ((predicted - fitted) * lidb.mask).square().sum(-1)
    return (square / scale).mean(-1)


def fisher(lidb: LiDB, predicted: Tensor, fitted: Tensor, scale: Tensor) -> Tensor:
    """Return `sum_j (theta_hat_j - theta_j)^2 / scale_j` over all numbers of a person, `scale [N, D]`, `[I]`.

    With the mean squares of the diffusion loss's gradient as `1 / scale`, it is to second order how much that loss
    rises when a person's fit is replaced by the prediction (a diagonal Fisher matrix: Amari 1998). Numbers that hardly
    move a picture hardly count, whichever layer they are in.
    """
    return ((predicted - fitted).square() / scale * lidb.mask).sum((-1, -2))


def scales(lidb: LiDB, tokens: Tensor | Lazy, kind: str, moment: Tensor | None = None) -> Tensor:
    """Return what normalises each layer `[N]`, or with the loss `fisher` each number `[N, D]`.

    It is the fits' variance in the space of the loss called `kind`. With it, predicting everyone as the mean of the
    factors costs about 1. One fit has no variance: its size counts. `fisher` weights the numbers by `moment [N, D]`.
    """
    mean = (mean_std(tokens)[0] if len(tokens) > 1 else torch.zeros_like(tokens[0]))[None].to(lidb.mask.device)
    weight = moment.to(mean.device) if kind == "fisher" and moment is not None else None
    spread = torch.zeros(())
    for part in tokens.split(PART):
        part = part.to(mean.device)
        if weight is not None:
            found = ((part - mean).square() * weight * lidb.mask).sum((-1, -2))  #  [K]
        elif kind == "plain":
            found = ((part - mean) * lidb.mask).square().sum(-1)  #                 [K, N]
        else:
            A, B = lidb.split(part)
            A2, B2 = lidb.split(mean.expand_as(part))
            found = _inner(A, B, A, B) + _inner(A2, B2, A2, B2) - 2 * _inner(A, B, A2, B2)
        spread = spread.to(mean.device) + found.sum(0) / len(tokens)
    return spread.clamp_min(1e-20) / weight.clamp_min(1e-20) if weight is not None else spread.clamp_min(1e-8)


class WeightSpace:
    """The distance of predictions from fits by the loss called `kind`: gauge_free, plain or fisher.

    `fits [I, N, D]` scale it: those that are learned from, whichever a prediction is then compared with. `fisher` needs
    `moment [N, D]`, the mean square of people's gradients.
    """

    def __init__(self, lidb: LiDB, fits: Tensor | Lazy, kind: str, moment: Tensor | None = None) -> None:
        self.lidb, self.scale = lidb, scales(lidb, fits, kind, moment)
        self.distance = {"gauge_free": gauge_free, "plain": plain, "fisher": fisher}[kind]

    def __call__(self, predicted: Tensor, fits: Tensor | Lazy, rows: Tensor) -> Tensor:
        """Return how far each of `predicted [I, N, D]` is from its fit, the row of `fits` that `rows [I]` says.

        Where there is none, a row is -1 and the prediction is left out: `[K]`.
        """
        has = rows >= 0
        fitted = fits[rows[has]].to(predicted.device)
        return self.distance(self.lidb, predicted[has.to(predicted.device)], fitted, self.scale)
