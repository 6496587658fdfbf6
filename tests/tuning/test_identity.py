"""The loss that compares drawn pictures with the person's photos."""

from __future__ import annotations

import pytest
import torch

from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.data.people import load_people
from hyperdb.diffusion.sample import start_noise
from hyperdb.hypernet import EncoderConfig, HypernetConfig
from hyperdb.hypernet.model import Hypernet
from hyperdb.tuning import identity
from hyperdb.tuning.identity import identity_loss, moved

PROMPTS = ["a sks face", "a sks face, on the beach"]


@pytest.fixture(scope="module")
def model(base, rendered):
    torch.manual_seed(0)
    encoder = EncoderConfig(name="vit_tiny_patch16_224", size=32, patch=16, depth=1)
    made = Hypernet(HypernetConfig(width=32, heads=2, summary=6, encoder=encoder),
                    LiDBConfig(a=12, b=8).tokens(Layout.of(base.targets())), 0.2)  # fmt: skip
    made.standardise_features(load_people(rendered).images)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def photos(rendered):
    people = load_people(rendered)
    return [people.images[rows] for rows in people.photos[:2]]


def test_descending_it_brings_pictures_nearer_to_the_person(base, model, photos):
    noise, injection = start_noise(base, [0, 1]), Injection(base.targets())
    tokens = model(torch.stack([p[0] for p in photos])).requires_grad_()
    found = []
    for _ in range(8):
        with injection.using(model.lidb.factors({"tokens": tokens}), repeat=2):
            loss = identity_loss(base, model, noise, photos, 2, PROMPTS, 0)
        (step,) = torch.autograd.grad(loss.sum(), tokens)
        tokens = (tokens - 0.1 * step / step.norm()).detach().requires_grad_()
        found.append(loss.detach())
    injection.remove()
    assert (found[-1] <= found[0]).all()  # who is as near as a photo from the first stays so
    assert found[-1].sum() < 0.6 * found[0].sum()


def test_a_frozen_encoder_passes_the_gradient_to_the_pictures(base, model, photos):
    model.encoder.frozen, images = True, photos[0].float().requires_grad_()
    try:
        (step,) = torch.autograd.grad(model.features(images)[1].square().sum(), images)
    finally:
        model.encoder.frozen = False
    assert step.any()


def test_it_is_zero_for_what_is_as_near_as_a_photo(base, model, photos, monkeypatch):
    """Of pictures that are photos of the person some are nearer than expected; those of another person are farther."""
    with torch.no_grad():
        monkeypatch.setattr(identity, "moved", lambda images, g: images.float())
        monkeypatch.setattr(identity, "sample", lambda *given, **more: torch.zeros(2, *base.latent_shape))
        shown = torch.stack([p.float().mean(0) for p in photos])  # nearer than any single photo

        def loss(pictures):
            monkeypatch.setattr(type(base), "pixels", lambda self, latents: pictures)
            return identity_loss(base, model, start_noise(base, [0, 1]), photos, 2, PROMPTS, 0)

        each = [model.features(p.float())[1] for p in photos]
        own, other = loss(shown), loss(shown.flip(0))
        for i, x in enumerate(each):
            apart = x.var(0).mean() * (1 + 1 / len(x))
            far = (model.features(shown.flip(0))[1][i] - x.mean(0)).square().mean()
            near = (model.features(shown)[1][i] - x.mean(0)).square().mean()
            torch.testing.assert_close(other[i], (far - apart).clamp_min(0))
            torch.testing.assert_close(own[i], (near - apart).clamp_min(0))
        assert (other >= own).all()
        assert other.max() > 0


def test_pictures_are_moved_within_their_frame():
    images = torch.rand(64, 3, 16, 16) * 255
    g = torch.Generator().manual_seed(0)
    found = moved(images, g)
    assert found.shape == images.shape
    assert (found.amax((1, 2, 3)) <= images.amax((1, 2, 3)) + 1e-3).all()
    ramp = torch.arange(16.0).expand(64, 3, 16, 16)
    slopes = moved(ramp, g).diff(dim=-1)[..., 2:-2].mean((1, 2, 3))  # 1 less what is cut off, or turned
    assert (slopes.abs() <= 1 + 1e-4).all()
    assert (slopes.abs() >= 1 - identity.CROP - 1e-4).all()
    assert 16 < (slopes < 0).sum() < 48
