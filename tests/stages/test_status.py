"""What files say of a run: the counts of each kind are asserted where those runs are made, here the rest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from hyperdb import cli, config
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_tensors
from hyperdb.runtime.journal import Journal
from hyperdb.runtime.lock import writing_into
from hyperdb.runtime.output import claim
from hyperdb.stages.status import _lasting, examine, pace


def test_a_training_that_runs(tmp_path, capsys, monkeypatch):
    out = claim(tmp_path / "a" / "run", ["checkpoint.safetensors", "journal.jsonl"], {"steps": 500})
    save_tensors(out / "checkpoint.safetensors", {}, {"step": "50", "config": "{}"})
    with Journal(out / "journal.jsonl", 500) as journal, writing_into(out):
        for step in range(1, 151):
            monkeypatch.setattr(journal, "_began", journal._began - 2)  # each takes two seconds
            journal.step(step, 1.0)
        assert cli.main(["status", f"run={tmp_path}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(out)
    assert "150 of 500 done, 350 missing, 2 seconds a step, 11.7 minutes to go; checkpoint at step 50" in said[1]
    assert said[2].endswith("1 running, 0 failed")
    assert f"running: process {os.getpid()} on " in said[3]
    assert re.search(r" \d seconds ago$", said[4])


def test_the_pace_is_that_of_the_run_that_goes_on():
    def records(*pairs):
        return [{"step": step, "seconds": seconds} for step, seconds in pairs]

    assert pace([]) is None
    assert pace(records((50, 100.0))) == 2
    assert pace(records((50, 100.0), (100, 200.0), (100, 210.0))) == pytest.approx(2.2)
    assert pace(records((50, 100.0), (100, 200.0), (150, 30.0))) is None  # where it began is not told
    assert pace(records((50, 100.0), (100, 200.0), (150, 30.0), (200, 55.0))) == 0.5
    assert [_lasting(x) for x in (119, 120, 7200, 3e5)] == ["119 seconds", "2.0 minutes", "2.0 hours", "3.5 days"]


def test_other_runs_and_none(tmp_path, capsys):
    for words in (["run=[]"], [f"run={tmp_path}"], [f"run={tmp_path / 'nowhere'}"]):
        with pytest.raises(UserError, match="run="):
            config.run("status", words)
    out = claim(tmp_path / "generate", ["*.png"], {})
    (out / "a.png").touch()
    config.run("status", [f"run={out}"])
    assert f"{'files':20} 1 done\n" in capsys.readouterr().out


def test_it_loads_no_torch(tmp_path):
    out = claim(tmp_path, ["checkpoint.safetensors"], {"steps": 3})
    save_tensors(out / "checkpoint.safetensors", {}, {"step": "2"})
    code = f"import sys, hyperdb.cli as c; c.main(['status', 'run={out}']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "2 of 3 done, 1 missing; checkpoint at step 2" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_people_are_counted_by_their_files(rendered, tmp_path):
    folder = shutil.copytree(rendered, tmp_path / "heads")
    assert examine(folder)[0] == f"{'files of people':20} 2 of 2 done, 0 missing; the index is written"
    next(folder.glob("data-*.arrow")).unlink()
    (folder / "index.json").unlink()
    assert examine(folder)[0] == f"{'files of people':20} 1 of 2 done, 1 missing; there is no index yet"
