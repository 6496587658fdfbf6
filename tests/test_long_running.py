"""A process that personalises one person after another needs no more memory for the last than for those before.

python -m pytest -m slow tests/test_long_running.py --people 300 --whole-people 20
"""

from __future__ import annotations

import ctypes
import gc
import sys

import numpy as np
import psutil
import pytest

import hyperdb
from hyperdb.heads import Identity, View, render

LEAST = 8  # people after the first ones, or growth and noise are one


def growth(series: list[int]) -> float:
    """Return the median of the slopes between all pairs (Theil and Sen), which a few outliers do not move."""
    y, x = np.array(series, float), np.arange(len(series))
    i, j = np.triu_indices(len(series), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def resident() -> int:
    """Return the bytes of this process in memory, without what the C library keeps of freed ones."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def test_growth_is_the_slope():
    noise = [3, -2, 0, 5, -4, 1, 0, 90, -3, 2]
    assert growth([1000 + 7 * k + n // 5 for k, n in enumerate(noise)]) == pytest.approx(7, abs=0.5)
    assert growth([1000 + n for n in noise]) == pytest.approx(0, abs=0.5)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("option", "words"), [("--people", ["finetune.steps=2"]), ("--whole-people", [])])
def test_memory_does_not_grow_with_people(option, words, request, tmp_path):
    """What is written of a person is the least that could leak of them: half of it a person would be seen."""
    count = request.config.getoption(option)
    warm = max(3, count // 5)
    if count - warm < LEAST:
        pytest.skip(f"{option} {count}: at least {LEAST} people after the first {warm} tell growth from noise")
    model = hyperdb.load("embedded", *words)
    photos = [render(Identity(1_100_003 + k), View(), size=256) for k in range(min(count, 20))]
    found = []
    for person in range(count):
        path = model.personalize(photos[person % len(photos)]).save(tmp_path / "adapter.safetensors")
        found.append(resident())
    size = path.stat().st_size
    print(f"{count} people: {growth(found[warm:]):+,.0f} bytes each after the first {warm}, of {size:,} in a file")
    assert growth(found[warm:]) < size / 2
