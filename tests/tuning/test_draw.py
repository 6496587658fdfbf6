"""Many people drawn at once are the people drawn alone, however they are guided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperdb.adapters import LoRAConfig
from hyperdb.adapters.base import Factors, select
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.tuning import draw as drawing
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import FitConfig, fit

PROMPTS = ["a photo of [V] face", "a pencil sketch of a sks face"]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu", steps=3).load()


@pytest.fixture(scope="module")
def factors(base: Base) -> Factors:
    lora = LoRAConfig(rank=2).build(Layout.of(base.targets()))
    g = torch.Generator().manual_seed(0)
    return lora.changes({k: v + 0.15 * torch.randn(v.shape, generator=g) for k, v in lora.init(3).items()})


def drawn(base: Base, factors: Factors | None, people: int, pair: tuple[float, float | None]) -> torch.Tensor:
    before = base.config
    base.config = replace(before, guidance=pair[0], subject_guidance=pair[1])
    try:
        return draw(base, factors, people, PROMPTS, [0, 1], batch=4).float()  # two people at once
    finally:
        base.config = before


@pytest.mark.parametrize("pair", [(3.0, None), (3.0, 3.0), (3.0, 4.0), (1.0, 3.0)])
def test_together_as_alone(base: Base, factors: Factors, pair: tuple[float, float | None]) -> None:
    together = drawn(base, factors, 3, pair)
    alone = torch.cat([drawn(base, select(factors, i), 1, pair) for i in range(3)])
    assert (together - alone).abs().max() <= 1
    assert (together[0] - together[1]).abs().mean() > 1


@pytest.mark.parametrize("people", [1, 3])
def test_no_more_pictures_at_once_than_asked_for(
    base: Base, factors: Factors, people: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, right = [], drawing.sample

    def counting(base: Base, prompts: list[str], *rest: Any, **more: Any) -> torch.Tensor:
        counts.append(len(prompts))
        return right(base, prompts, *rest, **more)

    monkeypatch.setattr(drawing, "sample", counting)
    some, prompts, seeds = select(factors, slice(0, people)), [*PROMPTS, PROMPTS[0]], [0, 1, 2]
    parted, whole = (draw(base, some, people, prompts, seeds, batch=batch).float() for batch in (2, 9))
    assert counts[:-1] == [2, 1] * people
    assert parted.shape == whole.shape == (people, 3, 3, 32, 32)
    assert (parted - whole).abs().max() <= 1


def test_hybrid_guidance_draws_others_than_ordinary(base: Base, factors: Factors) -> None:
    ordinary, equal, three = (drawn(base, factors, 3, pair) for pair in [(3.0, None), (3.0, 3.0), (3.0, 4.0)])
    assert (ordinary - equal).abs().mean() > 0.5
    assert (equal - three).abs().mean() > 0.5


@pytest.mark.parametrize("pair", [(3.0, None), (3.0, 3.0)])
def test_layers_beyond_the_targets_count(base: Base, factors: Factors, pair: tuple[float, float | None]) -> None:
    """As those of an imported LoRA, which a fit may begin at."""
    g = torch.Generator().manual_seed(1)
    m, n = base.unet.conv_in.weight.shape[:2]
    conv = {"unet.conv_in": (0.2 * torch.randn(1, 2, n, 3, 3, generator=g), torch.randn(1, m, 2, generator=g))}
    more = {**select(factors, 0), **conv}
    assert (drawn(base, more, 1, pair) - drawn(base, select(factors, 0), 1, pair)).abs().mean() > 1
    moments = torch.rand(1, 1, 2, *base.latent_shape, generator=g)
    lora = LoRAConfig(rank=2).build(Layout.of(base.targets()))
    losses: list[float] = []
    for under in (select(factors, 0), more):
        fit(base, lora, moments, FitConfig(steps=1, levels=2, rate=1e-3), under, progress=lambda _, x: losses.append(x))
    assert losses[0] != losses[1]


def test_without_a_person_guidance_is_ordinary(base: Base) -> None:
    assert torch.equal(drawn(base, None, 2, (3.0, None)), drawn(base, None, 2, (3.0, 5.0)))
