"""Apply changes to the modules of any model, by hooks that read a context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hyperdb.adapters.base import Change, Changes, DenseChange, LowRank, Replacement, identities_of
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


def _weight(change: Change, site: Site) -> Tensor | None:
    """Return the changed weight of a linear layer or convolution, float32; None where hooking is better or necessary.

    That is so for each change that knows more of itself than its dense form, but one of low rank.
    """
    import torch

    if site.kind not in ("linear", "conv"):
        return None
    weight = site.weight()
    if isinstance(change, LowRank):
        down, up = (x.squeeze(0).to(weight) for x in change)
        return torch.addmm(weight.flatten(1), up, down.flatten(1)).view_as(weight)
    if type(change).__call__ is not DenseChange.__call__:
        return None
    return weight + change.dense(weight).squeeze(0)


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

    @contextmanager
    def merged(self, changes: Changes) -> Iterator[None]:
        """Use the `changes` of one identity within a block, by weights that they are added to where that is possible.

        A layer then makes one product, not three, forward and backward, but its weight has a gradient of its full
        size: quicker where layers are small. Gradient flows into changes and input, as it does with `using`.
        Raises `UserError` for changes that do not fit, or of several identities.
        """
        if (count := identities_of(ready := _checked(self.sites, changes))) > 1:
            raise UserError(f"the changes of {count} identities cannot be merged into one weight")
        weights = {name: w for name, change in ready.items() if (w := _weight(change, self.sites[name])) is not None}
        modules: list[Any] = [self.sites[name].module for name in weights]
        try:
            with self.using({name: change for name, change in ready.items() if name not in weights}):
                for module, weight in zip(modules, weights.values(), strict=True):
                    # found before the parameter of that name, which stays as it is
                    module.__dict__["weight"] = weight.to(module.weight.dtype)
                yield
        finally:
            for module in modules:
                module.__dict__.pop("weight", None)
