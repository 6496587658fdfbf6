"""Runs that are killed, or meet a full or failing disk, and are started again end where an undisturbed one does.

python benchmarks/kills.py kills the stages more often, and keeps when.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from hyperdb import cli
from hyperdb.data.fits import shard_path
from hyperdb.runtime.cache import kept
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import TEMPORARY, atomic, load_tensors, save_json, save_tensors, whole
from hyperdb.runtime.journal import Journal, read
from hyperdb.runtime.lock import writing_into

# a run begins in a copy of a process that has these, in no time
WARM = ["torch", "accelerate", "cv2", "timm", "diffusers.pipelines.stable_diffusion", "hyperdb.cli",
        "hyperdb.diffusion.base", "hyperdb.hypernet.model", "hyperdb.formats.native", "hyperdb.metrics.figures",
        "hyperdb.tuning.validation", "hyperdb.faces.align"]  # fmt: skip
TINY = ["diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "prior.images=2", "prior.levels=2",
        "adapter.a=12", "adapter.b=8"]  # fmt: skip
STAGES = ("render_heads", "preprocess", "precompute", "train_hypernet", "personalize", "evaluate")


def _command(words: list[str], folder: str, limit: int | None) -> None:
    """Run a command in a folder, its output into `log`; no file may have more bytes than `limit`."""
    os.chdir(folder)
    os.environ["HYPERDB_CACHE"] = str(Path(folder) / "cache")  # what is kept there is killed, too
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(cli.main(words))


@pytest.fixture(scope="module")
def start():
    """Return a function that starts a command in a folder, which is made, and returns its process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)

    def begin(words: list[str], folder: Path, limit: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_command, args=(words, str(folder), limit))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def undisturbed(start, tiny_base, rendered, people, tmp_path_factory):
    """Return a function that returns a stage's words, the folder of an undisturbed run of it, and its seconds."""
    base, known = [f"diffusion.path={tiny_base}", *TINY], {}
    photos = tmp_path_factory.mktemp("photos")
    for i in range(5):
        Image.fromarray(skimage.data.astronaut()[:, i * 9 :]).save(photos / f"{i}.jpg")

    def words(stage: str) -> list[str]:
        hyper = lambda: f"hypernet={run('train_hypernet')[1] / 'out'}"  # noqa: E731
        return [stage, "out=out", *{
            "render_heads": lambda: ["identities=6", "views=3", "photo_views=2", "size=32", "shard=1", "workers=2"],
            "preprocess": lambda: [f"source={photos}", "size=64"],
            "precompute": lambda: [
                *base, f"data={rendered}", "identities=4", "batch=1", "fit.steps=4", "fit.levels=2", "fit.views=2",
                "average.steps=2", "average_people=2",
            ],
            "train_hypernet": lambda: [
                *base, f"data={rendered}", f"weights={run('precompute')[1] / 'out'}", "beta=0.1", "validation=null",
                "model.width=32", "model.heads=2", "model.iterations=1", "model.encoder.name=vit_tiny_patch16_224",
                "model.encoder.size=32", "model.encoder.patch=16", "model.encoder.depth=1",
                "model.encoder.weights=null", "batch=2", "prior_rows=1", "warmup=1", "levels=2", "steps=6",
                "save_every=1",
            ],
            "personalize": lambda: [
                *base, hyper(), f"image={photos / '0.jpg'}", "finetune.steps=6", "preview_styles=[a sketch of a [V]]",
            ],
            "evaluate": lambda: [
                *base, hyper(), f"data={people}", "people=3", "views=2", "images=2", "batch=2", "finetune.steps=3",
                "rows=[floor,hyper_only,hyper_40,lora,copy,ceiling]", "methods.lora.finetune.steps=3",
            ],
        }[stage]()]  # fmt: skip

    def run(stage: str) -> tuple[list[str], Path, float]:
        if stage not in known:
            asked, folder, began = words(stage), tmp_path_factory.mktemp(stage), time.monotonic()
            process = start(asked, folder)
            process.join()
            assert process.exitcode == 0, (folder / "log").read_text()
            known[stage] = asked, folder, time.monotonic() - began
        return known[stage]

    return run


def _untimed(value):
    """Return what JSON holds, without what tells the time, and the checkout, which may change from run to run."""
    if isinstance(value, dict):
        return {name: _untimed(x) for name, x in value.items() if name not in ("seconds", "commit", "dirty")}
    return [_untimed(x) for x in value] if isinstance(value, list) else value


