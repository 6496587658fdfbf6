"""bf16 where the hardware has it, float32 on a CPU that would emulate it."""

from __future__ import annotations

import pytest
import torch

from hyperdb.runtime import precision


@pytest.mark.parametrize(
    ("hardware", "dtype", "expected"),
    [
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.bfloat16, torch.float32),
        (True, torch.float32, torch.float32),
    ],
)
def test_products_are_in_bf16_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, hardware: bool, dtype: torch.dtype, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: hardware)
    with precision.autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is expected


def test_a_graphics_card_is_asked_for_bf16_whatever_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *what: asked.append(what))
    precision.autocast("cuda:0", torch.bfloat16)
    assert asked == [("cuda", torch.bfloat16)]
