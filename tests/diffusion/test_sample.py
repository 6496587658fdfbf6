"""Our sampler draws the pictures that diffusers' own pipeline draws from the same folder and noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.sample import SCHEDULERS, sample, start_noise
from hyperdb.runtime.errors import NonFiniteError, UserError

# diffusers' dpm, euler and unipc turn tensors to arrays in a way that numpy 2 frowns upon
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a photo of [V] face", "a pencil sketch of a face, smiling"]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> StableDiffusionPipeline:
    """Load the folder as a stranger would, without a word about it."""
    loaded = StableDiffusionPipeline.from_pretrained(tiny_base)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def reference(
    pipeline: StableDiffusionPipeline, noise: torch.Tensor, guidance: float, **more: object
) -> torch.Tensor:
    prompts = [p.replace("[V]", "sks") for p in PROMPTS]
    done = pipeline(
        prompts, latents=noise, num_inference_steps=4, guidance_scale=guidance, output_type="pt", **more
    )
    return (done.images * 255).round()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = (ours.float() - theirs).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    assert theirs.std() > 5, "the comparison says nothing on flat pictures"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_the_pipeline(base: Base, pipeline: StableDiffusionPipeline, guidance: float) -> None:
    noise = start_noise(base, [0, 1])
    close(base.decode(sample(base, PROMPTS, noise, 4, guidance)), reference(pipeline, noise, guidance))


def test_equals_the_pipeline_with_a_negative_prompt(base: Base, pipeline: StableDiffusionPipeline) -> None:
    noise = start_noise(base, [0, 1])
    plain = sample(base, PROMPTS, noise, 4, 5.0)
    ours = sample(base, PROMPTS, noise, 4, 5.0, negative="beach")
    assert not torch.allclose(ours, plain)
    close(base.decode(ours), reference(pipeline, noise, 5.0, negative_prompt=["beach"] * 2))


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_equals_the_pipeline(
    base: Base, tiny_base: Path, pipeline: StableDiffusionPipeline, scheduler: str
) -> None:
    other = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    other.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    other.set_progress_bar_config(disable=True)
    noise = start_noise(base, [0, 1])
    ours = sample(base, PROMPTS, noise, 4, 3.0, scheduler=scheduler)
    close(base.decode(ours), reference(other, noise, 3.0))


def test_epsilon_prediction_equals_the_pipeline(tiny_base: Path, pipeline: StableDiffusionPipeline) -> None:
    base = DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()
    base.schedule.register_to_config(prediction_type="epsilon")
    other = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    other.scheduler = SCHEDULERS["ddim"].from_config(pipeline.scheduler.config, prediction_type="epsilon")
    other.set_progress_bar_config(disable=True)
    noise = start_noise(base, [0, 1])
    close(base.decode(sample(base, PROMPTS, noise, 4, 3.0)), reference(other, noise, 3.0))


def test_steps_and_guidance_default_to_the_base(base: Base) -> None:
    noise = start_noise(base, [0, 1])
    ours = sample(base, PROMPTS, noise)
    assert torch.equal(ours, sample(base, PROMPTS, noise, base.config.steps, base.config.guidance))


def test_unknown_or_unfit_scheduler_is_named(base: Base) -> None:
    with pytest.raises(UserError, match="scheduler='plms': expected one of ddim, dpm, euler, pndm, unipc"):
        sample(base, PROMPTS, start_noise(base, [0, 1]), scheduler="plms")
    with pytest.raises(UserError, match="scheduler=pndm cannot draw in 3 steps"):
        sample(base, PROMPTS, start_noise(base, [0, 1]), 3, scheduler="pndm")
    with pytest.raises(UserError, match="scheduler=ddim cannot draw in 1001 steps; take 1000 at most"):
        sample(base, PROMPTS, start_noise(base, [0, 1]), 1001)


def test_an_offset_beyond_the_last_level_is_named(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = {"steps_offset": 1, "timestep_spacing": "leading"}  # as Stable Diffusion 1.5 has it
    scheduler = type(base.schedule).from_config(base.schedule.config, **offset)
    monkeypatch.setattr(base, "schedule", scheduler)
    with pytest.raises(UserError, match="cannot draw in 1000 steps on this base; take fewer"):
        sample(base, PROMPTS, start_noise(base, [0, 1]), 1000)
    assert sample(base, PROMPTS, start_noise(base, [0, 1]), 2).isfinite().all()


def test_start_noise_is_private_to_each_seed(base: Base) -> None:
    together = start_noise(base, [5, 6, 7])
    assert together.shape == (3, *base.latent_shape)
    for i, seed in enumerate([5, 6, 7]):
        assert torch.equal(together[i], start_noise(base, [seed])[0])
    assert not torch.equal(together[0], together[1])
    assert abs(together.std().item() - 1) < 0.1


def test_sampling_leaves_the_global_generator_alone(base: Base) -> None:
    before = torch.get_rng_state()
    sample(base, PROMPTS, start_noise(base, [0, 1]), 2, scheduler="euler")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_step_can_be_differentiated(base: Base) -> None:
    noise, bias = start_noise(base, [0, 1]), base.unet.conv_out.bias
    plain = sample(base, PROMPTS, noise, 3)
    bias.requires_grad_()
    try:
        drawn = sample(base, PROMPTS, noise, 3, gradient=True)
        (found,) = torch.autograd.grad(drawn.sum(), bias)
    finally:
        bias.requires_grad_(False)
    assert torch.equal(drawn, plain)
    assert found.abs().min() > 0


def test_no_gradient_is_kept(base: Base) -> None:
    assert not sample(base, PROMPTS, start_noise(base, [0, 1]), 1).requires_grad


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_no_generator_takes_is_named(base: Base, seed: int) -> None:
    start_noise(base, [2**64 - 1, -(2**63)])
    with pytest.raises(UserError, match=f"seed={seed}: expected -2\\*\\*63 to 2\\*\\*64 - 1"):
        start_noise(base, [0, seed])


def test_what_is_no_number_is_not_drawn(base: Base) -> None:
    noise = start_noise(base, [0, 1])
    with pytest.raises(NonFiniteError, match=r"larger than any picture after 4 steps at guidance=1e\+39: lower"):
        sample(base, PROMPTS, noise, 4, 1e39)
    noise[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN, infinite or larger than any picture after 2 steps"):
        sample(base, PROMPTS, noise, 2, 1.0)


def test_guidance_that_leaves_the_prompt_out_is_said(base: Base) -> None:
    noise = start_noise(base, [0, 1])
    with pytest.warns(UserWarning, match=r"^guidance=0 ignores the prompt; 1 is without guidance$"):
        ignored = sample(base, PROMPTS, noise, 2, 0)
    with pytest.warns(UserWarning, match=r"^guidance=-2.0 draws away from the prompt"):
        sample(base, PROMPTS, noise, 2, -2.0)
    torch.testing.assert_close(ignored, sample(base, ["", ""], noise, 2, 1.0), atol=1e-4, rtol=1e-4)
