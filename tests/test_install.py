"""`pip install .` into another folder: it finds its configurations, its data and its command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hyperdb import config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Install without network into a folder of its own."""
    site = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(ROOT)], check=True, timeout=300)
    return site


def python(site: Path, *words: str, cwd: Path) -> str:
    """Run Python with only the installed copy in front of the libraries."""
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_is_installed(site):
    listed = subprocess.run(["git", "ls-files", "hyperdb", "conf"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        inside = name if name.startswith("hyperdb/") else f"hyperdb/{name}"
        assert (site / inside).is_file() or not (ROOT / name).exists(), f"{name} was not installed"


def test_it_runs_from_there(site, tmp_path):
    where = python(site, "-c", "import hyperdb; print(hyperdb.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    text = python(site, str(site / "bin" / "hyperdb"), "--help", cwd=tmp_path)
    assert all(f"  {name} " in text for name in config.available())
    for stage in config.available():
        python(site, "-m", "hyperdb", stage, "--cfg", "job", cwd=tmp_path)


def test_metadata(site):
    [folder] = site.glob("hyperdb-*.dist-info")
    metadata = (folder / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert (folder / "licenses" / "LICENSE").is_file()
    assert "hyperdb = hyperdb.cli:main" in (folder / "entry_points.txt").read_text()
