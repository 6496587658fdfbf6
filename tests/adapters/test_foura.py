"""FouRA against the direct computation with the matrix of the discrete cosine transform."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import idct
from torch import nn

from hyperdb.adapters import FouRAConfig
from hyperdb.adapters.base import NotMergeableError
from hyperdb.adapters.foura import inverse_dct
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError

INPUTS, OUTPUTS, RANK, PEOPLE, TOKENS = 6, 9, 3, 2, 5


def matrix(n: int) -> torch.Tensor:
    """Return the orthonormal DCT-II, a row a frequency."""
    rows = [[math.cos(math.pi * (2 * j + 1) * k / (2 * n)) for j in range(n)] for k in range(n)]
    return torch.tensor(rows, dtype=torch.float64) * torch.tensor([1 / n, *[2 / n] * (n - 1)]).double().sqrt()[:, None]


@pytest.fixture
def site() -> Site:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Site("layer", nn.Linear(INPUTS, OUTPUTS).double().requires_grad_(False))


def adapter(site: Site, adaptive: bool):
    """Return the adapter over one layer and random parameters of two people."""
    made = FouRAConfig(rank=RANK, adaptive=adaptive).build(Layout.listing({"layer": site}))
    g = torch.Generator().manual_seed(1)
    return made, {k: v.double() + torch.randn(v.shape, generator=g) for k, v in made.init(PEOPLE).items()}


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_transform_is_the_inverse_of_the_dct(n):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).double()
    D = matrix(n)
    torch.testing.assert_close(D @ D.mT, torch.eye(n).double())
    torch.testing.assert_close(inverse_dct(x), x @ D)
    torch.testing.assert_close(inverse_dct(x), torch.from_numpy(idct(x.numpy(), norm="ortho")))
    assert inverse_dct(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("tokens", [(), (TOKENS,)])
def test_it_is_a_gated_pair_between_the_transforms(site, adaptive, tokens):
    made, params = adapter(site, adaptive)
    x = rows(PEOPLE * 2, *tokens)
    with Injection({"layer": site}).using(made.changes(params)):
        found = site.module(x)
    into, back = matrix(INPUTS), matrix(OUTPUTS).mT
    for i, picture in enumerate(x):  # one after the other: each has its own gate
        own = {name.removeprefix("layer."): value[i // 2] for name, value in params.items()}
        z = picture @ into.mT @ own["down"].mT
        logits = own["gate"]
        if adaptive:
            logits = logits + own["gate_weight"] @ (z.mean(0) if tokens else z)
        wanted = site.module.forward(picture) + (1 / (1 + (-logits).exp()) * z) @ own["up"].mT @ back.mT
        torch.testing.assert_close(found[i], wanted)


def test_a_gate_that_follows_the_input_begins_like_the_other(site):
    x, outputs = rows(4, TOKENS), []
    for adaptive in (False, True):
        made, _ = adapter(site, adaptive)
        params = {k: v.double() for k, v in made.init(1).items()}
        params["layer.up"] += 1
        with Injection({"layer": site}).using(made.changes(params)):
            outputs.append(site.module(x))
    torch.testing.assert_close(*outputs)


def test_a_gate_that_follows_the_input_is_never_merged(site):
    made, params = adapter(site, adaptive=True)
    with pytest.raises(NotMergeableError, match=r"depends on its input.*adapter\.adaptive=false"):
        made.changes(params)["layer"].dense(site.weight())


def test_gradient_reaches_a_gate_that_follows_the_input(site):
    made, params = adapter(site, adaptive=True)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    with Injection({"layer": site}).using(made.changes(leaves)):
        site.module(rows(PEOPLE * 2, TOKENS)).square().sum().backward()
    assert all(v.grad is not None and v.grad.flatten(1).any(dim=1).all() for v in leaves.values())


def test_a_gate_of_another_rank_is_refused(site):
    made, params = adapter(site, adaptive=True)
    params["layer.gate"] = params["layer.gate"][:, 1:]
    with pytest.raises(UserError, match="layer takes a gate of 3 ranks"):
        Injection({"layer": site}).set(made.changes(params))