def _holds(path: Path):
    """Return what is in a file, to the bit, but for seconds and, in a journal, what begins anew with every start."""
    if path.suffix == ".safetensors":
        tensors, _ = load_tensors(path)
        return {name: (str(x.dtype), list(x.shape), x.numpy().tobytes()) for name, x in tensors.items()}
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text()))
    if path.name == "journal.jsonl":
        return [record["step"] for record in read(path)]
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image).tobytes()
    return path.read_bytes()


def _same(one: Path, two: Path) -> None:
    """Assert that two runs left the same files, which hold the same, and nothing half-written."""
    files = [{p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()} for root in (one, two)]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert _holds(files[0][name]) == _holds(files[1][name]), f"{name} is not what an undisturbed run writes"


def _finish(start, words: list[str], folder: Path) -> None:
    process = start(words, folder)
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_an_undisturbed_one(stage, start, undisturbed, tmp_path, request, record_property):
    (words, reference, seconds), kills = undisturbed(stage), request.config.getoption("--kills")
    chance, number, moments = random.Random(f"{stage} {kills}"), 0, []
    folder = tmp_path / "0"
    while kills > 0:
        process, moment = start(words, folder), chance.uniform(0, seconds)
        process.join(moment)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills -= 1
            moments.append(f"{moment:.2f}")
            continue
        assert process.exitcode == 0, (folder / "log").read_text()
        _same(reference / "out", folder / "out")  # it was done before it could be killed
        number += 1
        folder = tmp_path / str(number)
    record_property("seconds", f"{seconds:.2f}")  # benchmarks/kills.py keeps them
    record_property("killed_after", " ".join(moments))
    _finish(start, words, folder)
    _same(reference / "out", folder / "out")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_asked_to_end_says_how_it_goes_on(stage, number, code, word, start, undisturbed, tmp_path):
    words, reference, seconds = undisturbed(stage)
    folder, wait = tmp_path / "0", random.Random(f"{stage} {code}").uniform(0, seconds / 2)
    for again in range(1, 10):
        process = start(words, folder)
        while process.exitcode is None and not list((folder / "out").glob(".hyperdb*.lock")):
            time.sleep(0.01)
        process.join(wait)
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join()
        if process.exitcode != 0:
            break
        folder, wait = tmp_path / str(again), wait / 2  # it was done before
    said = (folder / "log").read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    (told,) = [line for line in said.splitlines() if line.startswith(word)]
    assert told == f"{word}; {cli._after_interruption(words)}"
    _finish(start, words, folder)
    _same(reference / "out", folder / "out")


