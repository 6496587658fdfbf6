"""The prior is made once, and again where something that decides it has changed."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, save_json
from hyperdb.tuning.prior import PriorConfig, load_prior


def test_prior_is_cached_and_remade_for_other_prompts(base, tmp_path):
    path = tmp_path / "p.safetensors"
    first = load_prior(base, PriorConfig(prompts=["a face"], images=2), path)
    stamp = path.stat().st_mtime_ns
    assert torch.equal(first.latents, load_prior(base, PriorConfig(prompts=["a face"], images=2), path).latents)
    assert path.stat().st_mtime_ns == stamp
    shipped = load_prior(base, PriorConfig(prompts=["a face"], images=2), tmp_path / "none.safetensors", path)
    assert torch.equal(first.latents, shipped.latents)
    assert not (tmp_path / "none.safetensors").exists()
    load_prior(base, PriorConfig(prompts=["a photo of a face"], images=2), path)
    assert path.stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
    ],
)
def test_the_prior_of_another_base_is_not_used(base, prior, tmp_path, file, values):
    copy = shutil.copytree(base.config.path, tmp_path / "copy")
    config, cache = PriorConfig(prompts=["a photo of a face"], images=2, levels=2), tmp_path / "prior.safetensors"
    own = load_prior(base, config, cache).own
    written = cache.stat().st_mtime_ns
    assert torch.equal(load_prior(replace(base.config, path=str(copy)).load(), config, cache).own, own)
    assert cache.stat().st_mtime_ns == written  # the same base, at another place
    save_json(copy / file, {**load_json(copy / file), **values})
    assert not torch.equal(load_prior(replace(base.config, path=str(copy)).load(), config, cache).own, own)


@pytest.mark.parametrize("odd", [{"prompts": []}, {"images": 0}, {"levels": 0}])
def test_a_prior_of_nothing_is_refused(odd):
    with pytest.raises(UserError, match="a prompt, an image and a level"):
        PriorConfig(**{"prompts": ["a face"], "images": 2, **odd})
