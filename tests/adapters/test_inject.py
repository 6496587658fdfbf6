"""Injection: batches that do not divide, autocast, checkpointing, removal; factor algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hyperdb.adapters.base import Dense, Factors, LowRank, OfTensors, both, concatenate, delta, rank_of, scale, select
from hyperdb.adapters.inject import Injection, Merging
from hyperdb.runtime.errors import UserError


def factors_of(identities: int, rank: int = 2, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return {
        "l": (torch.randn(identities, rank, 6, generator=g), torch.randn(identities, 4, rank, generator=g))
    }


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(6, 4).requires_grad_(False)


def test_concatenation_is_the_exact_sum_and_shares_an_axis_of_one() -> None:
    one, three = factors_of(1, 1), factors_of(3, 4, seed=1)
    joined = concatenate(one, three, scale(one, 0.5))
    assert rank_of(joined) == 6
    torch.testing.assert_close(delta(*joined["l"]), 1.5 * delta(*one["l"]) + delta(*three["l"]))
    with pytest.raises(UserError, match="2, 3"):
        concatenate(factors_of(2), three)
    more = concatenate(one, {**one, "more": three["l"]})  # what lacks a layer is zero there
    torch.testing.assert_close(delta(*more["l"]), 2 * delta(*one["l"]).expand(3, -1, -1))
    torch.testing.assert_close(delta(*more["more"]), delta(*three["l"]))


def test_select_keeps_the_identity_axis() -> None:
    factors = factors_of(3)
    assert torch.equal(select(factors, 2)["l"][0], factors["l"][0][2:])
    assert torch.equal(select(factors, [2, 0])["l"][1], factors["l"][1][[2, 0]])
    assert select(factors, slice(0, 2))["l"][0].shape[0] == 2


def test_a_batch_that_does_not_divide_is_an_error(linear: nn.Linear) -> None:
    injection = Injection({"l": linear})
    with injection.using(factors_of(2), repeat=2), pytest.raises(UserError, match="6 rows cannot"):
        linear(torch.randn(6, 6))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": factors_of(1)["l"]}, "no linear layer x"),
        ({"l": factors_of(1)["l"][::-1]}, "takes down"),
        ({"l": (torch.zeros(6), torch.zeros(4))}, "takes down"),
        ({"l": (torch.zeros(2, 1, 6), torch.zeros(3, 4, 1))}, "takes down"),
        ({"l": factors_of(3)["l"], "k": factors_of(2)["l"]}, r"identities: \[2, 3\]"),
    ],
)
def test_factors_that_do_not_fit_are_refused(linear: nn.Linear, wrong: Factors, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Injection({"l": linear, "k": nn.Linear(6, 4)}).set(wrong)


def test_layers_without_factors_are_left_alone_and_remove_takes_the_hooks_off(linear: nn.Linear) -> None:
    other, x = nn.Linear(6, 4), torch.randn(2, 6)
    plain = linear(x), other(x)
    injection = Injection({"l": linear, "other": other})
    injection.set(factors_of(1))
    assert not torch.allclose(linear(x), plain[0])
    assert torch.equal(other(x), plain[1])
    injection.clear()
    assert torch.equal(linear(x), plain[0])
    injection.set(factors_of(1))
    injection.remove()
    injection.remove()
    assert torch.equal(linear(x), plain[0])
    assert not linear._forward_hooks


def test_using_restores_what_was_set_even_after_an_error(linear: nn.Linear) -> None:
    injection, x = Injection({"l": linear}), torch.randn(2, 6)
    injection.set(factors_of(1), 0.5)
    before = linear(x)
    with pytest.raises(KeyError), injection.using(factors_of(2, seed=1)):
        raise KeyError
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("identities", [1, 2])
def test_autocast_bfloat16(linear: nn.Linear, identities: int) -> None:
    factors, x = factors_of(identities), torch.randn(4, 6)
    leaves = [t.requires_grad_() for t in factors["l"]]
    injection = Injection({"l": linear})
    with injection.using(factors):
        exact = linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.2, rtol=0.05)
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def test_checkpointing_outside_the_block_is_an_error_not_a_wrong_gradient(linear: nn.Linear) -> None:
    factors = factors_of(1)
    factors["l"][1].requires_grad_()
    injection = Injection({"l": linear})
    with injection.using(factors):
        y = checkpoint(linear, torch.randn(2, 6, requires_grad=True), use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        y.sum().backward()


@pytest.mark.parametrize("identities", [1, 3])
@pytest.mark.parametrize("repeat", [1, 2])
def test_a_convolution_gets_the_dense_residual_of_each_identity(identities: int, repeat: int) -> None:
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 5, (3, 2), stride=2, padding=(1, 0), dilation=1).requires_grad_(False)
    factors = {"c": (torch.randn(identities, 2, 4, 3, 2, generator=g), torch.randn(identities, 5, 2, generator=g))}
    x = torch.randn(repeat, identities, 2, 4, 8, 7, generator=g)
    injection = Injection({"c": conv})
    with injection.using(factors, 0.5, repeat):
        together = conv(x.flatten(0, 2)).unflatten(0, x.shape[:3])
    injection.remove()
    for i in range(identities):
        one = select(factors, i)
        dense = delta(*one["c"])[0]
        assert dense.shape == conv.weight.shape
        alone = F.conv2d(x[:, i].flatten(0, 1), conv.weight + 0.5 * dense, conv.bias, conv.stride, conv.padding)
        torch.testing.assert_close(together[:, i].flatten(0, 1), alone)
    with pytest.raises(UserError, match="no convolution l"):
        Injection({"c": conv}).set({"l": factors["c"]})
    with pytest.raises(UserError, match=r"takes down \[I, r, 4, 3, 2\]"):
        Injection({"c": conv}).set({"c": factors["c"][::-1]})


class Scaled(OfTensors):
    """A change that is no weight: what the layer is given, times a number."""

    def __call__(self, x, y, site):
        return self.tensors[0] * x

    def check(self, site):
        pass


def test_merged_changes_make_what_hooks_make_and_have_their_gradients() -> None:
    """Layers alike and others: a frozen change alone, a trained one alone, both, of several ranks and kinds."""
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 6), "b": (6, 6), "c": (6, 6), "d": (6, 6), "e": (4, 6), "dense": (6, 6), "hook": (6, 6)}
    model = {name: nn.Linear(n, m).requires_grad_(False) for name, (m, n) in shapes.items()}
    model["conv"] = nn.Conv2d(1, 4, (2, 3)).requires_grad_(False)

    def pair(name: str, rank: int) -> LowRank:
        m, *n = model[name].weight.shape
        return LowRank(torch.randn(1, rank, *n, generator=g), torch.randn(1, m, rank, generator=g))

    frozen = {name: pair(name, 2) for name in ("a", "b", "dense", "hook", "conv")}
    trained = {name: pair(name, rank) for name, rank in {"a": 3, "c": 3, "d": 1, "e": 3, "conv": 3}.items()}
    trained |= {"dense": Dense(torch.randn(1, 6, 6, generator=g)), "hook": Scaled(torch.ones(1))}
    leaves = [x.requires_grad_() for change in trained.values() for x in change]
    x = torch.randn(5, 6, generator=g, requires_grad=True)

    def made() -> list[torch.Tensor]:
        return [model[name](x if name != "conv" else x[:, None, None].expand(-1, -1, 2, -1)) for name in model]

    def gradients(out: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sum(y.square().sum() for y in out), [x, *leaves])

    injection = Injection(model)
    plain = made()
    with injection.using(both(frozen, trained)):
        wanted, slopes = made(), gradients(made())
    merging = Merging(injection, frozen)
    for _ in range(2):
        with merging.using(trained):
            assert all("weight" in vars(model[name]) for name in model if name != "hook")
            found = made()
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradients(found), slopes, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, made(), plain))
    assert not any("weight" in vars(layer) for layer in model.values())
    with pytest.raises(UserError, match="of 2 identities cannot be merged"), merging.using({"e": (
        torch.zeros(2, 1, 6), torch.zeros(2, 4, 1))}):  # fmt: skip
        pass


def test_merged_weights_are_in_the_type_that_the_network_computes_in(linear: nn.Linear) -> None:
    x, (down, up) = torch.randn(3, 6), factors_of(1)["l"]
    up.requires_grad_()
    merging = Merging(Injection({"l": linear}), None, torch.bfloat16)
    with merging.using({"l": (down, up)}), torch.autocast("cpu", torch.bfloat16):
        assert linear.weight.dtype == torch.bfloat16
        y = linear(x)
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), F.linear(x, linear.weight + (up @ down)[0], linear.bias), rtol=0.02, atol=0.1)
    assert up.grad is not None
    assert up.grad.dtype == torch.float32
