"""Adapters against their reference libraries and equations: PEFT's LoRA and DoRA, SVDiff's singular values."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hyperdb.adapters import DoRAConfig, LoRAConfig, SVDiffConfig, TokenConfig
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.optim import adamw

LAYERS = ("wide", "conv")


class Model(nn.Module):
    """A linear layer and a convolution, both with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.conv = nn.Linear(6, 12), nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(self.wide(x)).unflatten(2, (2, 6)).transpose(1, 2)[:, :, :3].transpose(1, 2))


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().requires_grad_(False)


def rows() -> torch.Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), DoRAConfig(rank=2)], ids=["lora", "dora"])
def test_equals_peft_forward_and_after_three_steps(config: LoRAConfig) -> None:
    ours, theirs = model(), model()
    dora = isinstance(config, DoRAConfig)
    settings = LoraConfig(r=2, lora_alpha=2, target_modules=list(LAYERS), use_dora=dora)
    with torch.random.fork_rng():
        peft = get_peft_model(theirs, settings)
    sites = {name: Site(name, getattr(ours, name)) for name in LAYERS}
    adapter = config.build(Layout.listing(sites))
    g = torch.Generator().manual_seed(2)
    params = {k: v + 0.2 * torch.randn(v.shape, generator=g) for k, v in adapter.init(1, sites).items()}
    params = {k: v.requires_grad_() for k, v in params.items()}
    same = {}  # ours -> PEFT's parameter
    for name in LAYERS:
        layer = getattr(peft.base_model.model, name)
        same[f"{name}.down"], same[f"{name}.up"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if dora:
            same[f"{name}.magnitude"] = layer.lora_magnitude_vector["default"].weight
    assert same.keys() == params.keys()
    with torch.no_grad():
        for name, value in same.items():
            value.copy_(params[name][0].view(value.shape))
    injection = Injection(sites)
    optimizers = adamw(params.values(), 0.05), adamw(same.values(), 0.05)
    plain = ours(rows())
    for _ in range(3):
        with injection.using(adapter.changes(params)):
            y = ours(rows())
            torch.testing.assert_close(y, peft(rows()), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(y, plain, atol=1e-2)
            for optimizer in optimizers:
                optimizer.zero_grad()
            y.square().mean().backward()
        peft(rows()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in same.items():
        torch.testing.assert_close(params[name][0], value.view(params[name].shape[1:]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 9), nn.Conv2d(3, 5, 3), nn.Embedding(7, 4), nn.LayerNorm(5), nn.GroupNorm(2, 6)],
    ids=["linear", "conv", "embedding", "norm", "group norm"],
)
def test_svdiff_moves_the_singular_values_and_nothing_else(module: nn.Module) -> None:
    site = Site("layer", module.requires_grad_(False))
    adapter = SVDiffConfig().build(Layout.listing({"layer": site}))
    weight = site.weight()
    matrix = weight.flatten(1) if weight.ndim > 1 else weight[None]
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    g = torch.Generator().manual_seed(3)
    shift = 0.5 * torch.randn(1, len(s), generator=g)
    shift[0, -1] = -2 * s[-1]  # below zero: relu
    wanted = u @ torch.diag((s + shift[0]).relu()) @ vt
    change = adapter.changes({"layer": shift})["layer"]
    torch.testing.assert_close((weight + change.dense(weight)[0]).flatten(), wanted.flatten(), rtol=1e-4, atol=1e-5)
    nothing = adapter.changes(adapter.init(1))["layer"].dense(weight)
    assert not nothing.any()


def test_a_word_vector_begins_at_the_class_word() -> None:
    embedding = nn.Embedding(7, 4).requires_grad_(False)
    site = Site("words", embedding)
    adapter = TokenConfig().bound(rare=[2], noun=[5]).build(Layout.listing({"words": site}))
    changes = adapter.changes(adapter.init(1, {"words": site}))
    ids = torch.arange(7)[None]
    with Injection({"words": site}).using(changes):
        found = embedding(ids)[0]
    torch.testing.assert_close(found[2], embedding.weight[5])
    assert torch.equal(found[[0, 1, 3, 4, 5, 6]], embedding.weight[[0, 1, 3, 4, 5, 6]])
    with pytest.raises(UserError, match="rare_token is 2 tokens"):
        TokenConfig().bound(rare=[2, 3], noun=[5])
