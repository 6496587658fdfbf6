"""bf16 where the hardware has it, float32 on a CPU that would emulate it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime import precision
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.memory import Sketch


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


def test_a_card_without_bf16_computes_in_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda card: nullcontext())
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *what: asked.append(what))
    with pytest.warns(UserWarning, match="this cuda device has no bf16: computing in float32"):
        precision.autocast("cuda:0", torch.bfloat16)
    assert asked == []
    precision.autocast("cuda", torch.float16)
    assert asked == [("cuda", torch.float16)]
    assert precision.resting("cuda", torch.bfloat16) is torch.float32
    assert precision.resting("cuda", torch.float16) is torch.float16
    assert precision.resting("mps", torch.bfloat16) is torch.bfloat16


def test_weights_rest_in_float32_where_bf16_is_emulated(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    settings = DiffusionConfig(path=str(tiny_base), size=32, dtype="bf16")
    sketch = Sketch(SimpleNamespace(diffusion=settings), "cuda")
    assert next(sketch.base.unet.parameters()).dtype is torch.float32
    with sketch.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_numbers_beyond_the_dtype_of_a_file_are_refused_under_their_name() -> None:
    numbers = torch.tensor([0.1, 60_000.0])
    assert torch.equal(precision.narrowed("x", numbers, torch.float16), numbers.half())
    with pytest.raises(UserError, match=r"^to_k has numbers too large for torch\.float16; export in fp32$"):
        precision.narrowed("to_k", 2 * numbers, torch.float16)
