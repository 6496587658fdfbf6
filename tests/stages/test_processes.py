"""Two processes do the work of one: its training, in which each goes on where the other was, fits, an evaluation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperdb import cli, config
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.runtime.journal import Journal

STEPS = 3
RATE = 0.003
WORDS = [
    "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "diffusion.device=cpu", "prior.images=2",
    "prior.prompts=[a photo of a face]", "adapter.a=12", "adapter.b=8",
]  # fmt: skip
FITS = [
    "by=person", "fit.views=2", "fit.steps=2", "fit.levels=2", "fit.rate=0.05", "identities=3", "start=template",
    "fit.trained=all", "fit.optimizer=adamw", "fit.prior_weight=0",
]  # fmt: skip
HYPER = [  # all terms of the loss; the people of the identity loss and those who have a fit cannot be halved
    "model.width=32", "model.heads=2", "model.iterations=2", "model.summary=2", "model.linear=true", "linear_rate=0.01",
    "model.encoder.name=vit_tiny_patch16_224", "model.encoder.size=32", "model.encoder.patch=16",
    "model.encoder.depth=1", "model.encoder.weights=null", "encoder_rate=0.0003", "batch=4", "levels=2", "warmup=1",
    f"rate={RATE}", "prior_weight=0.5", "prior_rows=1", "flips=true", "prompt_dropout=0.3", "target_style=any",
    "identity_weight=1", "identity_people=3", "identity_steps=2", "beta=0.5", "fit_share=0.25", f"steps={STEPS}",
    "save_every=2", "validation_people=2", "changed=[]",
]  # fmt: skip

RUNS = """
import json, os, sys
import torch.distributed as dist
from accelerate.state import AcceleratorState
from hyperdb import config
from hyperdb.runtime.journal import Journal

advance, replace = Journal.step, os.replace

def step(self, number, loss, **terms):
    if number > runs[0]["stop"]:
        raise KeyboardInterrupt
    losses.append([loss, sorted(terms)])
    advance(self, number, loss, **terms)

def watched(source, target):
    written.append(str(target))
    replace(source, target)

Journal.step, os.replace = step, watched
runs, found = json.loads(sys.argv[1]), []
while runs:
    losses, written = [], []
    os.environ["MASTER_PORT"] = str(runs[0]["port"])
    try:
        config.run("train_hypernet", runs[0]["words"])
    except KeyboardInterrupt:
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    found.append({"losses": losses, "written": written})
    runs.pop(0)
print(json.dumps(found))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_processes(*runs):
    """Run trainings, each of them in two processes; return what each process did in each."""
    told = json.dumps([{"words": words, "stop": stop, "port": free_port()} for words, stop in runs])
    command = [sys.executable, "-c", RUNS, told]
    known = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    begun = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                         env={**known, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in begun]
    assert [process.returncode for process in begun] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_two_processes_train_as_one_and_go_on_for_each_other(tiny_base, rendered, tmp_path, monkeypatch):
    shared = [f"diffusion.path={tiny_base}", *WORDS]
    people = ["identities=2", "views=2", "photo_views=2", "size=32", "workers=1", "split=validation"]
    unseen = config.run("render_heads", [*people, f"out={tmp_path / 'unseen'}"])
    fits = config.run("precompute", [*shared, *FITS, f"data={rendered}", f"out={tmp_path / 'fits'}"])
    words = [*shared, *HYPER, f"data={rendered}", f"weights={fits}", f"validation={unseen}"]
    losses, advance = [], Journal.step

    def train(name, stop=STEPS):
        def step(self, number, loss, **terms):
            if number > stop:
                raise KeyboardInterrupt
            losses.append([loss, sorted(terms)])
            advance(self, number, loss, **terms)

        monkeypatch.setattr(Journal, "step", step)
        losses.clear()
        return config.run("train_hypernet", [*words, f"out={tmp_path / name}"])

    whole = train("one")
    alone = list(losses)
    assert next(terms for _, terms in alone) == ["diffusion", "identity", "prior", "weights"]
    with pytest.raises(KeyboardInterrupt):
        train("one then two", stop=2)
    first, second = two_processes(
        ([*words, f"out={tmp_path / 'two'}"], STEPS),
        ([*words, f"out={tmp_path / 'one then two'}"], STEPS),
        ([*words, f"out={tmp_path / 'two then one'}"], 2),
    )
    train("two then one")
    rest = list(losses)

    parts = [first[0]["losses"], alone[:2] + first[1]["losses"], first[2]["losses"] + rest]
    for found in parts:
        assert [terms for _, terms in found] == [terms for _, terms in alone]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], rel=1e-4)
    assert [run["losses"] for run in second] == [run["losses"] for run in first]
    assert [run["written"] for run in second] == [[], [], []]
    assert any(Path(path).name == "hypernet.safetensors" for path in first[0]["written"])
    wanted = load_tensors(whole / "hypernet.safetensors")[0]
    for name in ("two", "one then two", "two then one"):
        weights = load_tensors(tmp_path / name / "hypernet.safetensors")[0]
        differ = torch.cat([(weights[key].float() - value.float()).abs().flatten() for key, value in wanted.items()])
        size = torch.cat([value.float().abs().flatten() for value in wanted.values()])
        # where a gradient is zero but for rounding, AdamW's step has any sign
        assert differ.max() <= 2 * STEPS * RATE, name
        assert (differ > 2e-3 + 2e-3 * size).float().mean() < 1e-3, name
        assert (tmp_path / name / "previews" / "step-000003.png").is_file()


