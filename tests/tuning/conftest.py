"""A tiny base, its prior and latents of three people, for fits."""

from __future__ import annotations

import pytest
import torch

from hyperdb.diffusion import DiffusionConfig
from hyperdb.tuning.prior import PriorConfig, load_prior


@pytest.fixture(scope="module")
def base(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu", steps=2).load()


@pytest.fixture(scope="module")
def prior(base, tmp_path_factory):
    config = PriorConfig(prompts=["a photo of a face", "a pencil sketch of a face"], images=4)
    return load_prior(base, config, tmp_path_factory.mktemp("prior") / "prior.safetensors")


@pytest.fixture(scope="module")
def moments(base):
    g = torch.Generator().manual_seed(3)
    return torch.rand(3, 1, 2, *base.latent_shape, generator=g)
