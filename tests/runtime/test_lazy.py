"""Rows on the disk behave as a tensor does; what is kept is made once; a batch is made a step ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperdb.runtime.ahead import Ahead
from hyperdb.runtime.cache import cache_folder, kept
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_parts, unfinished
from hyperdb.runtime.lazy import PART, Lazy, mean_std
from hyperdb.runtime.lock import waited


class Held(Lazy):
    """Rows of a tensor, and which were read."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.shape, self.seen = whole, tuple(whole.shape), []

    def read(self, rows: list[int]) -> Tensor:
        self.seen += rows
        return self.whole[rows]


@pytest.fixture
def whole() -> Tensor:
    return torch.rand(2 * PART + 3, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "index",
    [0, -1, slice(2, 9, 3), [4, 4, 1], torch.tensor([[1, 2], [5, 0]]), torch.arange(2 * PART + 3) % 7 == 0, []],
)
def test_rows_are_chosen_as_of_a_tensor(whole: Tensor, index: object) -> None:
    rows = Held(whole)
    assert torch.equal(rows[index], whole[index])
    assert len(rows.seen) == whole[index].numel() // 6


def test_parts_and_what_is_said_of_all(whole: Tensor) -> None:
    rows = Held(whole)
    assert len(rows) == len(whole)
    assert torch.equal(torch.cat(list(rows.split(5))), whole)
    part = rows.part(torch.tensor([9, 3, 3]))
    assert torch.equal(part[:], whole[[9, 3, 3]])
    assert len(part) == 3
    for found, wanted in zip(mean_std(rows), (whole.mean(0), whole.std(0)), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(mean_std(rows, 0)[1], mean_std(whole, 0)[1])
    with pytest.raises(IndexError):
        rows[len(whole)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.uint8])
def test_a_file_written_in_parts_is_that_of_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = (100 * torch.rand(7, 2, 3)).to(dtype)
    save_parts(tmp_path / "a.safetensors", "x", lambda first: whole[first:].split(3), 7, {"key": "ä"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], whole)
    assert metadata == {"key": "ä"}
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="its checksum is not the one"):
        load_tensors(tmp_path / "a.safetensors")


def test_what_a_stop_left_is_gone_on_with(tmp_path: Path) -> None:
    """In whole parts, to the bit; not if it is of something else."""
    whole, begun = torch.rand(11, 2, 3), []

    def make(first: int, stop: int = 99) -> Iterator[Tensor]:
        begun.append(first)
        for row, part in zip(range(first, 11, 2), whole[first:].split(2), strict=True):
            if row >= stop:
                raise KeyboardInterrupt
            yield part

    file, told = tmp_path / "a.safetensors", {"key": "one"}
    with pytest.raises(KeyboardInterrupt):
        save_parts(file, "x", lambda first: make(first, 2), 11, told, 4)  # less than a part
    save_parts(file, "x", make, 11, told, 4)
    assert torch.equal(load_tensors(file)[0]["x"], whole)  # with its checksum
    file.unlink()
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        save_parts(file, "x", lambda first: make(first, 6), 11, told, 4)
    assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        save_parts(file, "x", lambda first: make(first, 8), 11, told, 4)
    save_parts(file, "x", make, 11, told, 4)
    assert begun == [0, 4, 8]
    tensors, metadata = load_tensors(file)  # with its checksum
    assert torch.equal(tensors["x"], whole)
    assert metadata == told
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        save_parts(file, "x", lambda first: make(first, 6), 11, {"key": "two"}, 4)
    save_parts(file, "x", make, 11, {"key": "three"}, 4)
    assert begun[-1] == 0
    assert load_tensors(file)[1] == {"key": "three"}


@pytest.mark.parametrize("place", ["numbers", "header"])
def test_what_was_damaged_before_it_was_whole_is_not_gone_on_with(tmp_path: Path, place: str) -> None:
    whole, begun = torch.rand(11, 2, 3), []

    def make(first: int) -> Iterator[Tensor]:
        begun.append(first)
        for row in range(first, 11, 2):
            if len(begun) == 1 and row == 8:
                raise KeyboardInterrupt
            yield whole[row : row + 2]

    file = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        save_parts(file, "x", make, 11, {"key": "one"}, 4)
    data = bytearray(unfinished(file).read_bytes())
    data[-3 if place == "numbers" else data.index(b"264") + 2] ^= 1  # of the last part; of the bytes that all are
    unfinished(file).write_bytes(data)
    save_parts(file, "x", make, 11, {"key": "one"}, 4)
    assert begun == [0, 0]
    assert torch.equal(load_tensors(file)[0]["x"], whole)


def test_what_is_kept_is_made_once_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(_: int) -> list[Tensor]:
        made.append(1)
        return [torch.zeros(2, 3), torch.ones(1, 3)]

    for key in ("a", "a", "b"):
        assert kept(tmp_path, "x", key, 3, make).tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert len(made) == 2
    monkeypatch.delenv("HYPERDB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hyperdb"


def test_who_wants_the_same_at_once_waits_for_it(tmp_path: Path) -> None:
    begun, go, found = threading.Event(), threading.Event(), []

    def make(_: int) -> Iterator[Tensor]:
        begun.set()
        go.wait(20)
        yield torch.ones(2, 3)

    def want(how: Callable[[int], Iterator[Tensor]]) -> None:
        found.append(kept(tmp_path, "x", "a", 2, how).sum().item())

    def never(_: int) -> Iterator[Tensor]:
        raise AssertionError("it is made already")

    first = threading.Thread(target=want, args=(make,))
    first.start()
    begun.wait(20)
    second = threading.Thread(target=want, args=(never,))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    for thread in (first, second):
        thread.join(20)
    assert found == [6, 6]
    assert len(list(tmp_path.iterdir())) == 1


def test_whoever_meets_a_damaged_file_leaves_it_to_the_one_that_makes_it_again(tmp_path: Path) -> None:
    def never(_: int) -> Iterator[Tensor]:
        raise AssertionError("another has made it again")

    right = kept(tmp_path, "x", "a", 2, lambda _: [torch.ones(2, 3)])
    (path,), found = tmp_path.iterdir(), []
    whole = path.read_bytes()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole[:-1] + b"1")
    damaged.replace(path)
    thread = threading.Thread(target=lambda: found.append(kept(tmp_path, "x", "a", 2, never)))
    with waited(unfinished(path)):  # as the other process
        thread.start()
        thread.join(0.2)
        assert path.read_bytes() != whole
        damaged.write_bytes(whole)
        damaged.replace(path)
    thread.join(20)
    assert torch.equal(found[0], right)
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_is_made_ahead_in_another_thread() -> None:
    made: list[tuple[int, ...]] = []

    def make(step: int, process: int) -> tuple[int, int]:
        made.append((step, process, int(threading.current_thread() is threading.main_thread())))
        if step == 5:
            raise ValueError("no fifth")
        return step, process

    ahead = Ahead(make)
    assert [ahead(step, 1) for step in (0, 1, 2)] == [(0, 1), (1, 1), (2, 1)]
    assert ahead(4, 1) == (4, 1)  # not the one that was expected
    with pytest.raises(ValueError, match="no fifth"):
        ahead(5, 1)
    assert [step for step, *_ in made] == [0, 1, 2, 3, 4, 5]
    assert not any(main for *_, main in made)
