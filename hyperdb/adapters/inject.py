"""Apply residuals to linear layers and convolutions of any model: by hooks that read a context, or by merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperdb.adapters.base import Factors, delta
from hyperdb.runtime.errors import UserError


def _divide(x: Tensor, repeat: int, identities: int, name: str) -> None:
    if x.shape[0] % (repeat * identities):
        raise UserError(f"{name}: {x.shape[0]} rows cannot be divided among {identities} identities x {repeat} blocks")


def _residual(x: Tensor, down: Tensor, up: Tensor, repeat: int, name: str) -> Tensor:
    """Return `x @ dW^T`, each row of `x: [B, ..., n]` under its own identity."""
    down, up = down.to(x), up.to(x)
    if down.shape[0] == 1:
        return x @ down[0].mT @ up[0].mT  #                                    [B, ..., n] -> [B, ..., m]
    identities = down.shape[0]
    _divide(x, repeat, identities, name)
    rows = x.reshape(repeat, identities, -1, x.shape[-1])  #                      [repeat, I, S * ..., n]
    return (rows @ down.mT @ up.mT).reshape(*x.shape[:-1], up.shape[1])  #        [B, ..., m]


def _conv_residual(x: Tensor, down: Tensor, up: Tensor, conv: nn.Conv2d, repeat: int, name: str) -> Tensor:
    """Return what a convolution by `dW` gives, each row of `x: [B, c, H, W]` under its own identity."""
    down, up = down.to(x), up.to(x)[..., None, None]
    how: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    identities = down.shape[0]
    if identities == 1:
        return torch.conv2d(torch.conv2d(x, down[0], **how), up[0])
    _divide(x, repeat, identities, name)
    rows = x.unflatten(0, (repeat, identities, -1)).transpose(1, 2)  #            [repeat, S, I, c, H, W]
    shape = rows.shape[:3]
    y = torch.conv2d(rows.flatten(2, 3).flatten(0, 1), down.flatten(0, 1), **how, groups=identities)
    y = torch.conv2d(y, up.flatten(0, 1), groups=identities)  #                   [repeat * S, I * m, H', W']
    return y.unflatten(1, (identities, -1)).unflatten(0, shape[:2]).transpose(1, 2).flatten(0, 2)


def _check(modules: Mapping[str, nn.Module], factors: Factors) -> int:
    """Return the number of identities; refuse unknown layers, wrong shapes and mixed identities."""
    counts = set()
    for name, (down, up) in factors.items():
        module = modules.get(name)
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
            m, n = module.out_channels, [module.in_channels, *module.kernel_size]
        elif isinstance(module, nn.Linear):
            m, n = module.out_features, [module.in_features]
        else:
            raise UserError(f"the model has no {'convolution' if down.ndim == 5 else 'linear layer'} {name}")
        if list(down.shape[2:]) != n or up.shape != (down.shape[0], m, down.shape[1]):
            inputs = ", ".join(map(str, n))
            raise UserError(
                f"{name} takes down [I, r, {inputs}] and up [I, {m}, r], not {list(down.shape)} and {list(up.shape)}"
            )
        counts.add(down.shape[0])
    if len(counts) > 1:
        raise UserError(f"layers disagree on the number of identities: {sorted(counts)}")
    return max(counts, default=1)


def merge(modules: Mapping[str, nn.Module], factors: Factors, strength: float = 1.0) -> None:
    """Add the residual of one identity to the weights in place, in float32 or wider, rounded once."""
    if _check(modules, factors) != 1:
        raise UserError("only one identity can be merged into a model; select one first")
    with torch.no_grad():
        for name, (down, up) in factors.items():
            weight: Any = modules[name].weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            residual = delta(down.to(weight.device, wide), up.to(weight.device, wide))[0]  # as the weight
            weight.copy_(weight.to(wide) + strength * residual)


def unmerge(modules: Mapping[str, nn.Module], factors: Factors, strength: float = 1.0) -> None:
    """Undo `merge` with the same arguments, up to the rounding of the weights' dtype."""
    merge(modules, factors, -strength)


class Injection:
    """Forward hooks on `modules` (`nn.Linear` or `nn.Conv2d`) that add the residual of the factors set at the time.

    With one identity every row of a batch gets it. With I identities a batch is `repeat` blocks of equal size
    (classifier-free guidance: 2), each identity-major: rows `i*S .. (i+1)*S` of a block are identity `i`'s. Before
    these may stand `plain` more blocks of that size, which get nothing (hybrid guidance); `plain` may be set alone.
    Works in the input's dtype and device, also under autocast; gradient flows into factors and input.

    Under gradient checkpointing the forward runs again during backward: keep the factors set until backward
    has ended (call `backward` inside `using`).
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._factors: Factors = {}
        self._strength, self._repeat, self.plain = 1.0, 1, 0
        self._handles = [
            m.register_forward_hook(partial(self._hook, name)) for name, m in self.modules.items()
        ]

    def _hook(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if name not in self._factors:
            return None
        down, up = self._factors[name]

        def change(rows: Tensor) -> Tensor:
            if isinstance(module, nn.Conv2d):
                return _conv_residual(rows, down, up, module, self._repeat, name)
            return _residual(rows, down, up, self._repeat, name)

        if self.plain:
            blocks, rows = self.plain + self._repeat, len(output)
            if rows % blocks:
                raise UserError(f"{name}: {rows} rows cannot be divided into {blocks} blocks")
            begin = rows // blocks * self.plain
            # the layer has just made its output: nobody else holds it
            output[begin:].add_(change(inputs[0][begin:]), alpha=self._strength)
            return output
        residual = change(inputs[0])
        return output + (residual if self._strength == 1 else self._strength * residual)

    def set(self, factors: Factors, strength: float = 1.0, repeat: int = 1, plain: int = 0) -> None:
        """Use `factors` from now on. Raises `UserError` for layers that do not exist or do not fit."""
        _check(self.modules, factors)
        self._factors, self._strength, self._repeat, self.plain = dict(factors), strength, repeat, plain

    def clear(self) -> None:
        """Add nothing from now on; the hooks stay."""
        self.set({})

    def remove(self) -> None:
        """Take the hooks off the model; may be called twice."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def using(self, factors: Factors, strength: float = 1.0, repeat: int = 1, plain: int = 0) -> Iterator[None]:
        """Use `factors` within a block, then what was in use before."""
        before = self._factors, self._strength, self._repeat, self.plain
        self.set(factors, strength, repeat, plain)
        try:
            yield
        finally:
            self._factors, self._strength, self._repeat, self.plain = before
