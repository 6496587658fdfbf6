"""In which precision networks run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def emulated(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether `dtype` is bf16 and the device a CPU that only emulates it; float32 is used there instead."""
    return dtype is torch.bfloat16 and torch.device(device).type == "cpu" and not cpu_has_bf16()


def attention(fused: bool) -> Any:
    """Return the context in which PyTorch's attention may be fused, or is not.

    The backward pass of the fused one is slow in bf16 on a CPU at small sizes.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    every = list(SDPBackend.__members__.values())[1:]  # the first stands for an error
    return sdpa_kernel(every if fused else [SDPBackend.MATH])


def autocast(device: torch.device | str, dtype: torch.dtype) -> Any:
    """Return the context in which matrix products and convolutions run in `dtype`.

    bf16 on a CPU that only emulates it is float32: a convolution would take hundreds of times as long.
    """
    exact = dtype is torch.float32 or emulated(device, dtype)
    return nullcontext() if exact else torch.autocast(torch.device(device).type, dtype)
