"""Optimiser, learning-rate schedule and weight averaging shared by every training stage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass
class Schedule:
    """Linear warm-up, constant, then cosine decay over the last `decay` fraction of the steps."""

    steps: int
    warmup: int = 0
    decay: float = 1.0

    def __call__(self, step: int) -> float:
        """Return the factor, in (0, 1], of the learning rate of 0-based `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        begin = self.steps * (1 - self.decay)
        if step <= begin or self.decay == 0:
            return 1.0
        progress = (step - begin) / max(1, self.steps - begin)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(params: Iterable[torch.nn.Parameter], rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with betas (.9, .99), fused; `add_param_group({"params": ..., "lr": ...})` gives others their own rate."""
    return torch.optim.AdamW(list(params), lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` of the one it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


class EMA:
    """Exponential moving average of parameters, with the warm-up (1 + step) / (10 + step)."""

    def __init__(self, params: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.params = list(params)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.params]

    def update(self, step: int) -> None:
        """Move the average towards the parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - decay)

    def copy_to_params(self) -> None:
        """Overwrite the parameters with the average."""
        params: list[torch.Tensor] = [*self.params]
        with torch.no_grad():
            torch._foreach_copy_(params, self.average)

    def swap(self) -> None:
        """Exchange the parameters and the average (call it twice around an evaluation)."""
        with torch.no_grad():
            for param, average in zip(self.params, self.average, strict=True):
                kept = param.detach().clone()
                param.copy_(average)
                average.copy_(kept)
