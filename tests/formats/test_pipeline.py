"""The pipeline of ours draws what our sampler draws, with hybrid guidance and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hyperdb.adapters import LiDBConfig, PlusConfig
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.sample import SCHEDULERS, sample, start_noise
from hyperdb.formats.native import Part, Personalization
from hyperdb.formats.pipeline import HybridPipeline
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.trainable import trainable

PROMPTS = ["a photo of [V] face", "a pencil sketch of a [V] face, smiling"]
PLAIN = ["a photo of face", "a pencil sketch of a face, smiling"]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture(scope="module")
def person(base: Base) -> Personalization:
    layout = Layout.of(base.targets())
    lidb = LiDBConfig(a=12, b=8).build(layout)
    tokens = lidb.template + 0.3 * torch.randn(lidb.template.shape, generator=torch.Generator().manual_seed(5))
    return Personalization(layout, tokens, lidb.config)


@pytest.fixture
def pipeline(tiny_base: Path, person: Personalization) -> Iterator[HybridPipeline]:
    loaded = HybridPipeline.from_pretrained(tiny_base)
    loaded.set_progress_bar_config(disable=True)
    handle = loaded.personalize(person)
    yield loaded
    handle.remove()


def ours(base: Base, person: Personalization, text: float, subject: float | None, **more: object) -> torch.Tensor:
    handle = person.apply(base)
    handle.plain = 0 if subject is None else len(blocks(text, subject)) - 1
    try:
        drawn = sample(base, PROMPTS, start_noise(base, [0, 1]), 4, text, subject_guidance=subject, **more)
        return base.decode(drawn).float()
    finally:
        handle.remove()


def blocks(text: float, subject: float) -> str:
    if text == subject:
        return "p" if text == 1 else "up"
    return "bp" if text == 1 else "ubp"


def theirs(base: Base, pipeline: HybridPipeline, text: float, subject: float | None, **more: object) -> torch.Tensor:
    drawn = pipeline(
        PROMPTS, latents=start_noise(base, [0, 1]), num_inference_steps=4, guidance_scale=text,
        subject_guidance=subject, output_type="pt", **more,
    )  # fmt: skip
    return (drawn.images * 255).round()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1
    assert (a - b).abs().mean() < 0.01
    assert b.std() > 5, "the comparison says nothing on flat pictures"


@pytest.mark.parametrize("pair", [(3.0, None), (3.0, 3.0), (3.0, 4.5), (1.0, 3.0), (0.5, 2.0), (1.0, 1.0), (3.0, 0.0)])
def test_draws_what_the_sampler_draws(
    base: Base, person: Personalization, pipeline: HybridPipeline, pair: tuple[float, float | None]
) -> None:
    close(ours(base, person, *pair), theirs(base, pipeline, *pair))


def test_the_person_and_the_way_of_guidance_change_the_pictures(base: Base, person: Personalization) -> None:
    drawn = [ours(base, person, *pair) for pair in [(3.0, None), (3.0, 3.0), (3.0, 4.5)]]
    drawn.append(base.decode(sample(base, PROMPTS, start_noise(base, [0, 1]), 4, 3.0)).float())
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (one - other).abs().mean() > 1


def test_without_weight_the_person_is_gone(base: Base, pipeline: HybridPipeline) -> None:
    plain = base.decode(sample(base, PLAIN, start_noise(base, [0, 1]), 4, 3.0)).float()
    close(plain, theirs(base, pipeline, 3.0, 0.0))


@pytest.mark.parametrize("scheduler", ["euler", "pndm"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_negative_prompt_and_scheduler(
    base: Base, person: Personalization, pipeline: HybridPipeline, scheduler: str
) -> None:
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    mine = ours(base, person, 3.0, 4.0, negative="beach", scheduler=scheduler)
    close(mine, theirs(base, pipeline, 3.0, 4.0, negative_prompt=["beach"] * 2))
    assert (mine - ours(base, person, 3.0, 4.0, scheduler=scheduler)).abs().mean() > 0.1


def test_one_prompt_and_one_negative_prompt(base: Base, pipeline: HybridPipeline) -> None:
    told = {"num_inference_steps": 4, "guidance_scale": 3.0, "subject_guidance": 4.0, "output_type": "pt"}
    noise = start_noise(base, [0])
    one = pipeline(PROMPTS[0], latents=noise, negative_prompt="beach", **told).images
    several = pipeline([PROMPTS[0]], latents=noise, negative_prompt=["beach"], **told).images
    assert torch.equal(one, several)


@pytest.mark.parametrize("pair", [(3.0, None), (3.0, 4.5)])
def test_an_adapter_of_several_contexts(base: Base, tiny_base: Path, pair: tuple[float, float | None]) -> None:
    settings, adapter = trainable(base, PlusConfig())
    vectors = torch.randn(1, *adapter.shapes()["vector"], generator=torch.Generator().manual_seed(6))
    plus = Personalization(
        Layout.of(base.targets()), None, parts=[Part(settings, adapter.layout, {"vector": vectors})]
    )
    loaded = HybridPipeline.from_pretrained(tiny_base)
    loaded.set_progress_bar_config(disable=True)
    handle = loaded.personalize(plus)
    close(ours(base, plus, *pair), theirs(base, loaded, *pair))
    handle.remove()


def test_several_pictures_of_a_prompt(base: Base, person: Personalization, pipeline: HybridPipeline) -> None:
    drawn = pipeline(
        PROMPTS[0], latents=start_noise(base, [0, 1]), num_inference_steps=4, guidance_scale=3.0, subject_guidance=3.0,
        num_images_per_prompt=2, output_type="pt",
    )  # fmt: skip
    handle = person.apply(base)
    handle.plain = 1
    latents = sample(base, PROMPTS[:1] * 2, start_noise(base, [0, 1]), 4, 3.0, subject_guidance=3.0)
    handle.remove()
    close(base.decode(latents).float(), (drawn.images * 255).round())


def test_a_hybrid_call_leaves_nothing_behind(base: Base, pipeline: HybridPipeline) -> None:
    before = theirs(base, pipeline, 3.0, None)
    theirs(base, pipeline, 3.0, 4.0)
    with pytest.raises(UserError, match="as text"):
        pipeline(prompt_embeds=torch.zeros(1, 77, 32), guidance_scale=1.0, subject_guidance=3.0)
    with pytest.raises(UserError, match="subject_guidance=inf"):
        theirs(base, pipeline, 3.0, float("inf"))
    assert torch.equal(before, theirs(base, pipeline, 3.0, None))
    assert not pipeline.unet._forward_hooks
    assert not pipeline.unet._forward_pre_hooks


def test_needs_a_person(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="needs a person"):
        HybridPipeline.from_pretrained(tiny_base)("a face", subject_guidance=3.0)
