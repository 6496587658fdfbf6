"""The trainer of adapters: batched fits equal single ones, the frozen base stays, the prior holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyperdb.adapters import LoRAConfig, SVDiffConfig, TokenConfig
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.adapters.lora import LoRA
from hyperdb.diffusion import loss
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.fit import Begin, FitConfig, fit
from hyperdb.tuning.trainable import trainable


@pytest.fixture(scope="module")
def lidb(base):
    return LiDB(Layout.of(base.targets()), a=12, b=8)


def test_a_person_does_not_depend_on_the_batch(base, lidb, moments, prior):
    config = FitConfig(steps=3, levels=2, rate=1e-2, prior_weight=0.5, prior_rows=1)
    together = fit(base, lidb, moments, config, prior=prior)["tokens"]
    alone = torch.cat([fit(base, lidb, moments[i : i + 1], config, prior=prior)["tokens"] for i in range(3)])
    assert torch.allclose(together, alone, atol=2e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_plain_step_goes_along_the_gradient_that_the_gain_scales(base, lidb, moments):
    """From where it begins a person's number moves by -rate * gain * gradient, and stays where the gain is 0."""
    g = torch.Generator().manual_seed(3)
    at = lidb.init(3)["tokens"] + 0.1 * torch.randn(3, *lidb.mask.shape, generator=g) * lidb.mask
    gain = torch.rand(lidb.mask.shape, generator=g) * lidb.part("B")
    config = FitConfig(steps=1, levels=4, rate=0.5, optimizer="sgd", logit_normal=[0.2, 1.0], signal_weight=0.5)
    found = fit(base, lidb, moments, config, begin=Begin({"tokens": at}, {"tokens": gain}))["tokens"]
    # the gradient, by differences of the loss along a direction
    whole = fit(base, lidb, moments, config, begin=Begin({"tokens": at}, {"tokens": torch.ones_like(gain)}))["tokens"]
    torch.testing.assert_close(found - at, (whole - at) * gain, atol=1e-6, rtol=1e-3)
    assert torch.equal(found[:, lidb.part("A")], at[:, lidb.part("A")])
    alone = fit(base, lidb, moments[1:2], config, begin=Begin({"tokens": at[1:2]}, {"tokens": gain}))["tokens"]
    torch.testing.assert_close(found[1:2], alone, atol=1e-5, rtol=1e-3)
    assert not torch.equal(found[0] - at[0], found[1] - at[1])


def test_gradient_descent_lowers_the_loss_it_descends(base, lidb, moments):
    seen: dict[float, list[float]] = {}
    at = lidb.init(3)["tokens"]
    for rate in (1e-6, 500.0):
        config = FitConfig(steps=8, levels=4, rate=rate, optimizer="sgd", decay=0.0)
        begin = Begin({"tokens": at}, {"tokens": torch.ones_like(lidb.template)})
        fit(base, lidb, moments, config, begin=begin, progress=lambda _, x, r=rate: seen.setdefault(r, []).append(x))
    assert seen[500.0][-1] < seen[1e-6][-1] - 1e-5  # the same draws of noise, so the difference is the descent


def test_the_same_image_gives_the_same_fit(base, lidb, moments):
    """Learnable targets: one initial A and one stream of noise make a fit a function of the image."""
    twice = fit(base, lidb, moments[:1].repeat(2, 1, 1, 1, 1, 1), FitConfig(steps=3, levels=2, rate=1e-2))["tokens"]
    assert torch.allclose(twice[0], twice[1], atol=1e-5)


def test_with_flips_a_photo_and_its_mirror_image_teach_the_same_two_pictures():
    photos = torch.arange(2 * 3 * 4 * 4.0).view(1, 2, 3, 2, 8)
    plain, both = (FitConfig(steps=1, levels=1, rate=1.0, flips=flips).sides(photos) for flips in (False, True))
    assert torch.equal(plain, photos)
    assert both.shape == (1, 4, 3, 2, 8)
    assert torch.equal(both[:, :2], photos)
    assert torch.equal(both[0, 3, 1, 0], photos[0, 1, 1, 0].flip(0))


def test_the_masked_prior_holds_what_is_outside_of_it_to_the_base(base, lidb, moments):
    def first_error(**settings):
        told = []
        config = FitConfig(steps=1, levels=8, rate=1e-2, **settings)
        fit(base, lidb, moments[:1], config, None, None, lambda _, error: told.append(error))
        return told[0]

    plain = first_error()
    assert first_error(masked_prior=10.0) == pytest.approx(plain, rel=1e-5)  # the whole frame is inside
    inside = loss.face_mask(0.6, *moments.shape[4:]).square().mean().item()
    # an adapter that does nothing yet is the base: it has no error outside, and about everywhere the same inside
    assert first_error(masked_prior=0.6) == pytest.approx(plain * inside, rel=0.3)
    with pytest.raises(UserError, match="masked_prior=-1: expected a radius"):
        FitConfig(steps=1, levels=1, rate=1.0, masked_prior=-1)


