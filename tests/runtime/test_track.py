"""What a run tells a tracker is read back from the files that the tracker wrote, without a network."""

from __future__ import annotations

import json
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from hyperdb.runtime import track as tracks
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.track import TRACKERS, Track, check_tracker, tracked

BLOCK = 2**15  # of a wandb file, whose records are packed as LevelDB packs its log


@dataclass
class Config:
    tracker: str | None
    out: str
    name: str = "me"
    rate: float = 0.5


@tracked
def run(config: Config, track: Track) -> Path:
    out = Path(config.out)
    Image.new("RGB", (6, 4), "red").save(out / "sheet.png")
    for step in (1, 2):
        track.log(step, {"loss": 3.0 / step, "rate/0": config.rate})
    track.picture(2, "sheet", out / "sheet.png")
    return out


def wandb_records(out):
    """Return what a run told wandb."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service has written everything then
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<4xHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def read_wandb(out):
    """Return {step: values}, the settings, and how many pictures there are."""
    steps: dict[int, dict] = {}
    settings = {}
    for record in wandb_records(out):
        for item in (*record.config.update, *record.run.config.update):
            settings[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if values:
            steps.setdefault(int(values["_step"]), {}).update(values)
    return steps, settings, len(list(out.glob("wandb/offline-run-*/files/media/images/*.png")))


def read_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "tensorboard")).Reload()
    steps: dict[int, dict] = {}
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            steps.setdefault(event.step, {})[name] = event.value
    (told,) = found.Tensors("config/text_summary")
    settings = json.loads(told.tensor_proto.string_val[0].decode().strip("`\n"))
    return steps, settings, sum(len(found.Images(name)) for name in found.Tags()["images"])


def read_trackio(out):
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("hyperdb")
    steps: dict[int, dict] = {}
    for values in SQLiteStorage.get_logs("hyperdb", name):
        steps.setdefault(values["step"], {}).update(values)
    pictures = sum(isinstance(v, dict) for values in steps.values() for v in values.values())
    return steps, SQLiteStorage.get_run_config("hyperdb", name), pictures


@pytest.mark.filterwarnings("ignore")  # of the trackers' own libraries
@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_offline_run_holds_what_was_told(tracker, in_tmp, monkeypatch):
    pytest.importorskip(tracker)
    monkeypatch.delenv("WANDB_MODE")  # that the tests set: without a key it is offline by itself
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(in_tmp))
    if tracker == "trackio":
        from trackio import sqlite_storage, utils

        for module in (sqlite_storage, utils):
            monkeypatch.setattr(module, "TRACKIO_DIR", in_tmp / "trackio")
    run(Config(tracker, str(in_tmp)))
    steps, settings, pictures = globals()[f"read_{tracker}"](in_tmp)
    assert {step: values["loss"] for step, values in steps.items() if "loss" in values} == {1: 3.0, 2: 1.5}
    assert steps[1]["rate/0"] == 0.5
    assert settings["stage"] == "test_track"
    assert settings["rate"] == 0.5
    assert settings["commit"] == provenance()["commit"]
    assert pictures == 1


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_goes_on_goes_on_with_its_run_of_wandb(in_tmp):
    wandb = pytest.importorskip("wandb")

    def last() -> str:
        run(Config("wandb", str(in_tmp)))
        wandb.teardown()
        newest = max(in_tmp.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
        return newest.name.split("-")[3]

    first, anew = last(), last()
    (in_tmp / "checkpoint.safetensors").touch()
    assert first != anew
    assert last() == anew


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [None, UserError("the loss is nan"), KeyboardInterrupt()])
def test_wandb_is_told_whether_a_run_failed(in_tmp, error):
    pytest.importorskip("wandb")

    @tracked
    def begin(config: Config, track: Track) -> Path:
        track.log(1, {"loss": 3.0})
        if error is not None:
            raise error
        return Path(config.out)

    with nullcontext() if error is None else pytest.raises(type(error)):
        begin(Config("wandb", str(in_tmp)))
    (code,) = [record.exit.exit_code for record in wandb_records(in_tmp) if record.HasField("exit")]
    assert code == (error is not None)


def test_without_a_tracker_nothing_is_written(in_tmp):
    run(Config(None, str(in_tmp)))
    assert [path.name for path in in_tmp.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("tracker", TRACKERS[:2])
def test_a_run_that_told_nothing_leaves_nothing(tracker, in_tmp):
    @tracked
    def fail(config: Config, track: Track) -> Path:
        raise UserError("no photos")

    with pytest.raises(UserError):
        fail(Config(tracker, str(in_tmp)))
    assert list(in_tmp.iterdir()) == []


def test_a_key_is_found_where_wandb_looks(in_tmp, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not tracks._has_key()
    (in_tmp / ".netrc").write_text("machine api.wandb.ai login user password none\n")
    (in_tmp / ".netrc").chmod(0o600)
    assert tracks._has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.elsewhere.org")
    assert not tracks._has_key()
    monkeypatch.setenv("WANDB_API_KEY", "none")
    assert tracks._has_key()


def test_trackers_are_checked(monkeypatch):
    check_tracker(None)
    with pytest.raises(UserError, match="clipboard"):
        check_tracker("clipboard")
    monkeypatch.setattr(tracks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[trackio\]'"):
        check_tracker("trackio")
