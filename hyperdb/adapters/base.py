"""What every adapter is: trainable tensors with an identity axis, and the change of each site that they stand for.

Laws, tested for every adapter: nothing changes at init; a batch of identities equals a loop over them; merging equals
hooking; gradient reaches the trainable tensors and nothing else; gradient checkpointing changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from hyperdb.adapters import site as sites
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site


class NotMergeableError(UserError):
    """A change that depends on its input: no weight of the network can stand for it."""


class Change(Protocol):
    """What is added at one site: made of tensors, each with a leading identity axis, of 1 where all share it.

    Rows come as `Site` describes, `[R, I, S, ...]`.
    """

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return what is to be added to `y`, the module's output for the rows `x`."""

    def dense(self, weight: Tensor) -> Tensor:
        """Return `[I, *shape]`, what would have to be added to the frozen `weight` for the same effect.

        Raises `NotMergeableError` where there is no such thing.
        """

    def check(self, site: Site) -> None:
        """Raise `UserError` if the tensors do not fit the site."""

    def settled(self, site: Site) -> Change:
        """Return the same change on the site's device, in the form that is quickest to apply without training."""

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the tensors."""


Changes: TypeAlias = Mapping[str, Change]


class OfTensors:
    """What a change is made of: its tensors, each with a leading identity axis."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the tensors."""
        return iter(self.tensors)


class DenseChange(OfTensors):
    """A change that is its dense form: whatever can say what is added to the weight need not say more.

    Made of tensors `[I, ...]`, the first of which decides nothing about the site unless `check` says so.
    """

    def dense(self, weight: Tensor) -> Tensor:
        """Return `[I, *shape]`, what is added to the frozen `weight`."""
        raise NotImplementedError

    def check(self, site: Site) -> None:
        """Raise `UserError` if the tensors do not fit the site."""
        raise NotImplementedError

    def settled(self, site: Site) -> Change:
        """Return the dense change itself."""
        return Dense(tree_map(self, lambda x: x.detach().to(site.parameter.device)).dense(site.weight()))

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return what the module makes of the rows with the dense change as its only parameter."""
        return site.apply(x, self.dense(site.weight()))


class Dense(DenseChange):
    """A free change `[I, *shape]` of one weight."""

    def dense(self, weight: Tensor) -> Tensor:
        """Return it, in the dtype of the weight."""
        return self.tensors[0].to(weight)

    def check(self, site: Site) -> None:
        """Raise `UserError` if it does not have the site's shape."""
        if (shape := tuple(self.tensors[0].shape[1:])) != site.shape:
            raise UserError(f"{site.name} takes a change of {list(site.shape)}, not {list(shape)}")


class Replacement(OfTensors):
    """A change that no sum can say: it puts something of another length in place of a module's output."""

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Raise `TypeError`: nothing is added."""
        raise TypeError(f"{type(self).__name__} adds nothing to what {site.name} puts out")

    def dense(self, weight: Tensor) -> Tensor:
        """Raise `NotMergeableError`."""
        raise NotMergeableError("a word with a vector for each attention (P+) is no weight; use it as it is")

    def check(self, site: Site) -> None:
        """Raise `UserError` if it does not fit the site."""
        raise NotImplementedError

    def settled(self, site: Site) -> Replacement:
        """Return it on the site's device."""
        return type(self)(*(x.detach().to(site.parameter.device) for x in self))

    def replace(self, site: Site, x: Tensor, output: Any, use: Any) -> Any:
        """Return what stands in place of the output for the input `x`; `use` is the `Injection`, with its strength."""
        raise NotImplementedError


class LowRank(NamedTuple):
    """`dW = up @ down` of a linear layer or a convolution: down `[I, r, n]`, up `[I, m, r]`.

    That of a convolution of c channels and a kernel of h x w has down `[I, r, c, h, w]`: a convolution to r channels,
    then `up` on each pixel.
    """

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return `x @ dW^T` in two thin products."""
        down, up = self.down.to(x), self.up.to(x)
        if down.ndim > 3:
            return sites.conv(x, down, site.module, up)  # type: ignore[arg-type]
        return sites.linear(x, down, up)

    def settled(self, site: Site) -> LowRank:
        """Return the factors in the dtype of the weight."""
        return LowRank(*(x.detach().to(*site.home) for x in self))

    def dense(self, weight: Tensor) -> Tensor:
        """Return `up @ down` in the dtype of `weight`."""
        return delta(self.down.to(weight), self.up.to(weight))

    def check(self, site: Site) -> None:
        """Raise `UserError` if the factors do not fit."""
        down, up = self.down, self.up
        if site.kind not in ("linear", "conv"):
            raise UserError(f"{site.name} is no linear layer and no convolution: low-rank factors do not fit")
        m, *n = site.shape
        if list(down.shape[2:]) != n or up.shape != (down.shape[0], m, down.shape[1]):
            inputs = ", ".join(map(str, n))
            raise UserError(
                f"{site.name} takes down [I, r, {inputs}] and up [I, {m}, r], not {list(down.shape)} and "
                f"{list(up.shape)}"
            )


Factors: TypeAlias = dict[str, LowRank]
"""{layer: low-rank factors}: what most adapters are, and what other tools' LoRA files hold."""


