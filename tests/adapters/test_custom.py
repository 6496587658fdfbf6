"""Custom Diffusion: the merge of concepts against a direct solve, and the attention against diffusers'."""

from __future__ import annotations

import pytest
import torch

from hyperdb.adapters.custom import RIDGE, merge
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
