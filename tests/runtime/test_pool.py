"""Work divided among processes: all of it is done, what goes wrong is said, and nobody waits for who was killed."""

from __future__ import annotations

import os
import signal

import pytest

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.pool import each


def square(number):
    if number == 3:
        raise UserError("three is refused")
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
    return number * number, os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_task_is_done_once_by_processes_of_one_thread(workers):
    assert sorted(each(square, [0, 1, 2, 5], workers)) == [(0, (0, "1")), (1, (1, "1")), (2, (4, "1")), (3, (25, "1"))]


def test_what_goes_wrong_is_said():
    with pytest.raises(UserError, match="three is refused"):
        list(each(square, [1, 3, 2], 2))
    with pytest.raises(UserError, match="one of 2 processes was killed, perhaps for want of memory: set workers=1"):
        list(each(square, [1, 4, 2], 2))
