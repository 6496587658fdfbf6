"""The folder that a run writes into: whether it can be written, and which of its files the run may replace.

A run may replace what the same run wrote before, nothing else: no file that hyperdb did not write, and no result of
other settings. Which run wrote what stands in `.hyperdb.json` of the folder, before the first file does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_metadata, save_json
from hyperdb.runtime.recipe import differences, plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD = ".hyperdb.json"
ROOM = 16 * 2**20  # bytes that any result fits in; more is found out while writing
# Files that say themselves what made them, as keys of their header: what stands beside them needs no record.
TELLING = {
    "checkpoint.safetensors": "step",
    "shard-*.safetensors": "made_from",
    "fits-*.safetensors": "key",
    "rows/*.safetensors": "made_from",
}


def check(out: str | Path, writes: Iterable[str] = ()) -> Path:
    """Return the folder `out` if files called `writes` (names or patterns) can be written into it; write nothing.

    Raises `UserError` for a folder that cannot be made or written, for a full disk, and where files of those names are
    nobody's whom hyperdb knows.
    """
    if not str(out).strip() or "\0" in str(out):
        raise UserError(f"out={str(out)!r} is no name of a folder; give another: out=FOLDER")
    try:
        os.fsencode(out).decode()
    except UnicodeError as error:  # safetensors would not open what is written there
        raise UserError(f"out={str(out)!r} is not UTF-8; give another: out=FOLDER") from error
    folder = Path(out)
    try:
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise UserError(f"out={out}: {there} is a file; choose another folder")
        with tempfile.TemporaryFile(dir=there) as probe:  # it has no name, by which another run could sweep it away
            probe.write(b"\0" * 4096)
            probe.flush()
        free = shutil.disk_usage(there).free
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = getattr(error, "strerror", None) or error
        raise UserError(f"out={out} cannot be written ({why}); choose another folder") from error
    if free < ROOM:
        raise UserError(f"out={out}: the disk has {free / 2**20:.1f} MB left; free some, or choose another folder")
    runs = recorded(folder)
    foreign = [name for name in _found(folder, writes) if not any(_wrote(run, name) for run in runs)]
    if foreign and not _telling(folder):
        named = ", ".join(foreign[:3]) + (" …" if len(foreign) > 3 else "")
        raise UserError(
            f"{out} holds files that no run is known to have written, and they would be replaced: {named}; "
            "choose another folder with out=FOLDER, or move them away"
        )
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from what the block does with a folder, where the system can."""
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # this disk has no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def claim(out: str | Path, writes: Iterable[str], made_from: Mapping[str, Any], files: int | None = None) -> Path:
    """Record that a run of the settings and contents `made_from` writes these files into `out`; return the folder.

    `files` says how many of them there will be at the end, for `hyperdb status`. Raises `UserError` as `check` does,
    and where some of them are of a run of other settings.
    """
    writes = list(writes)
    folder = check(out, writes)
    with _alone(folder):  # jobs of one work begin together
        return _recorded(folder, out, writes, made_from, files)


def _recorded(
    folder: Path, out: str | Path, writes: list[str], made_from: Mapping[str, Any], files: int | None
) -> Path:
    runs = recorded(folder)
    for name in _found(folder, writes):
        for run in runs:
            if _wrote(run, name) and (changed := differences(run["made_from"], made_from)):
                raise UserError(
                    f"{out} holds {name} of a run with other {', '.join(changed)}, which would be lost; "
                    "choose another folder with out=FOLDER or name=NAME, or delete that one"
                )
    if not runs and _found(folder, writes):  # what is there says itself what made it, and whoever reads it compares
        return folder
    kept = [run for run in runs if run["writes"] != writes]
    told = {} if files is None else {"files": files}
    save_json(folder / RECORD, {"runs": [*kept, {"writes": writes, "made_from": plain(made_from), **told}]})
    return folder


def release(out: str | Path) -> None:
    """Forget the runs that left nothing in `out`, and the folder if it is empty: what a run that failed does last."""
    folder = Path(out)
    if runs := recorded(folder):
        left = [run for run in runs if _found(folder, run["writes"])]
        if not left:
            (folder / RECORD).unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
        elif left != runs:
            save_json(folder / RECORD, {"runs": left})


def is_free(out: str | Path, name: str, made_from: Mapping[str, Any]) -> bool:
    """Whether a run may write `name` into `out`: nothing is there, or it wrote that itself."""
    folder = Path(out)
    owners = [run for run in recorded(folder) if _wrote(run, name)]
    mine = [run for run in owners if not differences(run["made_from"], made_from)]
    return not os.path.lexists(folder / name) or (bool(owners) and mine == owners)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that wrote into a folder."""
    if not (folder / RECORD).is_file():
        return []
    record = load_json(folder / RECORD)
    runs = record.get("runs") if isinstance(record, dict) else None
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise UserError(f"{folder / RECORD} is damaged; delete it, or choose another folder with out=FOLDER")
    return runs


def _is_run(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("made_from"), dict):
        return False
    writes = found.get("writes")
    return isinstance(writes, list) and all(isinstance(name, str) for name in writes)


def _wrote(run: Mapping[str, Any], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in run["writes"])


def _found(folder: Path, writes: Iterable[str]) -> list[str]:
    """Return what has one of these names in a folder, and files in the place of a subfolder."""
    found = set()
    for pattern in writes:
        paths = [path for path in folder.glob(pattern) if "*" not in pattern or not path.is_dir()]
        above = folder / pattern.partition("/")[0]
        paths += [above] if "/" in pattern and above.is_file() else []
        found |= {path.relative_to(folder).as_posix() for path in paths}
    return sorted(found)


def _telling(folder: Path) -> bool:
    """Whether a folder holds files of ours that say what made them, of a time when no record was kept."""
    for pattern, key in TELLING.items():
        for path in folder.glob(pattern):
            try:
                return key in load_metadata(path)
            except UserError:
                continue
    return False