def divided(stage, words):
    """Run a stage in two processes, which torchrun starts: `accelerate launch` starts one where there is no card."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    subprocess.run([sys.executable, *launcher, "-m", "hyperdb", stage, *words], check=True, timeout=500)


def same(one, two, pattern):
    """Assert that files of two folders hold the same bytes, and return how many there are."""
    files = [{path.name: path.read_bytes() for path in folder.glob(pattern)} for folder in (one, two)]
    assert files[0] == files[1]
    return len(files[0])


@pytest.mark.slow
def test_two_processes_divide_the_fits_of_one(tiny_base, rendered, tmp_path):
    words = [f"diffusion.path={tiny_base}", *WORDS, *FITS, "start=average", "average.steps=2", "average_people=2"]
    words += ["batch=1", f"data={rendered}"]
    whole = config.run("precompute", [*words, f"out={tmp_path / 'one'}"])
    divided("precompute", [*words, f"out={tmp_path / 'two'}"])
    assert same(whole, tmp_path / "two", "fits-*") == 3
    assert same(whole, tmp_path / "two", "*.safetensors") == 6  # where they begin, class pictures, mean and deviation
    one, two = (load_json(tmp_path / name / "index.json") for name in ("one", "two"))
    assert {**one, "commit": two["commit"], "dirty": two["dirty"]} == two  # the checkout may change meanwhile


@pytest.mark.slow
def test_two_processes_divide_an_evaluation_of_one(tiny_base, people, tmp_path):
    words = [f"diffusion.path={tiny_base}", *WORDS, "hypernet=null", f"data={people}", "people=3", "views=2"]
    words += ["images=2", "batch=1", "rows=[floor,lora,copy,ceiling]", "methods.lora.finetune.steps=2"]
    whole = config.run("evaluate", [*words, f"out={tmp_path / 'one'}"])
    divided("evaluate", [*words, f"out={tmp_path / 'two'}"])
    assert not (tmp_path / "two" / "results.json").exists()
    there = {path.stem for path in (tmp_path / "two" / "rows").iterdir()}
    assert there == {f"{row}-0-{k}of2" for row in ("floor", "lora", "copy", "ceiling") for k in range(2)}
    then, now = (load_json(out) for out in (whole, config.run("evaluate", [*words, f"out={tmp_path / 'two'}"])))
    for row in ("floor", "lora", "copy", "ceiling"):
        one, two = (load_tensors(tmp_path / name / "rows" / f"{row}.safetensors")[0] for name in ("one", "two"))
        # rounded as so many people are drawn at once
        assert (one["images"].int() - two["images"].int()).abs().max() <= 1
        assert now["values"][row].keys() == then["values"][row].keys()
        for name, values in then["values"][row].items():
            np.testing.assert_allclose(now["values"][row][name], values, atol=0.02)
    for name in ("persons", "methods", "settings", "made_from"):
        assert now[name] == then[name]


def refused(kind, out, capsys):
    assert cli.main(["train_hypernet", "diffusion.path=nowhere", f"out={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hyperdb: error: this configuration of accelerate asks for {kind}, but every process keeps")
    assert not out.exists()


def test_a_hypernetwork_in_parts_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    """FSDP of what accelerate itself makes of a file that asks for it, the others of the word that it would set."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    told = ["compute_environment: LOCAL_MACHINE", "distributed_type: FSDP", "num_processes: 8", "mixed_precision: 'no'"]
    (tmp_path / "fsdp2.yaml").write_text("\n".join([*told, "fsdp_config: {fsdp_version: 2}"]))
    asked = ["--config_file", str(tmp_path / "fsdp2.yaml"), "-m", "hyperdb", "train_hypernet"]
    args = launch._validate_launch_command(launch.launch_command_parser().parse_args(asked))[0]
    made = prepare_multi_gpu_env(args)
    assert made["FSDP_VERSION"] == "2"
    with monkeypatch.context() as launched:
        launched.setattr(os, "environ", {**os.environ, **made})
        refused("FSDP", tmp_path / "out", capsys)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused("DEEPSPEED", tmp_path / "out", capsys)


def test_what_processes_cannot_divide_is_refused(tiny_base, rendered, tmp_path, monkeypatch):
    from accelerate import Accelerator

    words = [f"diffusion.path={tiny_base}", *WORDS, *HYPER, f"data={rendered}", "weights=null", "validation=null"]
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(UserError, match="batch=4 people cannot be divided among 3 processes"):
        config.run("train_hypernet", [*words, f"out={tmp_path / 'out'}"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="render_heads is a work of one process, and 3 were launched"):
        config.run("render_heads", [f"out={tmp_path / 'heads'}"])
    assert list(tmp_path.iterdir()) == []
