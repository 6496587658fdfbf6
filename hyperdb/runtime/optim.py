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


class Muon(torch.optim.AdamW):
    """AdamW for `params`; for `matrices` (2-D, or stacks of them) momentum made orthogonal (Jordan et al. 2024).

    An orthogonal step moves a matrix equally far in every direction. Adam follows the few that all examples share and
    is slow in the many in which they differ. `matrix_rate`: the spectral norm of a step of a square matrix.

    `plain` parameters take steps along the average of their gradients, of the rate `plain_rate`. Where gradients are
    mostly noise, that average is what they have in common, and both other kinds of step would make the noise as long.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        rate: float,
        matrices: Iterable[torch.nn.Parameter],
        matrix_rate: float,
        plain: Iterable[torch.nn.Parameter] = (),
        plain_rate: float = 0.0,
    ) -> None:
        super().__init__(list(params), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        for some, step, orthogonal in ((list(matrices), matrix_rate, True), (list(plain), plain_rate, False)):
            if some:
                self.add_param_group({"params": some, "lr": step, "momentum": 0.95, "orthogonal": orthogonal})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step of every kind."""
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if "momentum" not in g]
            super().step()
        finally:
            self.param_groups = groups
        for group in (g for g in groups if "momentum" in g):
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                ahead = param.grad.lerp(state["momentum"], group["momentum"])  #      Nesterov's
                scale = 1.0
                if group["orthogonal"]:
                    ahead, scale = orthogonal(ahead), max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.add_(ahead, alpha=-group["lr"] * scale)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices `[..., m, n]` with their singular values moved near 1 (Jordan et al. 2024).

    Five Newton-Schulz iterations, whose coefficients make small values grow fastest: they end between about .6 and 1.3.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


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
