"""The page's settings and model at tiny size, and a browser if there is one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from hyperdb import config as configuration

ROOT = Path(__file__).parents[2]
TINY = ["hypernet=null", "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "finetune.steps=3",
        "finetune.levels=1", "finetune.prior_weight=0", "adapter.a=12", "adapter.b=8"]  # fmt: skip


@pytest.fixture(scope="session")
def words(tiny_base):
    """Return the words of the command line for a tiny base without hypernetwork."""
    return [f"diffusion.path={tiny_base}", *TINY]


@pytest.fixture(scope="session")
def config(words):
    return configuration.load("web", words)


@pytest.fixture(scope="session")
def model(config):
    from hyperdb.tuning.personalizer import Personalizer

    return Personalizer(config)


@pytest.fixture
def sessions(config, model, tmp_path):
    from hyperdb.web.session import Sessions

    made = Sessions(config, [model], tmp_path / "visits")
    made.root.mkdir()
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _served(tmp_path, *words: str):
    """Serve the page; yield its address, the folder of its temporary files, and the process."""
    port, log = free_port(), tmp_path / "log"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hyperdb", "web", f"port={port}", *words]
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 180
        while "the page is at" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", temporary, server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="session")
def served():
    """Return the context that serves the page with words of the command line, and writes into a folder."""
    return _served


@pytest.fixture(scope="session")
def chromium():
    """Return the path of an installed Chromium."""
    pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    return found
