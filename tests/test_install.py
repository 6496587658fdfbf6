"""The wheel, unpacked in another folder, finds its configurations and its data."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hyperdb import config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the wheel without network and unpack it as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def python(site: Path, *words: str, cwd: Path) -> str:
    """Run Python with only the unpacked wheel in front of the installed libraries."""
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


def test_every_file_is_in_the_wheel(site):
    listed = subprocess.run(["git", "ls-files", "hyperdb", "conf"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        inside = name if name.startswith("hyperdb/") else f"hyperdb/{name}"
        assert (site / inside).is_file() or not (ROOT / name).exists(), f"{name} is missing in the wheel"


def test_it_runs_from_there(site, tmp_path):
    where = python(site, "-c", "import hyperdb; print(hyperdb.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    text = python(site, "-m", "hyperdb", "--help", cwd=tmp_path)
    assert all(f"  {name} " in text for name in config.available())
    for stage in config.available():
        python(site, "-m", "hyperdb", stage, "--cfg", "job", cwd=tmp_path)


def test_metadata(site):
    [folder] = site.glob("hyperdb-*.dist-info")
    metadata = (folder / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert (folder / "licenses" / "LICENSE").is_file()
    assert "hyperdb = hyperdb.cli:main" in (folder / "entry_points.txt").read_text()
