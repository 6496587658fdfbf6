"""P+: every attention reads the prompt with its own vector, as by hand; the laws, on a whole base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hyperdb.adapters import PlusConfig, TokenConfig
from hyperdb.adapters.base import Changes, NotMergeableError, both, select
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.loss import predict
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.trainable import trainable


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return Base.load(DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu"))


def run(base: Base, rows: int, changes: Changes | None = None, repeat: int = 1, plain: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, rows, *base.latent_shape, generator=g)
    t = torch.randint(0, 1000, (rows,), generator=g)
    ids = base.tokenize(["a photo of a [V] face", "a [V] face"] * rows)[:rows]
    injection = Injection(base.sites(changes or ()))
    try:
        with injection.using(changes or {}, repeat=repeat, plain=plain):
            return predict(base, z, noise, t, ids)
    finally:
        injection.remove()


def vectors(base: Base, people: int) -> dict[str, torch.Tensor]:
    _, adapter = trainable(base, PlusConfig())
    return {"vector": torch.randn(people, *adapter.shapes()["vector"], generator=torch.Generator().manual_seed(1))}


def changes_of(base: Base, params: dict[str, torch.Tensor]) -> Changes:
    return trainable(base, PlusConfig())[1].changes(params)


def test_every_attention_reads_the_prompt_with_its_own_vector(base: Base) -> None:
    params = vectors(base, 1)
    found = run(base, 2, changes_of(base, params))
    layers = [m for m in base.unet.modules() if getattr(m, "is_cross_attention", False)]
    assert params["vector"].shape == (1, len(layers), 32)
    words, row = base.text_encoder.get_input_embeddings(), int(base.tokenize(["sks"])[0, 1])
    ids = base.tokenize(["a photo of a [V] face", "a [V] face"])
    kept, handles = words.weight[row].clone(), []
    for layer, vector in zip(layers, params["vector"][0], strict=True):
        with torch.no_grad():
            words.weight[row] = vector
            context = base.text_encoder(ids)[0]
            words.weight[row] = kept
        for part in (layer.to_k, layer.to_v):
            handles.append(part.register_forward_pre_hook(lambda _m, _x, context=context: (context,)))
    by_hand = run(base, 2)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, by_hand)
    assert not torch.allclose(found, run(base, 2), atol=1e-3)


def test_with_the_same_vector_everywhere_it_is_textual_inversion(base: Base) -> None:
    vector = vectors(base, 1)["vector"][:, :1]
    count = trainable(base, PlusConfig())[1].shapes()["vector"][0]
    token = trainable(base, TokenConfig())[1].changes({"vector": vector[:, 0]})
    torch.testing.assert_close(run(base, 2, changes_of(base, {"vector": vector.repeat(1, count, 1)})),
                               run(base, 2, token))  # fmt: skip


def test_a_person_begins_as_the_class_word(base: Base) -> None:
    adapter, token = (trainable(base, settings)[1] for settings in (PlusConfig(), TokenConfig()))
    starts = [
        run(base, 2, kind.changes(kind.init(1, Injection(base.sites(kind.layout.names)).sites)))
        for kind in (adapter, token)
    ]
    torch.testing.assert_close(*starts)


@pytest.mark.parametrize("plain", [0, 1])
def test_batch_of_identities_is_a_loop_and_plain_blocks_are_left_alone(base: Base, plain: int) -> None:
    changes, repeat, each = changes_of(base, vectors(base, 3)), 2, 2
    together = run(base, (plain + repeat) * 3 * each, changes, repeat, plain).unflatten(0, (-1, 3, each))
    bare = run(base, len(together) * 3 * each).unflatten(0, (-1, 3, each))
    torch.testing.assert_close(together[:plain], bare[:plain])
    for i in range(3):
        alone = run(base, len(together) * 3 * each, select(changes, i)).unflatten(0, (-1, 3, each))
        torch.testing.assert_close(together[plain:, i], alone[plain:, i])


def test_gradient_reaches_every_vector_and_nothing_else(base: Base) -> None:
    params = {k: v.requires_grad_() for k, v in vectors(base, 2).items()}
    run(base, 4, changes_of(base, params)).square().sum().backward()
    assert params["vector"].grad is not None
    assert params["vector"].grad.flatten(0, 1).any(1).all()
    assert all(p.grad is None for model in (base.unet, base.text_encoder) for p in model.parameters())


def test_no_weight_and_no_sum_stands_for_it(base: Base) -> None:
    changes = changes_of(base, vectors(base, 1))
    for change in changes.values():
        with pytest.raises(NotMergeableError, match="is no weight"):
            change.dense(torch.zeros(2, 2))
    twice = both(changes, changes)
    with pytest.raises(UserError, match=r"text_encoder is changed by P\+ and by another adapter"):
        run(base, 2, twice)


def test_what_does_not_fit_is_named(base: Base) -> None:
    with pytest.raises(UserError, match=r"vectors=2: P\+ has one an attention"):
        PlusConfig(vectors=2)
    with pytest.raises(UserError, match="needs a word's row"):
        PlusConfig(row=1, start=1).build(Layout((Layer("text", (9, 4)), Layer("a.to_k", (4, 4)))))
    changes = changes_of(base, {"vector": torch.zeros(1, 3, 7)})
    with pytest.raises(UserError, match=r"text_encoder \[\d+, 32\] takes no vectors of \[3, 7\]"):
        run(base, 2, changes)
    with pytest.raises(UserError, match="is no linear layer"):
        Injection({"x": nn.Embedding(3, 4)}).set({"x": list(changes.values())[1]})
