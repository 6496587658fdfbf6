"""With how many threads PyTorch computes on a CPU that others use too.

Threads wait for each other after every operation. One more than there are free cores, and all wait for the one that has
none: 40 iterations of 5 seconds take 17 beside another program, where a single thread takes 7.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHORTEST = 0.1  # seconds that tell how busy a machine is; the system counts in hundredths
WORK = ("user", "system", "irq", "softirq", "steal", "interrupt", "dpc")  # by the names of all systems
USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # who sets these has chosen


def _cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _read() -> tuple[float, float]:
    """Return the time and how many seconds of it these cores have worked for other programs, from two beginnings.

    What gives way to us, running at a lower priority, does not count.
    """
    import psutil

    polite = hasattr(os, "nice") and os.nice(0) > 0
    kinds, allowed = WORK + ("nice",) * polite, _cores()
    each = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in allowed]
    worked = sum(getattr(times, kind, 0.0) for times in each for kind in kinds)
    return time.monotonic(), worked - time.process_time()


class Watch:
    """How many cores other programs leave free, from when this is made until it is asked, SHORTEST at least."""

    def __init__(self) -> None:
        self._began = _read()

    def free(self) -> float:
        """Return the mean number of free cores."""
        began, before = self._began
        time.sleep(max(0.0, began + SHORTEST - time.monotonic()))
        now, worked = _read()
        return len(_cores()) - max(0.0, worked - before) / (now - began)


@contextmanager
def spared(watch: Watch, device: torch.device) -> Iterator[None]:
    """Compute with no more threads than cores are free while the block runs, and say so if these are fewer than all.

    Nothing changes on a `device` other than a CPU, nor where the user has set OMP_NUM_THREADS or MKL_NUM_THREADS.
    """
    import torch

    every = torch.get_num_threads()
    if device.type != "cpu" or every == 1 or any(os.environ.get(name) for name in USERS):
        yield
        return
    few = min(every, max(1, round(watch.free())))
    if few == every:
        yield  # to set the number again, as it is, would take from MKL its own choice for small products
        return
    print(f"other programs are using the cores: {few} of {every} threads (OMP_NUM_THREADS={every} takes all)")
    torch.set_num_threads(few)
    try:
        yield
    finally:
        torch.set_num_threads(every)
