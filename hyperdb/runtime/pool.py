"""Work divided among processes of this machine, by whatever can be sent to one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hyperdb.runtime.errors import UserError


def each(make: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """Yield the number of each task and what `make` returns for it, whichever is done first.

    Every process has one thread. Raises what `make` raises, and `UserError` if the system killed a process, as it does
    when memory is short. Whoever stops early, or is interrupted, stops the processes too.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _quiet)
    stopped = True
    try:
        number = {pool.submit(make, task): i for i, task in enumerate(tasks)}
        for future in as_completed(number):
            yield number[future], future.result()
        stopped = False
    except BrokenProcessPool as error:
        raise UserError(f"one of {workers} processes was killed, perhaps for want of memory: set workers=1") from error
    except Exception:
        stopped = False  # the others end what they have begun, and leave nothing half-written
        raise
    finally:
        if stopped:
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _quiet() -> None:
    """Keep the maths libraries to one thread, before they are imported, and leave Ctrl-C to the process that began."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
