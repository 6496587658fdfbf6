"""Say how far runs are, from their files alone: what is done, who is at it, what is missing.

    hyperdb status run=runs/precompute/paper
    hyperdb status run=[runs/train_hypernet,runs/evaluate/table1]    # every run in and below these folders

No model is loaded. The folder may be written by other machines meanwhile.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata
from hyperdb.runtime.journal import read
from hyperdb.runtime.lock import jobs
from hyperdb.runtime.output import RECORD, recorded
from hyperdb.runtime.paths import FilePath, resolve

RECENT = 20  # records of a journal that say how fast a training is now


@dataclass
class Config:
    """Which runs are looked at.

    A store of fits is counted in files, preprocessing in pictures, an evaluation in files of pictures for each row, one
    a seed, a training in steps. Jobs are running as long as they hold their lock file; those that ended badly have
    left it.
    """

    run: list[FilePath] = "???"  # type: ignore[assignment]
    """the folder `out` of a run, or one with several runs in it"""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("run=[]: name the folder of a run")


@dataclass
class Progress:
    """How much of one thing is there, and of how many; `more` is the rest of the sentence."""

    what: str
    done: int
    total: int | None
    more: str = ""

    def __str__(self) -> str:
        of = f" of {self.total} done, {max(0, self.total - self.done)} missing" if self.total is not None else " done"
        return f"{self.what:20} {self.done}{of}{self.more}"


def _lasting(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# --- kinds of runs -----------------------------------------------------------------------------------


def _indexed(folder: Path, what: str, pattern: str, total: int | None) -> Progress:
    """Count files that an index follows."""
    more = "; the index is written" if (folder / "index.json").is_file() else "; there is no index yet"
    return Progress(f"files of {what}", len(list(folder.glob(pattern))), total, more)


def _faces(folder: Path, pictures: int | None) -> Progress:
    """Count crops; once the manifest follows, pictures without one were rejected."""
    done = len(list(folder.glob("faces/*.png")))
    listed, rejected = (
        file.read_bytes().count(b"\n") if (file := folder / f"{name}.jsonl").is_file() else 0
        for name in ("manifest", "rejected")
    )
    if not listed or listed + rejected < (pictures or 0):  # of fewer pictures, before a run that goes on
        return Progress("faces of pictures", done, pictures, "; there is no manifest of all yet")
    return Progress("faces of pictures", done, done, f"; {rejected} rejected, the manifest is written")


def _row(folder: Path, row: str, total: int | None) -> Progress:
    names = [path.stem for path in folder.glob(f"rows/{row}*.safetensors")]
    done = sum(re.fullmatch(rf"{row}(-\d+)?", name) is not None for name in names)
    parts = Counter(m[1] for name in names if (m := re.fullmatch(rf"{row}-(\d+-\d+of\d+)", name)))
    begun = Counter((seed, part.partition("of")[2]) for seed, _, part in (name.partition("-") for name in parts))
    shares = [f"{count} of {of} shards of seed {seed}" for (seed, of), count in sorted(begun.items())]
    return Progress(f"row {row}", done, total, f"; {', '.join(shares)}" if shares else "")


def pace(records: list[dict[str, Any]]) -> float | None:
    """Return the seconds a step of a journal's last records; None where they say nothing of it."""
    session: list[dict[str, Any]] = []
    for record in records:
        if session and record["seconds"] < session[-1]["seconds"]:  # the clock starts afresh with a run that goes on
            session = []
        session.append(record)
    first, last = (session[-RECENT:][end] for end in (0, -1)) if session else ({}, {})
    if session and last["step"] > first["step"]:
        return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))
    return float(last["seconds"] / last["step"]) if session and len(session) == len(records) else None


def _training(folder: Path, total: int | None) -> Progress:
    checkpoint, journal = folder / "checkpoint.safetensors", folder / "journal.jsonl"
    kept = int(load_metadata(checkpoint).get("step", 0)) if checkpoint.is_file() else 0
    records = read(journal) if journal.is_file() else []
    done, seconds = max([kept, *(record["step"] for record in records[-1:])]), pace(records)
    more = f", {seconds:.3g} seconds a step" if seconds is not None else ""
    if seconds is not None and total is not None and done < total:
        more += f", {_lasting(seconds * (total - done))} to go"
    return Progress("steps", done, total, f"{more}; checkpoint at step {kept}" if kept else f"{more}; no checkpoint")


def _counted(folder: Path) -> Iterator[Progress]:
    """Yield how far each run is of which that can be told."""
    for run in recorded(folder):
        writes, total = run["writes"], run.get("files")
        if "checkpoint.safetensors" in writes:
            yield _training(folder, run["made_from"].get("steps"))
        elif writes[0] == "fits-*.safetensors":
            yield _indexed(folder, "fits", writes[0], total)
        elif writes[0] == "data-*.arrow":
            how = run["made_from"]
            yield _indexed(folder, "people", writes[0], -(-how["identities"] // how["shard"]))
        elif writes[0] == "faces/*.png":
            yield _faces(folder, total)
        elif writes[0].startswith("rows/"):
            yield _row(folder, Path(writes[0]).stem, total)


# --- report ------------------------------------------------------------------------------------------


def examine(folder: Path) -> list[str]:
    """Return the lines about one folder."""
    written = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    lines = [str(one) for one in _counted(folder)] or [str(Progress("files", len(written), None))]
    there = jobs(folder)
    words = {True: "running", False: "failed", None: "running or failed"}
    counts = {word: sum(job.running is now for job in there) for now, word in words.items()}
    told = [f"{count} {word}" for word, count in counts.items() if count or word != words[None]]
    lines.append(f"{'jobs':20} {', '.join(told)}")
    lines += [f"{'':20} {words[job.running]}: {job}" for job in there]
    if written:
        last = max(path.stat().st_mtime for path in written if path.exists())
        lines.append(f"{'last written':20} {_lasting(max(0.0, time.time() - last))} ago")
    return lines


def run(config: Config) -> None:
    """Print what is known of each run."""
    for name in config.run:
        folder = resolve(name)
        there = {path.parent for pattern in (RECORD, ".hyperdb*.lock") for path in folder.rglob(pattern)}
        if not there:
            raise UserError(f"run={name}: no run of hyperdb has written into this folder")
        for one in sorted(there):
            print(one)
            print("\n".join(f"  {line}" for line in examine(one)))
