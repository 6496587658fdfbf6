"""Random numbers from (seed, *keys), never from a global generator.

Every stream is named, so the n-th draw of a stage does not depend on what ran before it:
a resumed training sees the same batches, and a rebuilt basis never disturbs the noise.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed that depends on `seed` and on every key, the same on every platform."""
    text = repr((int(seed), *keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a private `torch.Generator` for the stream named by `keys`.

    A stream of the CPU is the same everywhere. One of another `device` is that kind of device's own; it is for large
    draws, which the CPU would make slower than the device uses them.
    """
    import torch

    return torch.Generator(device).manual_seed(derive(seed, *keys))


def numpy_rng(seed: int, *keys: int | str) -> np.random.Generator:
    """Return a private numpy generator for the stream named by `keys`."""
    import numpy as np

    return np.random.default_rng(derive(seed, *keys))


def split_of(identity: str, seed: int = 0) -> str:
    """Return train, validation or test (90 / 5 / 5 %), by a hash of the identity alone."""
    share = derive(seed, "split", identity) % 100
    return "train" if share < 90 else "validation" if share < 95 else "test"