class Sum:
    """Several changes of one site, each of the frozen network, added up."""

    def __init__(self, *parts: Change) -> None:
        self.parts = parts

    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return the sum of what each adds to `y`."""
        total = self.parts[0](x, y, site)
        for part in self.parts[1:]:
            total = total + part(x, y, site)
        return total

    def dense(self, weight: Tensor) -> Tensor:
        """Return the sum of the dense changes."""
        total = self.parts[0].dense(weight)
        for part in self.parts[1:]:
            total = total + part.dense(weight)
        return total

    def check(self, site: Site) -> None:
        """Raise `UserError` if one of them does not fit, or puts another thing in place of what the others add to."""
        for part in self.parts:
            part.check(site)
            if isinstance(part, Replacement):
                raise UserError(f"{site.name} is changed by P+ and by another adapter: use one of them")

    def settled(self, site: Site) -> Sum:
        """Return the sum of the settled changes."""
        return Sum(*(part.settled(site) for part in self.parts))

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the tensors of all."""
        return (x for part in self.parts for x in part)


# --- adapters ----------------------------------------------------------------------------------------


@dataclass
class AdapterConfig:
    """The settings of a kind of adapter: which sites of a base it changes, and how. Imports no torch."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "norm", "bias")
    """Kinds of `Site` that it can change; others of the set are left out."""

    predictable: ClassVar[bool] = False
    """Whether it builds a `TokenAdapter`, which a hypernetwork can predict."""

    def where(self) -> str:
        """Return the name of the base's set of sites that it wants (`hyperdb.diffusion.targets.SETS`)."""
        return str(getattr(self, "sites", "attention"))

    def bound(self, rare: list[int], noun: list[int]) -> AdapterConfig:
        """Return the settings for a base in which these are the token ids of the rare token and the class word."""
        return self

    def begins(self) -> str | None:
        """Return the file that says where a person's training begins; None: at the adapter's own start."""
        return None

    def build(self, layout: Layout) -> Adapter:
        """Return the adapter over `layout`."""
        raise NotImplementedError

    def require_predictable(self) -> None:
        """Raise `UserError` unless it builds a `TokenAdapter`."""
        if not self.predictable:
            raise UserError(
                "a hypernetwork predicts one token a layer, and this adapter has no tokens; use adapter=lidb"
            )

    def tokens(self, layout: Layout) -> Any:
        """Return the `TokenAdapter` over `layout`. Raises `UserError` if it is none."""
        self.require_predictable()
        return self.build(layout)


