"""Imports go down only, and what must be light is light."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyperdb import config, options

ROOT = Path(__file__).parent.parent
PACKAGES_OF_CONFIGS = [
    f"hyperdb.{path.parent.name}"
    for path in sorted((ROOT / "hyperdb").glob("*/__init__.py"))
    if path.parent.name not in ("embedded", "stages")
]


def test_layers():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["hyperdb", "hyperdb.cli", *PACKAGES_OF_CONFIGS])
def test_configurations_import_light(package):
    """Each package's configurations, and every stage's, load without the libraries that they configure."""
    check_light([package])


def test_stages_import_light():
    check_light([config.STAGES[name][0] for name in config.available()])


def check_light(modules: list[str]) -> None:
    heavy = ["torch", "torchvision", "diffusers", "transformers", "timm", "accelerate", "gradio"]
    code = f"import importlib, json, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


def test_no_grab_bags():
    names = {path.stem for path in (ROOT / "hyperdb").rglob("*.py")}
    assert not names & {"utils", "util", "misc", "common", "helpers"}


def test_every_stage_is_in_the_table():
    files = {path.stem for path in (ROOT / "hyperdb/stages").glob("*.py") if not path.stem.startswith("_")}
    with_run = {name for name in files if "\ndef run(" in (ROOT / f"hyperdb/stages/{name}.py").read_text()}
    assert with_run <= {module.rpartition(".")[2] for module, _ in config.STAGES.values()}


def test_stages_with_a_dry_run_say_their_passes():
    modules = {name: config.stage_module(name) for name in config.available()}
    dry = {name for name, module in modules.items() if "dry_run" in dict(options.settings(module.Config))}
    assert dry >= {"demo", "personalize", "generate", "precompute", "train_hypernet", "evaluate"}
    assert {name for name, module in modules.items() if hasattr(module, "passes")} == dry


def test_no_file_is_written_by_importing(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import hyperdb.cli"], check=True, cwd=tmp_path, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_text_files_are_opened_as_utf8():
    """By `load_text` and `save_text`, or with the encoding by name."""
    calls = re.compile(r"\.(read_text|write_text)\((?![^\n]*encoding=)|(?<![\w.])open\((?![^\n]*(encoding=|b\"))")
    for path in (ROOT / "hyperdb").rglob("*.py"):
        assert not calls.search(path.read_text(encoding="utf-8")), path
