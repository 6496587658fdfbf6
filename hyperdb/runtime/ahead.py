"""The batch of the next step, made while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Call `make(step, ...)`, which depends on nothing but its arguments, one step ahead in a thread of its own."""

    def __init__(self, make: Callable[..., T]) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[tuple[int, ...], Future[T]] | None = None

    def __call__(self, step: int, *rest: int) -> T:
        """Return what `make` makes of these arguments."""
        there = self._next if self._next is not None and self._next[0] == (step, *rest) else None
        made = there[1].result() if there is not None else self._thread.submit(self.make, step, *rest).result()
        after = (step + 1, *rest)
        self._next = after, self._thread.submit(self.make, *after)
        return made
