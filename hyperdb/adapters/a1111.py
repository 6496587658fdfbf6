"""Hypernetworks of the A1111 web page: small networks on what keys and values are computed from. Nothing is predicted.

One pair of networks serves all attentions whose context has the same width: one of them for the keys, one for the
values. Self-attention's context are the picture's own features, cross-attention's the words'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from hyperdb.adapters import site as sites
from hyperdb.adapters.base import AdapterConfig, Changes, Frozen, NotMergeableError, OfTensors, whole_number
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.seed import generator

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site

ACTIVATIONS = {
    "linear": "",  # none
    "relu": "relu",
    "leakyrelu": "leaky_relu",
    "elu": "elu",
    "swish": "hardswish",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "softsign": "softsign",
    "mish": "mish",
    "celu": "celu",
    "gelu": "gelu",
    "hardshrink": "hardshrink",
    "hardsigmoid": "hardsigmoid",
    "hardswish": "hardswish",
    "hardtanh": "hardtanh",
    "logsigmoid": "logsigmoid",
    "relu6": "relu6",
    "selu": "selu",
    "silu": "silu",
    "softplus": "softplus",
    "softshrink": "softshrink",
    "tanhshrink": "tanhshrink",
}
"""{the name in files of A1111: that in `torch.nn.functional`}. A1111 has further ones, with numbers or an axis of their
own: glu, prelu, rrelu, softmax and its kin, threshold, multiheadattention. They are refused."""


@dataclass
class A1111Config(AdapterConfig):
    """Residual networks on the context of keys and values.

    `structure` are the widths of a network's layers in multiples of the context's, and begins and ends with 1. Between
    two layers stands `activation`. Only with `linear` and without `bias` can the change be merged into the weights.
    """

    structure: list[float] = field(default_factory=lambda: [1.0, 2.0, 1.0])
    activation: str = "linear"
    bias: bool = True
    seed: int = 0
    sites: str = "kv"
    kinds = ("linear",)

    def __post_init__(self) -> None:
        whole_number("seed", self.seed, 0, 2**63 - 1)
        inner = all(isinstance(x, int | float) and 0 < x <= 64 for x in self.structure)
        if not inner or not 2 <= len(self.structure) <= 16 or {self.structure[0], self.structure[-1]} != {1}:
            raise UserError(f"structure={self.structure}: expected 1, then multiples of the width up to 64, then 1")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")

    def build(self, layout: Layout) -> A1111:
        """Return the adapter over `layout`."""
        return A1111(layout, self.structure, self.activation, self.bias, self.seed)


class Fed(OfTensors):
    """A residual network on a module's input: weights `[I, out, in]`, each followed by its bias `[I, out]`, if any."""

    activation = "linear"

    # W h(x) = W (x + m f(x)), so that W m f(x) is what is added
    def __call__(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Return what the module makes of the network's output, without the module's bias."""
        from torch.nn import functional as F

        activate = getattr(F, ACTIVATIONS[self.activation], None)
        for i, tensor in enumerate(self.tensors):
            if tensor.ndim == 2:
                x = x + tensor.to(x).view(len(tensor), 1, *[1] * (x.ndim - 4), -1)
                continue
            x = activate(x) if i and activate else x
            x = sites.linear(x, tensor.to(x))
        return site.apply(x, site.weight()[None])

    # dW = W f, f a product of matrices
    def dense(self, weight: Tensor) -> Tensor:
        """Return `[I, m, n]`. Raises `NotMergeableError` for a network that is not one matrix."""
        if self.activation != "linear" or any(tensor.ndim == 2 for tensor in self.tensors):
            raise NotMergeableError(
                "a hypernetwork of A1111 with biases or an activation is no matrix, so that no weight can stand for "
                "it; use it as it is, with `hyperdb generate`, or train one that can be merged: "
                "adapter.activation=linear adapter.bias=false"
            )
        change = weight
        for tensor in reversed(self.tensors):
            change = change @ tensor.to(weight)
        return change

    def check(self, site: Site) -> None:
        """Raise `UserError` unless the network goes from the module's inputs back to them."""
        n = site.shape[-1]
        at = n if site.kind == "linear" else -1
        for tensor in self.tensors:
            at = tensor.shape[1] if at == tensor.shape[-1] else -1
        if at != n:
            shapes = ", ".join(str(list(tensor.shape[1:])) for tensor in self.tensors)
            raise UserError(f"{site.name} {list(site.shape)} takes a network from {n} numbers to {n}, not {shapes}")

    def settled(self, site: Site) -> Fed:
        """Return it in the dtype of the weight."""
        return type(self)(*(tensor.detach().to(*site.home) for tensor in self.tensors))


FED = {name: type(f"Fed_{name}", (Fed,), {"activation": name}) for name in ACTIVATIONS}


def side_of(name: str) -> str:
    """Return which network of a pair a layer is fed by: `v` for values, else `k`."""
    return "v" if name.endswith("to_v") else "k"


def sizes_of(context: int, structure: list[float]) -> list[int]:
    """Return how many numbers go into the first layer of a network and come out of each: whole parts, as in A1111."""
    return [max(1, int(context * multiple)) for multiple in structure]


class A1111(Frozen):
    """`W (x + f(x))`; at the start f's layers are normal of deviation .01, alike for everyone, and the last is zero.

    A1111 begins with all layers normal, so that f is a little noise instead of nothing.
    """

    def __init__(
        self, layout: Layout, structure: list[float], activation: str = "linear", bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__(layout)
        self.structure, self.activation, self.bias, self.seed = structure, activation, bias, seed
        self.fed = {layer.name: f"{layer.in_}.{side_of(layer.name)}" for layer in layout.layers}

    def _layers(self, network: str) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of the layers of the network called `WIDTH.SIDE`."""
        sizes = sizes_of(int(network.partition(".")[0]), self.structure)
        return [(m, n) for n, m in pairwise(sizes)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return `{WIDTH.SIDE.LAYER.weight: [out, in]}`, and the biases `[out]` if any; SIDE is k or v."""
        found: dict[str, tuple[int, ...]] = {}
        for network in dict.fromkeys(self.fed.values()):
            for i, (m, n) in enumerate(self._layers(network)):
                found[f"{network}.{i}.weight"] = (m, n)
                if self.bias:
                    found[f"{network}.{i}.bias"] = (m,)
        return found

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return the tensors of `shapes`, `[I, ...]`, float32."""
        import torch

        params = super().init(identities)
        for network in dict.fromkeys(self.fed.values()):
            for i, (m, n) in enumerate(self._layers(network)[:-1]):
                weight = 0.01 * torch.randn(1, m, n, generator=generator(self.seed, "a1111", network, i))
                params[f"{network}.{i}.weight"] = weight.repeat(identities, 1, 1).to(self.device)
        return params

    # k = W_k h(c), v = W_v h'(c), h(x) = x + m f(x); m is the strength with which the change is used
    def changes(self, params: dict[str, Tensor]) -> Changes:
        """Return each layer's network, which those of the same width and side share."""
        parts = ("weight", "bias") if self.bias else ("weight",)
        steps = [f"{i}.{part}" for i in range(len(self.structure) - 1) for part in parts]
        make = FED[self.activation]
        return {name: make(*(params[f"{network}.{step}"] for step in steps)) for name, network in self.fed.items()}
