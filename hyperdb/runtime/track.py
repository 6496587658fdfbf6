"""Where a run can be watched while it goes: losses, rates, pictures and settings in wandb, TensorBoard or trackio."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.recipe import plain

TRACKERS = ("wandb", "tensorboard", "trackio")
C = TypeVar("C")


def check_tracker(name: str | None) -> None:
    """Raise `UserError` unless `name` is None or a tracker that is installed."""
    if name not in (None, *TRACKERS):
        raise UserError(f"tracker={name!r}: expected {', '.join(TRACKERS)} or null")
    if name is not None and importlib.util.find_spec(name) is None:
        package = "wandb" if name == "wandb" else f"-e '.[{name}]'"
        raise UserError(f"tracker={name} is not installed; run `pip install {package}`")


class Track:
    """A run that nobody watches; those below are watched. Each begins with what it is told first."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell numbers of a step, counted from 1; the same step may be told several times."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture file."""

    def close(self, failed: bool) -> None:
        """End the run, if it has begun."""


@dataclasses.dataclass
class _Watched(Track):
    tracker: str
    stage: str
    config: Any

    @property
    def settings(self) -> dict[str, Any]:
        return {"stage": self.stage, **plain(dataclasses.asdict(self.config)), **provenance()}


class _TensorBoard(_Watched):
    """Writes into the folder `tensorboard` of the run."""

    @functools.cached_property
    def writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(Path(self.config.out) / self.tracker))
        writer.add_text("config", f"```\n{json.dumps(self.settings, indent=1)}\n```")
        return writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        if "writer" in self.__dict__:
            self.writer.close()


class _WandB(_Watched):
    """Runs of the project `hyperdb` in wandb, or in trackio, whose functions are called the same.

    wandb writes into the folder `wandb` of the run; `wandb sync FOLDER` uploads what was made offline. A training that
    goes on from its checkpoint goes on with its run of wandb. trackio keeps all runs in one folder of its own.
    """

    @functools.cached_property
    def run(self) -> Any:
        where: dict[str, Any] = {}
        if self.tracker == "wandb":
            where = {"dir": self.config.out, **_gone_on(Path(self.config.out))}
            if "WANDB_MODE" not in os.environ and not _has_key():
                where["mode"] = "offline"
        library = importlib.import_module(self.tracker)
        more = {"name": self.config.name, "group": self.stage, "config": self.settings}
        return library.init(project="hyperdb", **more, **where)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: importlib.import_module(self.tracker).Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        if "run" in self.__dict__:
            code = {"exit_code": int(failed)} if self.tracker == "wandb" else {}  # trackio knows of none
            self.run.finish(**code)


def _gone_on(out: Path) -> dict[str, str]:
    """Return wandb's settings for the run that a training in `out` goes on with; none if it begins anew."""
    runs = [path for path in (out / "wandb").glob("*run-*-*") if path.is_dir() and not path.is_symlink()]
    if not runs or "WANDB_RUN_ID" in os.environ or not (out / "checkpoint.safetensors").is_file():
        return {}
    newest = max(runs, key=lambda path: path.stat().st_mtime_ns)
    return {"id": newest.name.partition("run-")[2].split("-", 1)[1], "resume": "allow"}  # (offline-)run-DATE_TIME-ID


def _has_key() -> bool:
    """Whether wandb would find a key for its server, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tracked(run: Callable[[C, Track], Path]) -> Callable[[C], Path]:
    """Make a stage's `run(config, track)` a `run(config)`: the track is that of `config.tracker`, and ends with it."""

    @functools.wraps(run)
    def whole(config: C) -> Path:
        if (every := getattr(config, "save_every", 1)) < 1:
            raise UserError(f"save_every={every}: expected at least 1 step from one checkpoint to the next")
        tracker, stage = getattr(config, "tracker", None), run.__module__.rpartition(".")[2]
        kind = _TensorBoard if tracker == "tensorboard" else _WandB
        track = Track() if tracker is None else kind(tracker, stage, config)
        failed = True
        try:
            out = run(config, track)
            failed = False
        finally:
            track.close(failed)
        return out

    return whole
