"""Rows on the disk that are read when they are asked for, and what can be said of them without holding them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PART = 64  # rows in memory at once where all are gone through


def part_of(ends: Sequence[int], row: int) -> tuple[int, int]:
    """Return in which of several parts a row lies, and where in it; `ends` are the rows up to each part's end."""
    part = bisect_right(ends, row)
    return part, row - (ends[part - 1] if part else 0)


class Lazy(ABC):
    """A tensor of the given `shape`, of which only those rows are in memory that were just asked for.

    It is indexed as a tensor is: by a number, a slice, a list, a mask, or a tensor of row numbers of any shape.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, rows: list[int]) -> Tensor:
        """Return these rows, `[len(rows), *shape[1:]]`."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        index = torch.arange(len(self))[rows]
        return self.read(index.flatten().tolist()).view(*index.shape, *self.shape[1:])

    def part(self, rows: Tensor) -> Lazy:
        """Return the rows `[k]` as another such tensor."""
        return _Part(self, rows.tolist())

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all rows in order, so many at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


class _Part(Lazy):
    def __init__(self, whole: Lazy, rows: list[int]) -> None:
        self.whole, self.rows = whole, rows
        self.shape = (len(rows), *whole.shape[1:])

    def read(self, rows: list[int]) -> Tensor:
        return self.whole.read([self.rows[row] for row in rows])


def mean_std(rows: Tensor | Lazy, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the first axis, float32; the sums are in float64 and made in parts."""
    count, nothing = len(rows), torch.zeros((), dtype=torch.float64)
    mean = sum((part.double().sum(0) for part in rows.split(PART)), nothing) / count
    square = sum(((part.double() - mean).square().sum(0) for part in rows.split(PART)), nothing)
    return mean.float(), (square / (count - correction)).sqrt().float()
