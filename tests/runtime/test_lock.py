"""Two runs never write into one folder at once, and one that died stops nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hyperdb.runtime import lock
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.lock import jobs, writing_into
from hyperdb.runtime.output import claim

HOLD = """
import sys, time
from hyperdb.runtime.lock import writing_into
with writing_into(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_run_is_told_of_the_first_until_that_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        told = rf"out is being written by process {first.pid} on .*out=FOLDER"
        with pytest.raises(UserError, match=told), writing_into(tmp_path / "out"):
            pass
        assert [(job.pid, job.running) for job in jobs(tmp_path / "out")] == [(first.pid, True)]
        first.send_signal(signal.SIGKILL)
    assert [(job.pid, job.running) for job in jobs(tmp_path / "out")] == [(first.pid, False)]
    with writing_into(tmp_path / "out"):
        assert [(job.pid, job.running) for job in jobs(tmp_path / "out")] == [(os.getpid(), True)]
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_go_together_and_the_whole_alone(tmp_path):
    with writing_into(tmp_path, "0of2"), writing_into(tmp_path, "1of2"):
        assert [str(job).partition(", ")[2] for job in jobs(tmp_path)] == ["shard 0 of 2", "shard 1 of 2"]
        for part in ("", "1of2"):
            with pytest.raises(UserError, match=r"shard [01] of 2; wait"), writing_into(tmp_path, part):
                pass
        assert len(jobs(tmp_path)) == 2
    with writing_into(tmp_path), pytest.raises(UserError, match="being written"), writing_into(tmp_path, "1of2"):
        pass
    assert list(tmp_path.iterdir()) == []


def _fail(out: Path, begin: bool) -> None:
    with writing_into(out):
        if begin:
            claim(out, ["x"], {})
        raise RuntimeError


def test_who_failed_while_writing_is_told(tmp_path):
    for begin, told in ((False, []), (True, [False])):
        with pytest.raises(RuntimeError):
            _fail(tmp_path / "far" / "out", begin)
        assert [job.running for job in jobs(tmp_path / "far" / "out")] == told
        assert (tmp_path / "far").exists() == begin
    with writing_into(tmp_path / "far" / "out"):
        pass
    assert jobs(tmp_path / "far" / "out") == []


@pytest.mark.parametrize("broken", [None, OSError(95, "Operation not supported")])
def test_a_disk_or_system_without_locks_stops_nobody(tmp_path, monkeypatch, broken):
    def refuse(*_):
        raise broken

    if broken is None:
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with writing_into(tmp_path), writing_into(tmp_path):
        assert [job.running for job in jobs(tmp_path)] == [None]