def test_a_photo_is_learned_under_the_prompt_that_is_asked_for(base, lidb, moments):
    def trained(prompt):
        return fit(base, lidb, moments[:1], FitConfig(steps=2, levels=2, rate=1e-2, instance_prompt=prompt))

    usual, same, other = map(trained, (None, "a [V] face", "a photo of a [V] face"))
    assert all(torch.equal(usual[name], same[name]) for name in usual)
    assert not all(torch.equal(usual[name], other[name]) for name in usual)
    with pytest.raises(UserError, match=r"instance_prompt='a face': expected a prompt with \[V\]"):
        FitConfig(steps=1, levels=1, rate=1.0, instance_prompt="a face")
    with pytest.raises(UserError, match=r"\[V\] is cut off, for the base reads fewer words"):
        trained("a very " * 40 + "[V] face")


def test_more_vectors_than_the_prompt_has_room_for_are_refused(base, moments):
    room = base.tokenizer.model_max_length - 2
    once = FitConfig(steps=1, levels=1, rate=1e-2)
    fits, beyond = (trainable(base, TokenConfig(vectors=room - n))[1] for n in (2, 1))  # "a [V] face": two besides
    fit(base, fits, moments[:1], once)
    with pytest.raises(UserError, match=rf"vectors={room - 1}: the base reads {room + 2} tokens, and 'a sks face'"):
        fit(base, beyond, moments[:1], once)


def test_records_of_runs_are_as_before_where_no_prompt_is_set():
    one = FitConfig(steps=1, levels=1, rate=1.0)
    told = ["face_weight", "flips", "levels", "logit_normal", "masked_prior", "merge", "noise", "optimizer"]
    told += ["prior_rows", "prior_weight", "rate", "seed", "signal_weight", "steps", "warmup"]
    assert sorted(one.told()) == sorted([*told, "decay"])
    assert replace(one, instance_prompt="a [V]").told() == {**one.told(), "instance_prompt": "a [V]"}


@pytest.mark.parametrize("kind", [LoRAConfig(rank=2), SVDiffConfig()])
def test_merging_changes_no_fit(base, lidb, moments, kind):
    """What is trained on top of a frozen prediction is what hooks train, whether it is of low rank or not."""
    frozen = lidb.factors({"tokens": lidb.template[None] + 0.02})
    adapter = kind.build(lidb.layout)
    config = FitConfig(steps=3, levels=2, rate=1e-2)
    hooked, merged = (fit(base, adapter, moments[:1], replace(config, merge=m), frozen) for m in (False, True))
    begun = adapter.init(1, base.sites(adapter.layout.names))
    assert any((hooked[name] - value).abs().max() > 1e-3 for name, value in begun.items())
    for name, value in hooked.items():
        assert torch.allclose(value, merged[name], atol=1e-3), name


def test_checkpointing_changes_no_fit(base, lidb, moments):
    config = FitConfig(steps=3, levels=2, rate=1e-2)
    saving = replace(base.config, checkpointing=True).load()
    plain, saved = (fit(b, lidb, moments[:1], config)["tokens"] for b in (base, saving))
    assert not torch.equal(plain, lidb.init(1)["tokens"])
    assert torch.allclose(plain, saved, atol=1e-5)


@pytest.mark.parametrize("noise", [[0.0, 0.65], [0.2, 0.5]])
def test_only_the_noise_levels_asked_for_are_learned_from(base, lidb, moments, prior, monkeypatch, noise):
    seen: list[torch.Tensor] = []
    wanted = loss.target
    monkeypatch.setattr(loss, "target", lambda s, z, n, t: seen.append(t) or wanted(s, z, n, t))
    config = FitConfig(steps=20, levels=4, rate=1e-3, prior_weight=0.1, noise=noise)
    fit(base, lidb, moments[:1], config, prior=prior)
    t = torch.stack(seen)
    low, high = (1000 * x for x in noise)
    assert low <= t.min() < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < t.max() < high
    edges = low + (high - low) * torch.arange(5) / 4  # one level of each stratum, rounded down
    assert ((edges[:4] - 1 < t) & (t <= edges[1:])).all()


@pytest.mark.parametrize("noise", [[0.5], [0.5, 0.5], [-0.1, 0.5], [0.0, 1.1], [0.7, 0.2]])
def test_a_range_of_noise_levels_that_is_none_is_refused(noise):
    with pytest.raises(UserError, match="noise="):
        FitConfig(steps=1, levels=1, rate=1e-3, noise=noise)


def test_fitting_lowers_the_loss(base, lidb, moments):
    losses: list[float] = []
    fit(base, lidb, moments, FitConfig(steps=30, levels=4, rate=3e-2), progress=lambda _, loss: losses.append(loss))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_warm_up_begins_with_small_steps(base, lidb, moments):
    def moved(warmup: int) -> float:
        config = FitConfig(steps=1, levels=2, rate=1e-2, warmup=warmup)
        return (fit(base, lidb, moments[:1], config)["tokens"] - lidb.init(1)["tokens"]).norm().item()

    assert moved(4) == pytest.approx(moved(0) / 4, rel=1e-3)
    with pytest.raises(UserError, match="warmup=-1"):
        FitConfig(steps=1, levels=1, rate=1e-3, warmup=-1)