# --- the disk ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(stage, start, undisturbed, tmp_path):
    """No file may grow beyond a limit that the largest file of the run is beyond, as on a disk that is full."""
    words, reference, _ = undisturbed(stage)
    largest = max(p.stat().st_size for p in (reference / "out").rglob("*") if p.is_file())
    process = start(words, tmp_path, largest - 1)
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2, said
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("hyperdb: error: ")]
    assert "File too large" in error or "os error 27" in error
    assert not list((tmp_path / "out").rglob(f"{TEMPORARY}*"))
    _finish(start, words, tmp_path)
    _same(reference / "out", tmp_path / "out")


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts a disk of so many bytes in memory, with options, or says why it cannot."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip() if done else 'there is no mount'}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_one_that_is_read_only(disk, capsys):
    small = disk("size=64k")
    words = ["render_heads", "identities=1", "views=1", "photo_views=1", "size=32", "workers=1"]
    assert cli.main([*words, f"out={small / 'out'}"]) == 2
    assert "the disk has 0.1 MB left" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        save_tensors(small / "x.safetensors", {"x": torch.zeros(2**18)})
    assert not list(small.iterdir())
    frozen = disk("ro")
    assert cli.main([*words, f"out={frozen / 'out'}"]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def _fill(path: Path) -> None:
    """Take all the room that a disk has left."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def test_a_journal_on_a_disk_that_fills_goes_on_when_there_is_room(disk):
    small = disk("size=64k")

    def run() -> None:
        with Journal(small / "journal.jsonl", 1000, every=1) as journal:
            journal.step(1, 1.0)  # the file has a block of the disk, in which there is room for more
            _fill(small / "filler")
            for step in range(2, 1001):
                journal.step(step, 1.0)

    with pytest.raises(UserError, match=r"^cannot write .*journal\.jsonl: No space left on device$"):
        run()
    (small / "filler").unlink()
    there = [record["step"] for record in read(small / "journal.jsonl")]
    assert 2 <= len(there) < 1000
    with Journal(small / "journal.jsonl", len(there) + 1, there[-2], every=1) as journal:
        for again in (there[-1], there[-1] + 1):
            journal.step(again, 1.0)
    assert [record["step"] for record in read(small / "journal.jsonl")] == list(range(1, len(there) + 2))


def test_a_cache_that_cannot_be_written_says_how_to_have_another(disk):
    with pytest.raises(UserError, match=r"^cannot write .*: Read-only file system; HYPERDB_CACHE=FOLDER names another"):
        kept(disk("ro"), "moments", "key", 2, lambda _: [torch.zeros(2, 3)])


# --- what is damaged ---------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("place", [-1, -1000, 60, None])
def test_a_damaged_file_is_found_and_made_again(tmp_path, place, capsys):
    """A bit in the numbers or in the header, or a file that was cut."""
    path = tmp_path / "x.safetensors"
    g = torch.Generator().manual_seed(0)
    save_tensors(path, {"a": torch.randn(20, 30, generator=g), "b": torch.tensor(True)}, {"key": "of what"})
    assert whole(path)
    assert load_tensors(path)[1] == {"key": "of what"}
    _cut(path) if place is None else _flip(path, place)
    with pytest.raises(UserError, match=str(path)):
        load_tensors(path)
    capsys.readouterr()
    assert not whole(path)
    said = capsys.readouterr().out
    assert f"{path} is" in said
    assert "made again" in said
    assert not path.exists()
    assert not whole(path)


def test_every_bit_counts(tmp_path):
    """Of a file with a checksum no bit of the numbers can change unseen, and none of what the header says of them."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).view(2, 3).half(), "b": torch.zeros(0)}, {"key": "k"})
    right, before = path.read_bytes(), load_tensors(path)
    for bit in range(8 * len(right)):
        data = bytearray(right)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = load_tensors(path)
        except UserError:
            continue
        assert found[1] == before[1] or "crc32" not in data.decode(errors="ignore")
        assert all(torch.equal(found[0][name], x) for name, x in before[0].items()), bit


@pytest.mark.slow
def test_damaged_fits_are_fitted_again(start, undisturbed, tmp_path):
    words, reference, _ = undisturbed("precompute")
    for name in ("out/index.json", "out/statistics.safetensors"):
        assert (reference / name).is_file()
    shutil.copytree(reference / "out", tmp_path / "out")
    _flip(shard_path(tmp_path / "out", 0), -7)
    _cut(shard_path(tmp_path / "out", 2))
    _flip(tmp_path / "out" / "start.safetensors", -7)
    _finish(start, words, tmp_path)
    said = (tmp_path / "log").read_text()
    assert said.count("made again") == 3
    _same(reference / "out", tmp_path / "out")


# --- what runs leave behind, and the clock -----------------------------------------------------------


def test_what_was_half_written_is_removed_by_whoever_comes_alone(tmp_path):
    def die() -> None:
        with writing_into(tmp_path, "0of2"), atomic(tmp_path / "rows" / "x.json") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    (left,) = (tmp_path / "rows").iterdir()
    assert left.name.startswith(TEMPORARY)
    time.sleep(0.02)  # the system's clock of files counts in hundredths of a second
    with writing_into(tmp_path, "1of2"):
        assert not left.exists()
        with atomic(tmp_path / "rows" / "y.json") as temporary:  # what is being written by another part stays
            with writing_into(tmp_path, "0of2"):
                assert temporary.exists()
            temporary.write_text("whole")
    assert [p.name for p in (tmp_path / "rows").iterdir()] == ["y.json"]


@pytest.mark.parametrize("jump", [-3e9, 3e9])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, jump):
    """Files of a run that is stopped come from the future or a far past, and while it goes on the clock moves again."""
    folder = tmp_path / "out"
    for part in (range(1, 4), range(4, 7)):
        with writing_into(folder), Journal(folder / "journal.jsonl", 6, part.start - 1, every=1) as journal:
            for step in part:
                journal.step(step, 1.0)
                now = time.time()
                monkeypatch.setattr(time, "time", lambda now=now: now + jump)
        save_json(folder / "x.json", {"step": step})
        for path in folder.iterdir():
            os.utime(path, (max(0.0, now + jump),) * 2)
    assert [record["step"] for record in read(folder / "journal.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= record["seconds"] < 60 for record in read(folder / "journal.jsonl"))
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl", "x.json"]
