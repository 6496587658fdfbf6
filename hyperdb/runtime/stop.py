"""Signals that ask a run to end: SIGINT, which Ctrl-C sends, and SIGTERM, which a cluster sends before time is up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], object]


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the run ends as with Ctrl-C, and the command with the code 143."""


def _end(number: int, _: FrameType | None) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other can handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled if handled is not None else signal.SIG_DFL)


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, and SIGINT `KeyboardInterrupt`, while the block runs."""
    with _handling(_end):
        yield


@contextmanager
def waiting() -> Iterator[list[int]]:
    """Put off both signals while the block runs, in a list of those that came; a second SIGINT is not put off."""
    came: list[int] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and came:
            _end(number, frame)
        came.append(number)
        # not `print`: the signal may have come while something was being printed
        os.write(2, b"\nstopping at the end of this step; Ctrl-C stops at once\n")

    with _handling(put_off):
        yield came
