"""Long work for visitors: who is next, and what is told of it meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from hyperdb.runtime.errors import UserError

Thing = TypeVar("Thing")
Event = TypeVar("Event")
Result = TypeVar("Result")
LOOK = 0.2  # seconds between two looks at the line of those who wait


class Left(Exception):
    """Nobody waits for this work any more: the visitor has left."""


class Line(Generic[Thing]):
    """Things that serve one visitor each at a time, and the visitors in line for them: first come, first served."""

    def __init__(self, things: Sequence[Thing], most: int) -> None:
        self._free, self._most = list(things), most
        self._waiting: list[object] = []
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, before: Callable[[int], object]) -> Iterator[Thing]:
        """Wait for one of the things and lend it; `before` is told again and again how many are in front.

        What `before` raises ends the waiting. Raises `UserError` where `most` wait already.
        """
        me = object()
        with self._changed:
            if len(self._waiting) >= self._most + len(self._free):
                raise UserError(f"{len(self._waiting)} people are waiting already; try again in a few minutes")
            self._waiting.append(me)
        try:
            while True:
                with self._changed:
                    place = self._waiting.index(me)
                    if place < len(self._free):
                        thing = self._free.pop()
                        break
                    ahead = place - len(self._free)
                    self._changed.wait(LOOK)
                before(ahead)
        finally:
            with self._changed:
                self._waiting.remove(me)
                self._changed.notify_all()
        try:
            yield thing
        finally:
            with self._changed:
                self._free.append(thing)
                self._changed.notify_all()


def follow(work: Callable[[Callable[[Event], None]], Result]) -> Generator[Event, None, Result]:
    """Run `work(report)` in a thread of its own, yield what is new of what it reports, and return what it returns.

    What it raises is raised here. Once this generator is closed, the next report raises `Left` in the work.
    """
    told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    left = threading.Event()

    def report(event: Event) -> None:
        if left.is_set():
            raise Left
        told.put(("event", event))

    def run() -> None:
        try:
            told.put(("result", work(report)))
        except BaseException as error:  # all of it is raised where the work is waited for
            told.put(("error", error))

    threading.Thread(target=run, daemon=True).start()
    try:
        last: object = None
        while True:
            kind, what = told.get()
            while kind == "event" and not told.empty():  # a slow page is told the newest alone
                kind, what = told.get()
            if kind == "result":
                return what
            if kind == "error":
                raise what
            if what != last:
                yield what
            last = what
    finally:
        left.set()