def whole_number(name: str, value: int, low: int, high: int) -> None:
    """Raise `UserError` unless a setting is a whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name}={value!r}: expected a whole number from {low} to {high}")


class Adapter(Protocol):
    """A family of personalisations over one layout of sites."""

    layout: Layout
    places: int
    """of a prompt that the rare token takes; more than 1 where several vectors stand for it"""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each trainable tensor, without the identity axis."""

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return trainable tensors `[I, ...]` that change nothing, float32, alike for all.

        `sites` lend the frozen weights to adapters that begin at them.
        """

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the change of each site that `params` stand for; differentiable."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """Move what is frozen in the adapter; return the adapter."""

    def rate(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""


class Frozen:
    """What adapters without frozen numbers of their own share: a layout, a device, one learning rate."""

    places = 1

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.device: Any = "cpu"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Set the device on which `init` places tensors; nothing is frozen here, so `dtype` has no effect."""
        self.device = device if device is not None else self.device
        return self

    def rate(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""
        return 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each trainable tensor, without the identity axis."""
        raise NotImplementedError

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return trainable tensors `[I, ...]`, zero, float32: of an adapter for which zero is no change."""
        import torch

        return {name: torch.zeros(identities, *shape, device=self.device) for name, shape in self.shapes().items()}

    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return the change of each site that `params` stand for."""
        raise NotImplementedError


class TokenAdapter(Adapter, Protocol):
    """An adapter whose numbers are one token a layer, `{'tokens': [I, N, D]}`: what a hypernetwork can predict."""

    mask: Tensor
    """`[N, D]`, True on the numbers in use."""

    @property
    def template(self) -> Tensor:
        """Where everyone starts, `[N, D]`."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over what is frozen in the adapter."""

    @property
    def numbers(self) -> int:
        """Count of the numbers of one identity."""

    def factors(self, params: dict[str, Tensor]) -> Factors:
        """Return the changes, all of low rank."""

    def pack(self, tokens: Tensor) -> Tensor:
        """Return only the numbers in use, `[..., N, D]` -> `[..., numbers]`."""

    def unpack(self, numbers: Tensor) -> Tensor:
        """Undo `pack`; padding is zero."""


# --- algebra -----------------------------------------------------------------------------------------


def tree_map(change: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the same kind of change with `function` applied to each tensor."""
    if isinstance(change, Sum):
        return Sum(*(tree_map(part, function) for part in change.parts))
    kind = LowRank if type(change) is tuple else type(change)
    return kind(*(function(x) for x in change))


def select(changes: Any, index: int | slice | Sequence[int]) -> Any:
    """Return the changes of some identities; the identity axis stays. What is shared by all remains so."""
    rows = [index] if isinstance(index, int) else index
    if all(x.shape[0] == 1 for change in changes.values() for x in change):
        return {name: tree_map(change, lambda x: x[rows]) for name, change in changes.items()}
    return {name: tree_map(change, lambda x: x if len(x) == 1 else x[rows]) for name, change in changes.items()}


def moved(changes: Any, *where: Any) -> Any:
    """Return the changes without their history, on another device or in another dtype, as `Tensor.to` takes them."""

    def move(x: Tensor) -> Tensor:
        return x.detach().to(*where) if where else x.detach()

    return {name: tree_map(change, move) for name, change in changes.items()}


def identities_of(changes: Changes) -> int:
    """Return the number of identities. Raises `UserError` when sites disagree; an axis of 1 is shared by all."""
    sizes = {x.shape[0] for change in changes.values() for x in change} - {1}
    if len(sizes) > 1:
        raise UserError(f"sites disagree on the number of identities: {sorted(sizes)}")
    return max(sizes, default=1)


def both(*changes: Changes | None) -> Any:
    """Return the sum of changes: low-rank ones as one pair of factors, others one after the other. None is nothing."""
    given = [c for c in changes if c]
    if len(given) == 1:
        return given[0]
    if all(isinstance(change, tuple) for c in given for change in c.values()):
        return concatenate(*given)  # type: ignore[arg-type]
    found = {}
    for name in dict.fromkeys(name for c in given for name in c):
        parts = [c[name] for c in given if name in c]
        found[name] = parts[0] if len(parts) == 1 else Sum(*parts)
    return found


# --- low rank ----------------------------------------------------------------------------------------


def delta(down: Tensor, up: Tensor) -> Tensor:
    """Return the dense residual `dW = up @ down`, `[I, m, n]`, of a convolution `[I, m, c, h, w]`."""
    if down.ndim > 3:
        return (up @ down.flatten(2)).unflatten(2, down.shape[2:])
    return up @ down  #                                                [I, m, r] @ [I, r, n] -> [I, m, n]


def rank_of(factors: Factors) -> int:
    """Return the largest rank of any layer."""
    return max(down.shape[1] for down, _ in factors.values())


def scale(factors: Factors, strength: float) -> Factors:
    """Return factors of `strength` times the residual."""
    return {name: LowRank(down, up * strength) for name, (down, up) in factors.items()}


def concatenate(*factors: Factors) -> Factors:
    """Return factors of the sum of residuals, exactly: ranks side by side (the paper's rank relaxation).

    A layer that some of them lack is zero there. An identity axis of 1 is shared by all. Raises `UserError` when the
    identities differ.
    """
    import torch

    sizes = {down.shape[0] for f in factors for down, _ in f.values()}
    if len(sizes - {1}) > 1:
        raise UserError(f"cannot concatenate factors of {sorted(sizes)} identities")
    count = max(sizes, default=1)
    joined: Factors = {}
    for name in dict.fromkeys(name for f in factors for name in f):
        downs, ups = zip(*(f[name] for f in factors if name in f), strict=True)
        joined[name] = LowRank(
            torch.cat([down.expand(count, *down.shape[1:]) for down in downs], dim=1),  #  [I, R, n]
            torch.cat([up.expand(count, -1, -1) for up in ups], dim=2),  #                 [I, m, R]
        )
    return joined
