"""The shipped judge knows styles and places; foreign files are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hyperdb.metrics.obedience import Judge
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import resolve

SHIPPED = "package:embedded/judge.safetensors"


@pytest.mark.parametrize("size", [64, 128])
def test_the_shipped_judge_knows_renders_it_has_not_seen(size):
    import numpy as np

    from hyperdb.heads import PLACES, SPLITS, STYLES, Identity, render, sample_view

    judge, rng = Judge.load(resolve(SHIPPED)), np.random.default_rng(0)
    views = [sample_view(rng, style=style) for style in STYLES for _ in range(3)]
    people = [Identity(SPLITS["validation"][k]) for k in range(len(views))]
    images = np.stack([render(person, view, size) for person, view in zip(people, views, strict=True)])
    found = judge(torch.from_numpy(images).permute(0, 3, 1, 2))
    styles = torch.tensor([STYLES.index(v.style) for v in views])
    places = torch.tensor([PLACES.index(v.place) for v in views])
    assert (found["style"] == styles).float().mean() >= 0.85
    assert (found["place"] == places).float().mean() >= 0.6


def test_round_trip(tmp_path):
    judge = Judge({"style": ["photo", "sketch"], "place": ["beach"]}).eval()
    images = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8)
    again = Judge.load(judge.save(tmp_path / "judge.safetensors", {}))
    assert again.words == judge.words
    assert torch.allclose(again.logits(images)["style"], judge.logits(images)["style"], atol=1e-2)


def test_a_foreign_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="train_judge"):
        Judge.load(tmp_path / "x.safetensors")
