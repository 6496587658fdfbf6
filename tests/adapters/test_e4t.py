"""E4T's offsets by hand, and the places that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hyperdb import config
from hyperdb.adapters import E4TConfig
from hyperdb.adapters.e4t import Scaled
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.trainable import trainable


def test_an_offset_multiplies_each_weight() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    change = Scaled(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, -1.0]]))
    # 1 + up down^T is 1.5, 2, 1 in the first row and 0, -1, 1 in the second
    whole = torch.tensor([[1.5, 4.0, 3.0], [0.0, -5.0, 6.0]])
    torch.testing.assert_close(layer.weight + change.dense(layer.weight)[0], whole)
    x = torch.tensor([[1.0, 10.0, 100.0]])
    with Injection({"layer": layer}).using({"layer": change}):
        torch.testing.assert_close(layer(x), x @ whole.T + layer.bias)
    with pytest.raises(UserError, match=r"layer \[2, 3\] takes no offset of \[3, 2\]"):
        Scaled(*reversed([*change])).check(Site("layer", layer))


def test_it_changes_the_word_and_the_attention_of_the_unet(tiny_base: Path) -> None:
    base = config.load("generate", [f"diffusion.path={tiny_base}", "diffusion.size=32"]).diffusion.load()
    _, adapter = trainable(base, E4TConfig())
    word, *layers = adapter.layout.names
    sides = ("to_q", "to_k", "to_v", "to_out.0")
    assert word == "text_encoder.embeddings.token_embedding"
    assert set(layers) == {name for name in base.targets() if name.startswith("unet.") and name.endswith(sides)}
    assert {name.rpartition(".attn")[2][0] for name in layers} == {"1", "2"}
    params = adapter.init(2, Injection(base.sites(adapter.layout.names)).sites)
    (start,) = base.tokenizer(base.config.class_word, add_special_tokens=False).input_ids
    weight = base.text_encoder.get_input_embeddings().weight
    assert torch.equal(params.pop("vector"), weight[[start, start]].float())
    assert {name: x.unique().tolist() for name, x in params.items()} == {
        f"{name}.{side}": [value] for name in layers for side, value in (("down", 1.0), ("up", 0.0))
    }


def test_a_person_has_one_vector() -> None:
    with pytest.raises(UserError, match="vectors=3: E4T names a person by one"):
        config.load("personalize", ["image=x.png", "adapter=e4t", "adapter.vectors=3"])
