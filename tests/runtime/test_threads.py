"""As many threads as cores are free, and no others than the user's where the user has said how many."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
import torch

from hyperdb.runtime import threads
from hyperdb.runtime.threads import Watch, spared

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that lets the others on a machine of four cores work so many seconds a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    for name in threads.USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "SHORTEST", 0.0)

    def others(work: float) -> Watch:
        readings = iter([(10.0, 7.0), (12.0, 7.0 + 2 * work)])
        monkeypatch.setattr(threads, "_read", lambda: next(readings))
        return Watch()

    yield others
    torch.set_num_threads(before)


@pytest.mark.parametrize(("work", "few"), [(0, 4), (0.4, 4), (-0.2, 4), (1.2, 3), (2, 2), (4, 1), (9, 1)])
def test_threads_are_the_free_cores(machine, work, few, capsys):
    with spared(machine(work), CPU):
        assert torch.get_num_threads() == few
    assert torch.get_num_threads() == 4
    assert capsys.readouterr().out.count("\n") == (few < 4)


def test_where_all_cores_are_free_the_number_is_not_even_set_again(machine, monkeypatch):
    watch = machine(0.2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail(f"set to {count}"))
    with spared(watch, CPU):
        assert torch.get_num_threads() == 4
    monkeypatch.undo()


def test_nobody_is_overruled(machine, monkeypatch):
    torch.set_num_threads(2)  # whoever asks for few gets no more
    with spared(machine(0), CPU):
        assert torch.get_num_threads() == 2
    with spared(machine(4), torch.device("cuda")):
        assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with spared(machine(4), CPU):
        assert torch.get_num_threads() == 2


def test_others_are_seen_and_oneself_is_not(monkeypatch):
    """With every core taken by another program there is less free than when we work ourselves."""
    monkeypatch.setattr(threads, "SHORTEST", 1.0)
    monkeypatch.setattr(threads.os, "nice", lambda _: 19)  # the other program runs as politely as the tests do
    cores = len(threads._cores())

    def free() -> float:
        watch, end = Watch(), time.monotonic() + 1
        while time.monotonic() < end:
            pass
        return watch.free()

    quiet = free()
    loop = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(cores)]
    try:
        time.sleep(0.5)
        busy = free()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert busy < 0.5 * cores + 0.3
    if psutil.getloadavg()[0] < 0.3 * cores:  # else the tests are not alone here
        assert quiet > cores - 0.5
