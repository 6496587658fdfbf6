"""Rows on the disk behave as a tensor does; what is kept is made once; a batch is made a step ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperdb.runtime.ahead import Ahead
from hyperdb.runtime.cache import cache_folder, kept
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_parts
from hyperdb.runtime.lazy import PART, Lazy, mean_std


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
    save_parts(tmp_path / "a.safetensors", "x", whole.split(3), 7, {"key": "ä"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], whole)
    assert metadata == {"key": "ä"}
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="its checksum is not the one"):
        load_tensors(tmp_path / "a.safetensors")


def test_what_is_kept_is_made_once_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make() -> list[Tensor]:
        made.append(1)
        return [torch.zeros(2, 3), torch.ones(1, 3)]

    for key in ("a", "a", "b"):
        assert kept(tmp_path, "x", key, 3, make).tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert len(made) == 2
    monkeypatch.delenv("HYPERDB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hyperdb"


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
