"""Textual Inversion with several vectors for the one word."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperdb.adapters import CustomConfig, E4TConfig, TokenConfig
from hyperdb.adapters.base import NotMergeableError
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError


@pytest.mark.parametrize("identities", [1, 2])
def test_a_word_of_several_vectors_takes_as_many_places(identities: int) -> None:
    embedding = nn.Embedding(7, 4).requires_grad_(False)
    site = Site("words", embedding)
    adapter = TokenConfig(vectors=3).bound(rare=[2], noun=[5]).build(Layout.listing({"words": site}))
    start = adapter.init(identities, {"words": site})["vector"]
    assert torch.equal(start, embedding.weight[5].expand(identities, 3, 4))
    vector = torch.randn(identities, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[1, 2, 3, 6, 6, 6], [1, 3, 4, 6, 6, 6], [2, 2, 3, 4, 4, 6]])
    with Injection({"words": site}).using(adapter.changes({"vector": vector})):
        found = embedding(ids.repeat(identities, 1)).unflatten(0, (identities, 3))
    w = embedding.weight
    for v, (middle, without, twice) in zip(vector, found, strict=True):
        torch.testing.assert_close(middle, torch.stack([w[1], *v, w[3], w[6]]))
        torch.testing.assert_close(without, w[ids[1]])
        torch.testing.assert_close(twice, torch.stack([*v, *v[:2], w[6]]))  # cut off, the end stays
    found.sum().backward()
    assert vector.grad is not None
    assert vector.grad.flatten(1).any(dim=1).all()
    with pytest.raises(NotMergeableError, match="3 vectors"):
        adapter.changes({"vector": vector})["words"].dense(w)


@pytest.mark.parametrize(("row", "start", "named"), [(9, 0, "adapter.row=9"), (0, 9, "adapter.start=9")])
@pytest.mark.parametrize("kind", [TokenConfig, CustomConfig, E4TConfig])
def test_a_word_that_the_base_does_not_have_is_named(kind: type[TokenConfig], row: int, start: int, named: str) -> None:
    layers = (Layer("words", (9, 4)), Layer("keys", (4, 4)))
    layout = Layout(layers[:1] if kind is TokenConfig else layers)
    with pytest.raises(UserError, match=f"{named}: the base has 9 words, the last is 8"):
        kind(row=row, start=start).build(layout)
