"""What a path of a setting leads to."""

from __future__ import annotations

from pathlib import Path

import hyperdb
from hyperdb.runtime.paths import resolve


def test_resolve(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert resolve("~/base") == Path("/home/ada/base")
    assert resolve("runs/base") == Path("runs/base")
    assert resolve("package:embedded/base") == Path(hyperdb.__file__).parent / "embedded/base"
    assert resolve("package:embedded/base/unet").is_dir()
