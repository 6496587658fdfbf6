"""In which precision networks run."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hyperdb.runtime.errors import UserError


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device multiplies bf16 in hardware; one that is not here is taken to."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16() if device.type == "cpu" else True


def emulated(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether `dtype` is bf16 and the device a CPU or a card that only emulates it; float32 is used there instead."""
    return dtype is torch.bfloat16 and not has_bf16(device)


def resting(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of frozen weights between passes: `dtype`, but where it is emulated, or on a CPU, float32."""
    return torch.float32 if torch.device(device).type == "cpu" or emulated(device, dtype) else dtype


def attention(fused: bool) -> Any:
    """Return the context in which PyTorch's attention may be fused, or is not.

    The backward pass of the fused one is slow in bf16 on a CPU at small sizes.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    every = list(SDPBackend.__members__.values())[1:]  # the first stands for an error
    return sdpa_kernel(every if fused else [SDPBackend.MATH])


def autocast(device: torch.device | str, dtype: torch.dtype) -> Any:
    """Return the context in which matrix products and convolutions run in `dtype`.

    bf16 on a CPU that only emulates it is float32: a convolution would take hundreds of times as long. So it is on a
    card, with a notice; on a CPU that is the rule, and `hyperdb doctor` says it.
    """
    kind = torch.device(device).type
    if (slow := emulated(device, dtype)) and kind != "cpu":
        warnings.warn(f"this {kind} device has no bf16: computing in float32, in twice the memory", stacklevel=1)
    return nullcontext() if slow or dtype is torch.float32 else torch.autocast(kind, dtype)


def narrowed(what: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in the dtype of a file. Raises `UserError`, which calls them `what`, for such as are beyond it."""
    ready = numbers.to(dtype)
    if not ready.isfinite().all():
        raise UserError(f"{what} has numbers too large for {dtype}; export in fp32")
    return ready
