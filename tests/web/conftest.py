"""The page's settings and model at tiny size, and a browser if there is one."""

from __future__ import annotations

import shutil

import pytest

from hyperdb import config as configuration

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


@pytest.fixture(scope="session")
def chromium():
    """Return the path of an installed Chromium."""
    pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    return found
