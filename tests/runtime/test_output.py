"""The folder of a run: what may be replaced in it, and what is found out before the work."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from hyperdb.runtime import lock, output
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_json, save_tensors
from hyperdb.runtime.output import RECORD, check, claim, is_free, release

WRITES = ["report.json", "faces/*.png", "[[]a].safetensors"]


def _written(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_the_same_run_goes_on_and_another_is_refused(tmp_path):
    out = claim(tmp_path / "out", WRITES, {"seed": 0, "fit": {"rate": 1.0}})
    _written(out, "report.json", "faces/a.png", "[a].safetensors")
    assert claim(out, WRITES, {"seed": 0, "fit": {"rate": 1.0}}) == out
    with pytest.raises(UserError, match=r"with other fit\.rate, seed, which would be lost.*out=FOLDER"):
        claim(out, WRITES, {"seed": 1, "fit": {"rate": 2.0}})
    claim(out, ["other.json"], {"seed": 1})  # nothing of that name is there
    assert claim(out, WRITES, {"seed": 0, "fit": {"rate": 1.0}}) == out


@pytest.mark.parametrize("name", ["report.json", "faces/mine.png", "[a].safetensors", "faces"])
def test_files_of_nobody_known_are_never_replaced(tmp_path, name):
    _written(tmp_path, "unrelated.txt", name)
    for refuse in (lambda: check(tmp_path, WRITES), lambda: claim(tmp_path, WRITES, {})):
        with pytest.raises(UserError, match="would be replaced") as caught:
            refuse()
        assert name in str(caught.value)
        assert "out=" in str(caught.value)
    assert not (tmp_path / RECORD).exists()


def test_a_run_that_left_nothing_binds_nobody(tmp_path):
    out = claim(tmp_path / "out", WRITES, {"seed": 0})
    claim(out, WRITES, {"seed": 1})
    release(out)
    assert not out.exists()
    claim(out, WRITES, {"seed": 0})
    _written(out, "report.json")
    release(out)
    with pytest.raises(UserError):
        claim(out, WRITES, {"seed": 1})


def test_files_that_say_what_made_them_need_no_record(tmp_path):
    _written(tmp_path, "report.json")
    save_tensors(tmp_path / "checkpoint.safetensors", {}, {"step": "3", "config": "{}"})
    check(tmp_path, ["checkpoint.safetensors", "report.json"])
    save_tensors(tmp_path / "checkpoint.safetensors", {}, {"made": "elsewhere"})
    with pytest.raises(UserError):
        check(tmp_path, ["checkpoint.safetensors", "report.json"])


def test_is_free(tmp_path):
    assert is_free(tmp_path / "out", "README.md", {})
    _written(tmp_path, "README.md")
    assert not is_free(tmp_path, "README.md", {})
    (tmp_path / "README.md").unlink()
    claim(tmp_path, ["README.md"], {"a": 1})
    _written(tmp_path, "README.md")
    assert is_free(tmp_path, "README.md", {"a": 1})
    assert not is_free(tmp_path, "README.md", {"a": 2})


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below", "", " ", "/proc/out", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be(in_tmp, out):
    (in_tmp / "file").touch()
    with pytest.raises(UserError, match="out"):
        check(out)
    assert [p.name for p in in_tmp.iterdir()] == ["file"]


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(UserError, match=r"1\.0 MB left"):
        check(tmp_path)


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot be written .Permission denied."):
        check(tmp_path)


def test_whoever_sweeps_the_folder_takes_nothing_from_a_check(tmp_path, monkeypatch):
    """A job that finds nobody's lock removes what is half written, while another looks whether it can write."""
    opened = output.tempfile.TemporaryFile

    def swept(**how):
        file = opened(**how)
        lock._sweep(tmp_path, 2**63)
        return file

    monkeypatch.setattr(output.tempfile, "TemporaryFile", swept)
    check(tmp_path)


def test_a_damaged_record(tmp_path):
    save_json(tmp_path / RECORD, [1])
    with pytest.raises(UserError, match="is damaged"):
        check(tmp_path, WRITES)
