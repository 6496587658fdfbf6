"""Custom Diffusion: the merge of concepts against a direct solve, and the attention against diffusers'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperdb.adapters import CustomConfig
from hyperdb.adapters.custom import RIDGE, merge
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("captions", [30, 4])
def test_merge_is_the_direct_solution_of_the_constrained_least_squares(captions: int) -> None:
    """The conditions of the optimum as one system: a multiplier for each word."""
    m, n, s = 5, 8, 3
    weight, regular, words, values = drawn(m, n), drawn(captions, n, seed=1), drawn(s, n, seed=2), drawn(s, m, seed=3)
    gram = regular.T @ regular
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    system = torch.cat([torch.cat([gram, words.T], 1), torch.cat([words, torch.zeros(s, s)], 1)])
    direct = torch.linalg.solve(system, torch.cat([gram @ weight.T, values]))[:n].T
    merged = merge(weight, regular, words, values)
    torch.testing.assert_close(merged, direct, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(words @ merged.T, values)


def test_merge_of_what_the_weight_makes_already_changes_nothing() -> None:
    weight, words = drawn(5, 8), drawn(3, 8, seed=2)
    torch.testing.assert_close(merge(weight, drawn(30, 8, seed=1), words, words @ weight.T), weight)


def test_words_that_say_the_same_twice_are_refused() -> None:
    word = drawn(1, 8, seed=2)
    with pytest.raises(UserError, match="2 words to merge depend on each other"):
        merge(drawn(5, 8), drawn(30, 8, seed=1), word.expand(2, 8), drawn(2, 5, seed=3))


def test_equals_the_attention_of_diffusers_forward_and_backward() -> None:
    """It takes the first token's gradient away; here that token is zero, so that it has none."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, CustomDiffusionAttnProcessor

    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4, processor=AttnProcessor())
        theirs = CustomDiffusionAttnProcessor(train_q_out=False, hidden_size=8, cross_attention_dim=6)
    attention.requires_grad_(False)
    modules = {"words": nn.Embedding(7, 6), "to_k": attention.to_k, "to_v": attention.to_v}
    sites = {name: Site(name, module) for name, module in modules.items()}
    adapter = CustomConfig().bound(rare=[2], noun=[5]).build(Layout.listing(sites))
    g = torch.Generator().manual_seed(1)
    params = {k: v + torch.randn(v.shape, generator=g) for k, v in adapter.init(1, sites).items()}
    params = {k: v.requires_grad_() for k, v in params.items()}
    same = {"to_k": theirs.to_k_custom_diffusion.weight, "to_v": theirs.to_v_custom_diffusion.weight}
    with torch.no_grad():
        for name, weight in same.items():
            weight.copy_(modules[name].weight + params[name][0])
    x, context = torch.randn(3, 5, 8, generator=g), torch.randn(3, 4, 6, generator=g)
    context[:, 0] = 0
    plain = attention(x, context)
    with Injection(sites).using(adapter.changes(params)):
        ours = attention(x, context)
    attention.set_processor(theirs)
    reference = attention(x, context)
    torch.testing.assert_close(ours, reference)
    assert not torch.allclose(ours, plain, atol=1e-2)
    ours.square().sum().backward()
    reference.square().sum().backward()
    for name, weight in same.items():
        torch.testing.assert_close(params[name].grad[0], weight.grad, rtol=1e-4, atol=1e-5)
