"""What takes long to compute of some data and is the same for every run: kept in one folder, never beside the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError, WriteError
from hyperdb.runtime.files import load_made, load_tensors, save_parts, unfinished, writing
from hyperdb.runtime.lazy import PART
from hyperdb.runtime.lock import waited

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path:
    """Return `$HYPERDB_CACHE`, else the folder `hyperdb` of the user's cache. What is in it may be deleted."""
    if named := os.environ.get("HYPERDB_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperdb"


def _of(made: tuple[dict[str, Tensor], dict[str, str]], name: str, key: str) -> Tensor | None:
    tensors, metadata = made
    return tensors[name] if metadata.get("key") == key and name in tensors else None


def kept(folder: Path | None, name: str, key: str, rows: int, make: Callable[[int], Iterable[Tensor]]) -> Tensor:
    """Return the tensor `[rows, ...]`, made once for a `key`, which says what it depends on.

    `make(first)` yields its parts from row `first` on, all but the last of as many rows. What a run that was stopped
    has made of them is gone on with. The tensor stays on the disk, in `folder` or in the cache's own: only what is
    looked at is read into memory. Processes that want the same at once wait for the one that makes it.
    """
    path = (folder or cache_folder()) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    with suppress(UserError):  # not there, or damaged: whoever has the lock looks again, and removes it
        if (found := _of(load_tensors(path), name, key)) is not None:
            return found
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with waited(unfinished(path)):
                if (made := load_made(path)) is not None and (found := _of(made, name, key)) is not None:
                    return found
                save_parts(path, name, make, rows, {"key": key}, PART)
    except WriteError as error:
        raise WriteError(f"{error}; HYPERDB_CACHE=FOLDER names another place for what is kept") from error
    return load_tensors(path)[0][name]
