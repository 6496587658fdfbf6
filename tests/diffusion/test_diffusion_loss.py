"""The loss follows the prediction type; noise levels are stratified; frozen weights get no gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.loss import (
    diffusion_loss,
    face_focus,
    face_mask,
    predict,
    signal_weight,
    stratified_timesteps,
    target,
)
from hyperdb.runtime import precision


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


def batch(base: Base, n: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, n, *base.latent_shape, generator=g)
    timesteps = torch.tensor([10, 900, 500, 0])[:n]
    return latents, noise, timesteps, base.tokenize(["a [V] face"] * n)


@pytest.mark.parametrize(("rows", "levels", "steps"), [(1, 1, 1000), (7, 4, 1000), (50, 10, 20)])
def test_one_timestep_in_each_stratum(rows: int, levels: int, steps: int) -> None:
    t = stratified_timesteps(rows, levels, steps, torch.Generator().manual_seed(3))
    assert t.shape == (rows, levels)
    assert t.dtype == torch.long
    assert torch.equal(t * levels // steps, torch.arange(levels).expand(rows, levels))
    if levels == 10:
        assert t[:, 0].unique().numel() > 1, "rows must differ"


def test_logit_normal_timesteps_are_stratified_quantiles() -> None:
    t = stratified_timesteps(4000, 2, 1000, torch.Generator().manual_seed(3), [0.5, 0.8])
    median = 1000 * torch.sigmoid(torch.tensor(0.5))
    assert (t[:, 0] <= median).all()
    assert (t[:, 1] >= median - 1).all()
    logits = ((t + 0.5) / 1000).logit()
    torch.testing.assert_close(logits.mean(), torch.tensor(0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(logits.std(), torch.tensor(0.8), atol=0.03, rtol=0)


def test_signal_weight_of_one_turns_the_error_of_v_into_that_of_epsilon(base: Base) -> None:
    latents, noise, timesteps, _ = batch(base, 3)
    alpha = base.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = base.schedule.add_noise(latents, noise, timesteps)
    guess = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))  # of v
    epsilon = alpha.sqrt() * guess + (1 - alpha).sqrt() * noisy
    of_v = (guess - base.schedule.get_velocity(latents, noise, timesteps)).square().mean((1, 2, 3))
    of_epsilon = (epsilon - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(signal_weight(base.schedule, timesteps, 1.0) * of_v, of_epsilon)
    assert torch.equal(signal_weight(base.schedule, timesteps, 0.0), torch.ones(3))
    for power in (0.0, 0.5, 1.0, 1.7):  # the same number is the same loss, whatever the base predicts
        base.schedule.register_to_config(prediction_type="v_prediction")
        weighted = signal_weight(base.schedule, timesteps, power) * of_v
        base.schedule.register_to_config(prediction_type="epsilon")
        torch.testing.assert_close(signal_weight(base.schedule, timesteps, power) * of_epsilon, weighted)
    for kind in ("epsilon", "v_prediction"):  # null is the base's own loss
        base.schedule.register_to_config(prediction_type=kind)
        assert torch.equal(signal_weight(base.schedule, timesteps, None), torch.ones(3))
    base.schedule.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="'sample' is not supported"):
        signal_weight(base.schedule, timesteps, 0.5)


def test_face_focus_has_mean_one_and_its_peak_in_the_middle() -> None:
    focus = face_focus(2.0, 9, 9)
    torch.testing.assert_close(focus.mean(), torch.tensor(1.0))
    assert focus.argmax() == 40
    torch.testing.assert_close(focus[4, 4] / focus[0, 0], torch.tensor(3.0), rtol=0.01, atol=0)
    assert torch.equal(face_focus(0.0, 4, 6), torch.ones(4, 6))


def test_face_mask_is_one_in_the_middle_and_zero_outside_of_its_radius() -> None:
    mask = face_mask(0.5, 9, 9)
    assert mask[4, 4] > 0.99
    assert mask[4, 6].item() == pytest.approx(0.5)  # on the circle
    assert max(mask[0].max(), mask[:, -1].max()) < 0.01


def test_targets_of_both_prediction_types(base: Base) -> None:
    latents, noise, timesteps, _ = batch(base)
    alpha = base.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(target(base.schedule, latents, noise, timesteps), velocity)
    base.schedule.register_to_config(prediction_type="epsilon")
    assert torch.equal(target(base.schedule, latents, noise, timesteps), noise)
    base.schedule.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="'sample' is not supported; expected epsilon or v_prediction"):
        target(base.schedule, latents, noise, timesteps)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_the_squared_error_of_each_row(base: Base, kind: str) -> None:
    base.schedule.register_to_config(prediction_type=kind)
    latents, noise, timesteps, ids = batch(base, 4)
    with torch.no_grad():
        losses = diffusion_loss(base, latents, noise, timesteps, ids)
        noisy = base.schedule.add_noise(latents, noise, timesteps)
        prediction = base.unet(noisy, timesteps, base.text_encoder(ids)[0]).sample
        one = diffusion_loss(base, latents[1:2], noise[1:2], timesteps[1:2], ids[1:2])
    error = (prediction - target(base.schedule, latents, noise, timesteps)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, error)
    torch.testing.assert_close(losses[1:2], one)


def test_bf16_autocast_predicts_float32_close_to_fp32(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)  # emulated where it is not: slow, and the same
    latents, noise, timesteps, ids = batch(base)
    with torch.no_grad():
        exact = predict(base, latents, noise, timesteps, ids)
        base.config = replace(base.config, dtype="bf16")
        rough = predict(base, latents, noise, timesteps, ids)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_reaches_the_adapter_and_no_frozen_weight(tiny_base: Path, attention: str) -> None:
    config = DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu", attention=attention)
    base = config.load()
    targets = base.targets()
    lidb = LiDBConfig(a=4, b=3).build(Layout.of(targets))
    g = torch.Generator().manual_seed(1)
    tokens = lidb.init(2)["tokens"]
    tokens = (tokens + 0.1 * torch.randn(tokens.shape, generator=g)).requires_grad_()
    injection = Injection(targets)
    with injection.using(lidb.factors({"tokens": tokens})):
        losses = diffusion_loss(base, *batch(base))
        losses[0].backward()
    assert tokens.grad is not None
    assert (tokens.grad[0] != 0).any(dim=1).all(), "some layer of the first person got no gradient"
    assert not tokens.grad[1].any(), "the second person's numbers do not touch the first's loss"
    assert all(p.grad is None for m in (base.unet, base.text_encoder, base.vae) for p in m.parameters())
