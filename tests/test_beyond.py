"""Adapters on networks that draw nothing: the document's lines run, and the laws hold on a ViT and a language model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hyperdb.adapters import DoRAConfig, FouRAConfig, LiDBConfig, LoRAConfig, LoRAXConfig, SVDiffConfig
from hyperdb.adapters.base import select
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site

DOCUMENT = Path(__file__).parent.parent / "docs" / "beyond.md"
CONFIGS = {
    "lora": LoRAConfig(rank=2), "dora": DoRAConfig(rank=2), "foura": FouRAConfig(rank=2), "svdiff": SVDiffConfig(),
    "lorax": LoRAXConfig(rank=4), "lidb": LiDBConfig(8, 6),
}  # fmt: skip


class Logits(nn.Module):
    """A language model that returns its logits alone."""

    def __init__(self) -> None:
        super().__init__()
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.lm = LlamaForCausalLM(LlamaConfig(vocab_size=64, **small))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm(ids).logits


@pytest.fixture(params=["vit", "lm"])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, dict[str, Site]]:
    """Return a model, six rows of input, and its sites."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "vit":
            model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
            rows, ending = torch.randn(6, 3, 32, 32, generator=g), ("attn.qkv", "attn.proj", "mlp.fc1")
        else:
            model, rows = Logits(), torch.randint(64, (6, 8), generator=g)
            ending = ("q_proj", "k_proj", "v_proj", "down_proj")
    model = model.eval().double().requires_grad_(False)
    rows = rows.double() if rows.is_floating_point() else rows
    return model, rows, {n: Site(n, m) for n, m in model.named_modules() if n.endswith(ending)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_laws_hold(network, kind):
    model, rows, sites = network
    adapter = CONFIGS[kind].build(Layout.listing(sites)).to(dtype=torch.float64)
    injection, plain, start = Injection(sites), model(rows), adapter.init(3, sites)
    with injection.using(adapter.changes(start)):
        torch.testing.assert_close(model(rows), plain, rtol=1e-5, atol=1e-5)
    g = torch.Generator().manual_seed(1)
    params = {k: (v + 0.3 * torch.randn(v.shape, generator=g)).double().requires_grad_() for k, v in start.items()}
    changes = adapter.changes(params)
    with injection.using(changes):
        together = model(rows)
    together.square().sum().backward()
    assert all(v.grad is not None and v.grad.flatten(1).any(dim=1).all() for v in params.values())
    assert (together - plain).abs().max() > 1e-3
    with torch.no_grad():
        for i in range(3):
            with injection.using(select(changes, i)):
                torch.testing.assert_close(model(rows[2 * i : 2 * i + 2]), together[2 * i : 2 * i + 2])
        for name, site in sites.items():
            site.parameter.add_(changes[name].dense(site.weight())[1])
        torch.testing.assert_close(model(rows[2:4]), together[2:4])


def test_the_lines_of_the_document_learn_both():
    (lines,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    found: dict[str, tuple[float, float]] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(lines, found)
    for begin, end in (found["of_text"], found["of_pictures"]):
        assert end < begin / 2
