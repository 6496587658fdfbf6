"""Launchers: accelerate reads its files, Hydra's plugin sends a job for each shard."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyperdb import config, options
from hyperdb.runtime.share import Share

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "cluster.md").read_text()
ACCELERATE = {"gpu1": ("NO", 1, 1), "gpus8": ("MULTI_GPU", 1, 8), "nodes2": ("MULTI_GPU", 2, 16)}


def test_each_file_of_accelerate_is_known():
    found = {path.stem for path in (options.conf_dir() / "accelerate").glob("*.yaml")}
    assert found == set(ACCELERATE) == set(re.findall(r"conf/accelerate/(\w+)\.yaml", DOCS))


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_file(name):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(options.conf_dir() / "accelerate" / f"{name}.yaml"))
    assert (found.distributed_type.value, found.num_machines, found.num_processes) == ACCELERATE[name]
    assert found.mixed_precision == "no"
    assert found.use_cpu is False


@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm"])
def test_the_launchers_of_a_cluster_compose(launcher):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir

    schema = config.stage_module("precompute").Config
    assert issubclass(schema, Share)
    config.register("precompute", schema)
    told = next(line for line in DOCS.replace("\\\n", " ").splitlines() if "launcher=submitit_slurm" in line)
    words = [f"hydra/launcher={launcher}", "hydra.launcher.timeout_min=240", "hydra.launcher.gpus_per_node=1"]
    assert set(words[1:]) < set(told.split())
    with initialize_config_dir(str(options.conf_dir().resolve()), version_base="1.3"):
        found = compose("precompute", [*words, "shard=0", "num_shards=64"], return_hydra_config=True)
    assert found.hydra.launcher._target_.rpartition(".")[2] == f"{launcher.partition('_')[2].title()}Launcher"
    assert (found.hydra.launcher.timeout_min, found.hydra.launcher.gpus_per_node) == (240, 1)


def test_each_shard_is_a_job_of_submitit(tiny_base, rendered, tmp_path):
    """Two processes of their own make a store, of which each has done one file."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [
        f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "adapter.a=12",
        "adapter.b=8", f"data={rendered}", "start=template", "fit.trained=all", "fit.optimizer=adamw", "fit.steps=1",
        "fit.levels=1", "fit.views=1", "fit.rate=0.1", "identities=4", "batch=2", "num_shards=2", "shard=range(0,2)",
        f"out={tmp_path / 'store'}", "hydra/launcher=submitit_local",
    ]  # fmt: skip
    command = [sys.executable, "-m", "hyperdb", "precompute", "-m", *words]
    known = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=known, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "store" / "index.json").read_text())["fits"] == 4
    said = [path.read_text() for path in sorted((tmp_path / "multirun").rglob("*_log.out"))]
    assert len(said) == 2
    assert all("4 fits of" in text or "is done, others are not" in text for text in said)
