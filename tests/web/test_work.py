"""Who is next, and what is told of a work that goes on."""

from __future__ import annotations

import threading
import time

import pytest

from hyperdb.runtime.errors import UserError
from hyperdb.web.work import Left, Line, follow


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_first_come_first_served():
    line, order, told = Line(["model"], 20), [], {}

    def visit(number):
        with line.turn(lambda ahead: told.setdefault(number, []).append(ahead)):
            order.append(number)
            time.sleep(0.02)

    with line.turn(lambda ahead: None):
        visitors = []
        for number in range(8):
            visitors.append(threading.Thread(target=visit, args=(number,)))
            visitors[-1].start()
            wait_for(lambda number=number: number in told)
    for visitor in visitors:
        visitor.join()
    assert order == list(range(8))
    assert [told[number][0] for number in range(8)] == list(range(8))  # so many were in front
    assert all(seen == sorted(seen, reverse=True) for seen in told.values())


def test_as_many_at_once_as_there_are_models():
    line, now, most = Line(["a", "b"], 20), [], []

    def visit():
        with line.turn(lambda ahead: None) as model:
            now.append(model)
            most.append(len(now))
            assert len(set(now)) == len(now)
            time.sleep(0.02)
            now.remove(model)

    visitors = [threading.Thread(target=visit) for _ in range(6)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert (len(most), max(most)) == (6, 2)


def test_the_line_is_bounded_and_who_leaves_frees_a_place():
    line, left = Line(["model"], 1), []

    def impatient(ahead):
        raise Left

    def stay(ahead):
        left.append(ahead)

    with line.turn(lambda ahead: None):
        with pytest.raises(Left), line.turn(impatient):
            raise AssertionError("it was not free")
        waiting = threading.Thread(target=lambda: line.turn(stay).__enter__())
        waiting.start()
        wait_for(lambda: left)
        with pytest.raises(UserError, match="1 people are waiting already"), line.turn(lambda ahead: None):
            raise AssertionError("the line was full")
    waiting.join()


def test_a_work_is_followed_to_its_result():
    def work(report):
        for step in (0, 0, 1, 2):
            report(step)
            time.sleep(0.05)
        return "made"

    steps, result = [], None

    def through():
        nonlocal result
        result = yield from follow(work)

    steps = list(through())
    assert (steps, result) == ([0, 1, 2], "made")


def test_an_error_of_the_work_is_raised_where_it_is_waited_for():
    def work(report):
        raise UserError("too bad")

    with pytest.raises(UserError, match="too bad"):
        list(follow(work))


def test_a_work_that_nobody_follows_stops():
    stopped = threading.Event()

    def work(report):
        try:
            while True:
                report(0)
                time.sleep(0.01)
        except Left:
            stopped.set()

    steps = follow(work)
    next(steps)
    steps.close()
    assert stopped.wait(10)
