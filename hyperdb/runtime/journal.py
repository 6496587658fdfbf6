"""A training's journal: one JSON line a record, a progress bar, and a guard against non-finite losses."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyperdb.runtime.errors import NonFiniteError
from hyperdb.runtime.files import save_text, writing


class Journal:
    """Write `path` (JSON lines, a record every `every` steps and at the last) and show a bar, `start` to `total` steps.

    Without a path neither is there, and losses are guarded alone: of several processes one keeps the journal.

    On resume, records after `start` are dropped first, so an interrupted and resumed run leaves records of the same
    steps as an uninterrupted one; the seconds and the smoothed loss start afresh.
    """

    def __init__(self, path: Path | None, total: int, start: int = 0, name: str = "", every: int = 50) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [r for r in read(path) if r["step"] <= start] if path.exists() and start else []
            save_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self.name, self.every, self.total = name, every, total
        target = path or Path(os.devnull)
        self._file = target.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total, initial=start, desc=name, dynamic_ncols=True, smoothing=0.05, disable=path is None
        )
        self._smooth: float | None = None
        self._began = time.monotonic()

    def step(self, step: int, loss: float, **values: float) -> None:
        """Advance the bar by one; every so many steps write a record. Raises `NonFiniteError`."""
        self.guard(step, loss)
        self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        self._bar.update(1)
        if step % self.every == 0 or step == self.total:
            self._bar.set_postfix_str(f"loss {self._smooth:.4f}")
            self.record(step, loss=round(self._smooth, 6), **values)

    def guard(self, step: int, loss: float, gradient: float = 0.0, where: str = "") -> None:
        """Raise `NonFiniteError` for a loss, or the length of a gradient, that is no number; `where` is said too."""
        for what, value in (("loss", loss), ("gradient's length", gradient)):
            if not math.isfinite(value):
                training = f"{self.name}{where}: " if self.name or where else ""
                raise NonFiniteError(
                    f"{training}the {what} is {value} at step {step}; lower the learning rate or use fp32, under "
                    "another name; the checkpoint is that of the last good step"
                )

    def record(self, step: int, **values: Any) -> None:
        """Append one record."""
        seconds = round(time.monotonic() - self._began, 1)
        with writing(self._file.name):
            self._file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file and the bar."""
        self._bar.close()
        with writing(self._file.name):  # what a full disk did not take is tried again
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Read a journal's records; a half-written last line, or another that is no record, is ignored."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
