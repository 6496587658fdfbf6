"""Launchers: accelerate reads its files, Hydra's plugin sends a job for each shard, and Ray takes them as tasks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyperdb import cli, config, options
from hyperdb.runtime.files import load_json
from hyperdb.runtime.share import Share
from hyperdb.tuning.memory import GIGABYTE

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


def test_why_every_process_keeps_the_whole_is_counted():
    """Five float32 numbers are kept of each that is trained, and one is exchanged."""
    folder = ROOT / "benchmarks"
    count = load_json(folder / "full_size.json")["parameters"]
    step = load_json(folder / "gpu_h200.json")["runs"]["train_hypernet_16"]["peak_gb"]
    decoder, encoder = (4 * count[name] / GIGABYTE for name in ("decoder", "encoder"))
    said = " ".join(DOCS.split())
    assert f"{count['decoder'] / 1e6:.1f} M numbers are trained" in said
    assert f"in float32, are {5 * decoder:.2f} GB" in said
    assert f"spare {5 * decoder * 7 / 8:.2f} GB of the {step:.1f} that" in said
    assert f"the frozen ViT-H, {encoder:.2f} GB" in said
    assert f"all that is trained takes {5 * (decoder + encoder):.2f} GB" in said
    gradients = f"exchanges {decoder:.2f} GB of gradients ({decoder + encoder:.2f} with the encoder)"
    assert gradients.replace("0.", ".") in said


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


@pytest.fixture
def words(tiny_base, rendered):
    """Return the settings of a store of four fits in two files."""
    return [
        f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "adapter.a=12",
        "adapter.b=8", f"data={rendered}", "start=template", "fit.trained=all", "fit.optimizer=adamw", "fit.steps=1",
        "fit.levels=1", "fit.views=1", "fit.rate=0.1", "identities=4", "batch=2", "num_shards=2",
    ]  # fmt: skip


def hyperdb(folder, *words):
    """Run a command in a folder, in a process of its own."""
    known = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "hyperdb", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=known, timeout=500)


def test_each_shard_is_a_job_of_submitit(words, tmp_path):
    """Two processes of their own make a store, of which each has done one file."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    told = ["shard=range(0,2)", f"out={tmp_path / 'store'}", "hydra/launcher=submitit_local"]
    done = hyperdb(tmp_path, "precompute", "-m", *words, *told)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "store" / "index.json").read_text())["fits"] == 4
    said = [path.read_text() for path in sorted((tmp_path / "multirun").rglob("*_log.out"))]
    assert len(said) == 2
    assert all("4 fits of" in text or "is done, others are not" in text for text in said)


# --- Ray


def test_each_shard_is_a_task_of_ray(words, tmp_path):
    """The folder is relative: every task works where the command was given."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    done = hyperdb(tmp_path, "precompute", "--ray", *words, "out=store")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "store" / "index.json").read_text())["fits"] == 4
    assert "4 fits of" in done.stdout + done.stderr


def test_shards_that_fail_are_told_by_their_numbers(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    lost = hyperdb(tmp_path, "preprocess", "--ray", "source=nowhere", "num_shards=2", "out=faces")
    assert lost.returncode == 2
    error = lost.stderr.splitlines()[-1]
    assert error.startswith("hyperdb: error: of 2 shards failed 0, 1: source=nowhere does not exist"), lost.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["personalize"], "personalize is not done in shards; --ray is for preprocess, precompute, evaluate"),
        (["preprocess", "num_shards=2", "shard=1"], "leave out shard="),
        (["preprocess", "num_shards=2", "sorce=photos"], "sorce"),
        (["preprocess", "num_shards=2", "-m"], "-m and --ray both divide the work"),
        (["preprocess", "num_shards=2"], "pip install -e '.[ray]'"),
    ],
)
def test_what_ray_cannot_do_is_said_before_it_begins(words, said, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert cli.main([*words, "--ray"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
