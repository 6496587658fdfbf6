"""Which rows a guidance needs, how it weighs them, and the prompt without the person."""

from __future__ import annotations

import pytest
import torch

from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.guidance import Guidance, without_subject
from hyperdb.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "subject", "blocks", "plain"),
    [
        (3.0, None, "up", 0),
        (1.0, None, "p", 0),
        (3.0, 3.0, "up", 1),
        (3.0, 4.0, "ubp", 2),
        (1.0, 3.0, "bp", 1),
        (1.0, 1.0, "p", 0),
        (0.0, 0.0, "up", 1),
    ],
)
def test_weighs_the_blocks_that_it_needs(text: float, subject: float | None, blocks: str, plain: int) -> None:
    guide = Guidance(text, subject)
    assert "".join(guide.blocks) == blocks
    assert (guide.plain, guide.adapted) == (plain, len(blocks) - plain)
    rows = dict(zip("ubp", torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), strict=True))
    u, b, p = rows.values()
    expected = u + text * (p - u) if subject is None else u + text * (b - u) + subject * (p - b)
    torch.testing.assert_close(guide.combine(torch.cat([rows[k] for k in blocks])), expected)


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a [V] face", "a face"),
        ("a sks face", "a face"),
        ("A [V] old man", "An old man"),
        ("an [V] face", "a face"),
        ("a pencil sketch of a [V] face, smiling", "a pencil sketch of a face, smiling"),
        ("a photo of [V]", "a photo of a face"),
        ("a photo of [V], smiling", "a photo of a face, smiling"),
        ("[V] at the beach", "a face at the beach"),
        ("[V] wearing a hat", "a face wearing a hat"),
        ("a [V] smiling face", "a smiling face"),
        ("a smiling [V] on the beach", "a smiling face on the beach"),
        ("photo of [V] woman", "photo of woman"),
        ("an old [V] man", "an old man"),
        ("the [V] dog and a [V] cat", "the dog and a cat"),
        ("a [V]", "a face"),
        ("[V]", "a face"),
        ("portrait of (sks)", "portrait of (a face)"),
        ("a face in masks", "a face in masks"),
        ("an apple", "an apple"),
        ("", ""),
    ],
)
def test_the_prompt_without_the_person(prompt: str, plain: str) -> None:
    assert DiffusionConfig().plain_prompt(prompt) == plain


def test_the_prompt_without_the_person_in_other_words() -> None:
    config = DiffusionConfig(rare_token="ohwx tok", class_word="owl")
    assert config.plain_prompt(config.instance_prompt) == "an owl"
    assert config.plain_prompt("a photo of ohwx tok") == "a photo of an owl"
    assert without_subject("a c++ face", ["c++"], "face") == "a face"


@pytest.mark.parametrize("wrong", [{"guidance": float("nan")}, {"subject_guidance": float("inf")}])
def test_only_finite_numbers(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        DiffusionConfig(**wrong)
