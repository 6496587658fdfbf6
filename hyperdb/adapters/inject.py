"""Apply changes to the modules of any model, by hooks that read a context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperdb.adapters.base import Change, Changes, DenseChange, LowRank, Replacement, Sum, identities_of
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError


def _sites(modules: Mapping[str, Any]) -> dict[str, Site]:
    return {name: m if isinstance(m, Site) else Site(name, m) for name, m in modules.items()}


def _checked(sites: Mapping[str, Site], changes: Mapping[str, Any]) -> dict[str, Change]:
    """Return the changes, plain pairs as low-rank ones; refuse unknown sites and wrong shapes."""
    ready: dict[str, Change] = {}
    for name, change in changes.items():
        if name not in sites:
            raise UserError(f"the model has no {'convolution' if change[0].ndim == 5 else 'linear layer'} {name}")
        ready[name] = LowRank(*change) if type(change) is tuple else change
        ready[name].check(sites[name])
    return ready


def settled(changes: Changes, modules: Mapping[str, Any]) -> dict[str, Change]:
    """Return changes that will not be trained any more, on their sites' devices and in the form quickest to apply.

    To settle them again costs nothing: who applies them several times does it once before.
    """
    sites = _sites({name: modules[name] for name in changes})
    ready: dict[str, Change] = {}
    for name, change in changes.items():
        site = sites[name]
        change = LowRank(*change) if type(change) is tuple else change
        change.check(site)
        ready[name] = change if site.parameter.is_meta else change.settled(site)
    return ready


def _is_dense(change: Change) -> bool:
    """Say whether a change knows no more of itself than its dense form, or is of low rank."""
    return isinstance(change, LowRank) or type(change).__call__ is DenseChange.__call__


class Injection:
    """Forward hooks on `modules`, or on `Site`s, that add the changes set at the time.

    With one identity every row of a batch gets it. With I identities a batch is `repeat` blocks of equal size
    (classifier-free guidance: 2), each identity-major: rows `i*S .. (i+1)*S` of a block are identity `i`'s. Before
    these may stand `plain` more blocks of that size, which get nothing (hybrid guidance); `plain` may be set alone.
    Works in the input's dtype and device, also under autocast; gradient flows into changes and input.

    Under gradient checkpointing the forward runs again during backward: keep the changes set until backward
    has ended (call `backward` inside `using`).
    """

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.sites = _sites(modules)
        self._changes: dict[str, Change] = {}
        self.strength, self.repeat, self._identities, self.plain = 1.0, 1, 1, 0
        self._handles = [
            site.module.register_forward_hook(partial(self._hook, name)) for name, site in self.sites.items()
        ]

    def _hook(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        change = self._changes.get(name)
        if change is None:
            return None
        site, x = self.sites[name], inputs[0]
        if isinstance(change, Replacement):
            return change.replace(site, x, output, self)

        def residual(x: Tensor, y: Tensor) -> Tensor:
            if self._identities == 1:
                # not [0, 0]: its gradient would be a tensor of zeros, filled, for each site
                return change(x[None, None], y[None, None], site).squeeze(0).squeeze(0)
            if x.shape[0] % (self.repeat * self._identities):
                raise UserError(
                    f"{name}: {x.shape[0]} rows cannot be divided among {self._identities} identities x "
                    f"{self.repeat} blocks"
                )
            apart = (self.repeat, self._identities, -1)
            y = y.unflatten(0, apart)
            return change(x.unflatten(0, apart), y, site).expand_as(y).flatten(0, 2)

        changed = output
        if self.plain:
            blocks, rows = self.plain + self.repeat, len(output)
            if rows % blocks:
                raise UserError(f"{name}: {rows} rows cannot be divided into {blocks} blocks")
            begin = rows // blocks * self.plain
            x, changed = x[begin:], output[begin:]
        # the layer has just made its output: nobody else holds it
        changed.add_(residual(x, changed), alpha=self.strength)
        return output

    def set(self, changes: Changes, strength: float = 1.0, repeat: int = 1, plain: int = 0) -> None:
        """Use `changes` from now on. Raises `UserError` for sites that do not exist or changes that do not fit."""
        ready = _checked(self.sites, changes)
        identities = identities_of(ready)
        self._changes, self._identities = ready, identities
        self.strength, self.repeat, self.plain = strength, repeat, plain

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
    def using(self, changes: Changes, strength: float = 1.0, repeat: int = 1, plain: int = 0) -> Iterator[None]:
        """Use `changes` within a block, then what was in use before."""
        before = self._changes, self.strength, self.repeat, self.plain
        self.set(changes, strength, repeat, plain)
        try:
            yield
        finally:
            self._changes, self.strength, self.repeat, self.plain = before
            self._identities = identities_of(self._changes)


class Merging:
    """The changes of one identity as weights that they are added to, `frozen` ones once and trained ones at each use.

    A layer then makes one product, not three, forward and backward, but its weight has a gradient of its full size:
    quicker where layers are small. Layers of one shape get their weights in one operation, in `dtype`, or in their own
    without one: give that which the network computes in. Only low-rank changes and those that are their dense form are
    merged; the others stay hooks of the `injection`. Gradient flows into changes and input, as it does with
    `Injection.using`. Raises `UserError` for changes that do not fit, or of several identities.
    """

    def __init__(self, injection: Injection, frozen: Changes | None = None, dtype: torch.dtype | None = None) -> None:
        self.injection, self.dtype = injection, dtype
        self.frozen = _checked(injection.sites, frozen or {})
        self._stacks: dict[tuple[str, ...], Tensor] = {}  # weights of layers of one shape, with what is frozen

    @contextmanager
    def using(self, changes: Changes) -> Iterator[None]:
        """Use frozen and trained changes within a block, then what was in use before."""
        sites, trained = self.injection.sites, _checked(self.injection.sites, changes)
        if (count := max(identities_of(self.frozen), identities_of(trained))) > 1:
            raise UserError(f"the changes of {count} identities cannot be merged into one weight")
        weights, hooked = {}, {}
        alike: dict[tuple[int, ...], list[str]] = {}  # layers by rank and shape
        for name in self.frozen | trained:
            parts = [c[name] for c in (self.frozen, trained) if name in c]
            if all(isinstance(part, LowRank) for part in parts):
                rank = len(trained[name].down[0]) if name in trained else 0  # type: ignore[attr-defined]
                alike.setdefault((rank, *sites[name].shape), []).append(name)
            elif sites[name].kind in ("linear", "conv") and all(map(_is_dense, parts)):
                weight = sites[name].weight()
                weights[name] = weight + sum(part.dense(weight)[0] for part in parts)
            else:
                hooked[name] = parts[0] if len(parts) == 1 else Sum(*parts)
        for (rank, *_), names in alike.items():
            weights |= zip(names, self._alike(names, [trained[name] for name in names] if rank else []), strict=True)
        modules: list[Any] = [sites[name].module for name in weights]
        try:
            with self.injection.using(hooked):
                for module, weight in zip(modules, weights.values(), strict=True):
                    # found before the parameter of that name, which stays as it is
                    module.__dict__["weight"] = weight.to(self.dtype or module.weight.dtype)
                yield
        finally:
            for module in modules:
                module.__dict__.pop("weight", None)

    def _alike(self, names: Sequence[str], changes: Sequence[Any]) -> Sequence[Tensor]:
        """Return the weights of layers of one shape with their frozen changes and, if there are any, trained ones."""
        if (stack := self._stacks.get(tuple(names))) is None:
            weights = {name: self.injection.sites[name].weight() for name in names}
            with torch.no_grad():
                for name in names:
                    if name in self.frozen:
                        weights[name] = weights[name] + self.frozen[name].dense(weights[name])[0]
                stack = self._stacks[tuple(names)] = torch.stack(list(weights.values()))
        whole = stack
        if changes:
            down, up = (torch.cat(factors).to(stack) for factors in zip(*changes, strict=True))
            whole = torch.baddbmm(stack.flatten(2), up, down.flatten(2)).view(stack.shape)
        return whole.to(self.dtype or stack.dtype).unbind()
