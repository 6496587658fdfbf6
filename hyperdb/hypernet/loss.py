"""The weight-space loss between predicted and fitted tokens (eq. 2, second term)."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdb.adapters.lidb import LiDB


def _inner(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """Return the Frobenius inner product of `A B` and `A2 B2` a layer, `[I, N]`, without forming either."""
    return ((A.mT @ A2) * (B @ B2.mT)).sum((-1, -2))


def residual_norms(lidb: LiDB, tokens: Tensor) -> Tensor:
    """Return `||dW||_F^2` a layer, `[I, N]`: exact, because the bases are orthonormal."""
    A, B = lidb.split(tokens)
    return _inner(A, B, A, B)


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


def scales(lidb: LiDB, tokens: Tensor, kind: str) -> Tensor:
    """Return what normalises each layer, `[N]`: the fits' variance in the space of the loss called `kind`.

    With it, predicting everyone as the mean of the factors costs about 1. One fit has no variance: its size counts.
    """
    mean = (tokens.mean(0, keepdim=True) if len(tokens) > 1 else torch.zeros_like(tokens)).expand_as(tokens)
    if kind == "plain":
        spread = ((tokens - mean) * lidb.mask).square().sum(-1).mean(0)
    else:
        A, B = lidb.split(tokens)
        A2, B2 = lidb.split(mean)
        spread = (_inner(A, B, A, B) + _inner(A2, B2, A2, B2) - 2 * _inner(A, B, A2, B2)).mean(0)
    return spread.clamp_min(1e-8)
