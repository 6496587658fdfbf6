"""The type of every setting that is a path, so that one rule holds for all, and the file or folder that one means."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Annotated, Any

PATH = "path"
FilePath = Annotated[str, PATH]  # a file, a folder, `package:NAME`, or a hub id


def expand(path: str) -> str:
    """Return a path with `~` or `~somebody` at its beginning replaced by that home folder."""
    return os.path.expanduser(path)


def resolve(path: str) -> Path:
    """Return the file or folder meant by `path`; `package:NAME` is one shipped inside hyperdb."""
    if path.startswith("package:"):
        return Path(__file__).parent.parent / path.removeprefix("package:")
    return Path(expand(path))


def is_path(hint: Any) -> bool:
    """Whether an annotated type is `FilePath`, perhaps optional or in a list."""
    return PATH in getattr(hint, "__metadata__", ()) or any(map(is_path, typing.get_args(hint)))
