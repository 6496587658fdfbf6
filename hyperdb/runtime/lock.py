"""Which runs are writing into a folder now: a lock file each, so that no two write the same files.

The system forgets a lock with the process that had it, however that ended, on other machines of a cluster too. Only the
file of a run that ended badly stays: it tells `hyperdb status` who it was, and stops nobody.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import TEMPORARY
from hyperdb.runtime.output import RECORD

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]


@dataclass
class Job:
    """A run in a folder: its process, the machine, and which `part` of the work it does, such as 3of64, or all ("")."""

    pid: int
    host: str
    part: str
    running: bool | None  # None: this disk or system has no locks that tell

    def __str__(self) -> str:
        number, _, of = self.part.partition("of")
        return f"process {self.pid} on {self.host}" + (f", shard {number} of {of}" if self.part else "")


def jobs(folder: Path) -> list[Job]:
    """Return the runs that are writing into a folder, and those that ended badly."""
    found = []
    for path in sorted(folder.glob(".hyperdb*.lock")):
        with suppress(OSError, ValueError, KeyError):  # removed, or not written yet
            told = json.loads(path.read_text(encoding="utf-8"))
            found.append(Job(told["pid"], told["host"], path.stem.removeprefix(".hyperdb").lstrip("-"), _held(path)))
    return found


def _held(path: Path) -> bool | None:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # this disk or system has no locks
        return None
    return False


def _take(path: Path) -> IO[str] | None:
    """Return the lock file, open and held by this process; None if another has it."""
    for _ in range(3):
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # perhaps `_held` alone, for a moment
            file.close()
            time.sleep(0.05)
            continue
        except (OSError, AttributeError):
            return file
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # whoever had it has removed it meanwhile
    return None


def _sweep(folder: Path, before: int) -> None:
    """Remove what runs that were killed had half written, in a folder and those in it, before a time in nanoseconds."""
    for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"*/{TEMPORARY}*")]:
        with suppress(OSError):  # removed by another
            if path.stat().st_mtime_ns < before:
                path.unlink()


@contextmanager
def waited(path: Path) -> Iterator[None]:
    """Let one process of this disk at a time into a block, where the system can; the others wait.

    The file at `path`, which is what the block makes or begins to make, is made and held. It does not stay empty.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process makes {path.name.removeprefix(TEMPORARY)}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # this disk or system has no locks
            break
        with suppress(OSError):  # gone
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # whoever had it has given it another name, or removed it
    try:
        yield
    finally:
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()
        file.close()


@contextmanager
def writing_into(out: str | Path, part: str = "") -> Iterator[None]:
    """Keep other runs out of a folder, which is made, while the block runs.

    Runs of different parts of the work go together; one of all of it goes with no other. Whoever comes alone removes
    what one that was killed had half written. Raises `UserError` naming the process that is there.
    """
    folder = Path(out)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".hyperdb{part and '-'}{part}.lock"
    file = _take(path)
    others = [job for job in jobs(folder) if job.running and (file is None or job.part != part)]
    there = [job for job in others if not part or job.part in ("", part)]
    if file is None or there:
        if file is not None:
            path.unlink()
            file.close()
        who = str(there[0]) if there else "another process"
        raise UserError(f"{out} is being written by {who}; wait for it, stop it, or choose another folder, out=FOLDER")
    kept = True
    try:
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        if not others:
            _sweep(folder, os.fstat(file.fileno()).st_mtime_ns)
        yield
        kept = False
    finally:
        record = folder / RECORD
        if not kept and not part:  # all is done, whatever a part of it came to
            for other in folder.glob(".hyperdb-*.lock"):
                if _held(other) is False:
                    other.unlink(missing_ok=True)
        # whoever had not begun to write has nothing to tell
        began = os.fstat(file.fileno()).st_mtime_ns
        if not (kept and record.is_file() and record.stat().st_mtime_ns >= began):
            path.unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # not empty
            for one in made:
                one.rmdir()
