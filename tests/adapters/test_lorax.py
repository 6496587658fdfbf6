"""The algebra of a transfer between bases, against the dense computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperdb.adapters import LoRAXConfig
from hyperdb.adapters.base import LowRank, delta
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.adapters.lorax import alike, energy, projected
from hyperdb.adapters.site import Site


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("shape", [(9,), (3, 2, 2)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_a_change_is_projected_on_both_sides_and_cut_to_a_rank(shape, rank):
    pair = LowRank(noise(1, 5, *shape), noise(1, 7, 5, seed=1))
    u, _, vt = torch.linalg.svd(noise(7, *shape, seed=2).flatten(1), full_matrices=False)
    u, vt = u[:, :4], vt[:4]
    whole = u @ u.mT @ delta(*pair)[0].flatten(1) @ vt.mT @ vt
    a, s, b = torch.linalg.svd(whole)
    nearest = a[:, :rank] * s[:rank] @ b[: len(s)][:rank]
    found = projected(pair, u, vt, rank)
    assert found.down.shape[1] <= rank
    assert found.down.shape[2:] == shape
    torch.testing.assert_close(delta(*found)[0].flatten(1), nearest)
    assert energy(found) == pytest.approx(float(s[:rank].square().sum()))
    assert energy(pair) == pytest.approx(float(delta(*pair).square().sum()))


def test_a_change_of_higher_rank_than_its_layer_is_projected_too():
    pair = LowRank(noise(1, 30, 4), noise(1, 6, 30, seed=1))
    u, _, vt = torch.linalg.svd(noise(6, 4, seed=2), full_matrices=False)
    torch.testing.assert_close(delta(*projected(pair, u, vt, 30))[0], u @ u.mT @ delta(*pair)[0])


def test_every_layer_has_as_many_numbers_as_the_narrowest_linear_one():
    shapes = {"a": (6, 4), "b": (9, 8), "conv": (9, 3, 3, 3), "first": (9, 2, 1, 1)}
    layout = Layout(tuple(Layer(name, shape) for name, shape in shapes.items()))
    assert LoRAXConfig().build(layout).shapes() == {"a": (4,), "b": (4,), "conv": (4,), "first": (2,)}
    assert LoRAXConfig(rank=6).build(layout).shapes() == {"a": (4,), "b": (6,), "conv": (6,), "first": (2,)}
    convolutions = Layout(layout.layers[2:])
    assert LoRAXConfig().build(convolutions).shapes() == {"conv": (2,), "first": (2,)}


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: nn.Conv2d(3, 6, 3)])
def test_its_numbers_stand_between_the_first_singular_vectors_in_order(make):
    module = make().double()
    site = Site("w", module)
    adapter = LoRAXConfig(rank=3).build(Layout.listing({"w": site}))
    d = noise(1, 3, seed=4)
    change = adapter.changes({"w": d})["w"]
    u, _, vt = torch.linalg.svd(module.weight.detach().flatten(1), full_matrices=False)
    whole = (u[:, :3] * d[0]) @ vt[:3]
    torch.testing.assert_close(change.dense(module.weight.detach())[0].flatten(1), whole)


def test_subspaces_are_alike_whatever_their_basis():
    a, _ = torch.linalg.qr(noise(12, 12))
    turn, _ = torch.linalg.qr(noise(4, 4, seed=1))
    assert alike(a[:, :4], a[:, :4] @ turn) == pytest.approx(1)
    assert alike(a[:, :4], a[:, 4:8]) == pytest.approx(0, abs=1e-9)
    assert alike(a[:, :4], a[:, 2:6]) == pytest.approx(0.5)