def test_the_same_signal_weight_is_the_same_loss_for_a_base_of_epsilon(base, lidb, moments, monkeypatch):
    """A network of v, asked for epsilon by the same formula, is fitted alike."""
    config = FitConfig(steps=2, levels=2, rate=1e-3, signal_weight=0.5)
    of_v = fit(base, lidb, moments[:1], config)["tokens"]
    alpha_bar, predict = base.schedule.alphas_cumprod, loss.predict

    def epsilon(base, latents, noise, timesteps, ids):
        v = predict(base, latents, noise, timesteps, ids)
        alpha = alpha_bar[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * v + (1 - alpha).sqrt() * base.schedule.add_noise(latents, noise, timesteps)

    monkeypatch.setattr(loss, "predict", epsilon)
    base.schedule.register_to_config(prediction_type="epsilon")
    try:
        assert torch.allclose(fit(base, lidb, moments[:1], config)["tokens"], of_v, atol=1e-4)
        other = fit(base, lidb, moments[:1], replace(config, signal_weight=1.5))["tokens"]
        assert not torch.allclose(other, of_v, atol=1e-4)
    finally:
        base.schedule.register_to_config(prediction_type="v_prediction")


def test_face_weight_makes_the_rim_count_less(base, lidb, moments):
    y, x = (torch.linspace(-1, 1, n) for n in base.latent_shape[1:])
    rim = (y[:, None] ** 2 + x[None, :] ** 2 > 1).float()
    losses: list[float] = []
    for weight in (0.0, 1000.0):
        config = FitConfig(steps=1, levels=2, rate=1e-3, face_weight=weight)
        fit(base, lidb, moments[:1] + 9 * rim, config, progress=lambda _, loss: losses.append(loss))
    assert losses[1] < 0.5 * losses[0]


def test_the_frozen_part_is_under_the_trained_one(base, lidb, moments):
    tokens = fit(base, lidb, moments[:1], FitConfig(steps=2, levels=1, rate=1e-1))["tokens"]
    frozen = {k: (d.detach(), u.detach()) for k, (d, u) in lidb.factors({"tokens": tokens}).items()}
    losses: dict[str, list[float]] = {"with": [], "without": []}
    lora = LoRA(lidb.layout, 2)
    one = FitConfig(steps=1, levels=2, rate=1e-3)
    fit(base, lora, moments[:1], one, frozen, progress=lambda _, loss: losses["with"].append(loss))
    fit(base, lora, moments[:1], one, None, progress=lambda _, loss: losses["without"].append(loss))
    assert losses["with"] != losses["without"]


def test_no_gradient_for_frozen_weights_and_no_hooks_left(base, lidb, moments):
    fit(base, lidb, moments[:1], FitConfig(steps=1, levels=1, rate=1e-3))
    for module in (base.unet, base.text_encoder, base.vae):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks for m in base.targets().values())


def test_a_strong_prior_keeps_the_base(base, lidb, moments, prior):
    def size(weight: float) -> float:
        config = FitConfig(steps=15, levels=2, rate=1e-2, prior_weight=weight, prior_rows=4)
        factors = lidb.factors(fit(base, lidb, moments[:1], config, prior=prior))
        return sum((up @ down).square().sum().item() for down, up in factors.values())

    assert size(100.0) < size(0.01)


def test_a_bad_noise_level_is_named(base, lidb, moments, monkeypatch):
    right, calls = loss.predict, []

    def wrong(base, latents, noise, timesteps, ids):
        calls.append(timesteps)
        out = right(base, latents, noise, timesteps, ids)
        return torch.where((timesteps > 700)[:, None, None, None] & (len(calls) > 2), torch.nan, out)

    monkeypatch.setattr(loss, "predict", wrong)
    with pytest.raises(UserError, match=r"adapters of 2, noise level \d+ of 1000: the loss is nan at step 2") as error:
        fit(base, lidb, moments[:2], FitConfig(steps=9, levels=3, rate=1e-3))
    named = int(str(error.value).partition("level ")[2].partition(" ")[0])
    assert named in calls[-1].tolist()
    assert named > 700


def test_one_number_among_many_that_is_none_is_found(base, lidb, moments, monkeypatch):
    """It came with the last step, after which there is no loss to show it."""
    step = torch.optim.AdamW.step

    def last(self, closure=None):
        step(self, closure)
        self.param_groups[-1]["params"][-1].data.view(-1)[-1] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", last)
    with pytest.raises(UserError, match="holds numbers of nan: lower the rate"):
        fit(base, LoRA(lidb.layout, 2), moments[:1], FitConfig(steps=1, levels=1, rate=1e-3))


def test_a_fit_that_diverges_says_so(base, lidb, moments):
    with pytest.raises(UserError, match=r"the loss is \w+ at step \d+; lower the rate \(1e\+30\)"):
        fit(base, lidb, moments[:1], FitConfig(steps=20, levels=4, rate=1e30))
    with pytest.raises(UserError, match=r"holds numbers of 1e\+30: lower the rate"):  # seen by no loss any more
        fit(base, lidb, moments[:1], FitConfig(steps=1, levels=4, rate=1e30))
