"""Every stage of the method at Stable Diffusion 1.5's size, with random weights: seconds and peak memory.

    pip install --no-deps open-clip-torch
    python benchmarks/full_size.py WORK [personalize generate precompute train_hypernet]     (all, or those named)

In the folder WORK: the base of random_sd15.py (bf16), a hypernetwork with a ViT-H/14 of random weights, a few rendered
people at 512 px. Then, each as its own process: `personalize` (prediction, 40 iterations), `generate`, `precompute`
of the fits, and `train_hypernet experiment=paper` with both losses, batch 1, killed after three optimiser steps and run
again for two more. Takes the better part of an hour on 2 cores and 10 GB of disk. Writes full_size.json beside this
file; what was not run stays there as it was.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import random_sd15
import torch

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion.targets import find_targets
from hyperdb.faces.image import save_png
from hyperdb.heads import Identity, View, render
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_metadata, save_json
from hyperdb.runtime.journal import read
from hyperdb.runtime.precision import cpu_has_bf16
from hyperdb.runtime.provenance import provenance

STAGES = ("personalize", "generate", "precompute", "train_hypernet")
STEPS, KILLED_AT = 5, 3  # of the training


def prepare(work: Path) -> dict[str, int]:
    """Make base, hypernetwork, photo and people, those that are missing; return parameter counts."""
    if not (work / "base/model_index.json").is_file():
        random_sd15.main(str(work / "base"), "bf16")
    file = work / "hypernet/hypernet.safetensors"
    settings = config.load("train_hypernet", ["experiment=paper", "model.encoder.pretrained=false"])
    settings.model.encoder.frozen = False  # so that the file holds its random weights
    with torch.device("meta"):
        unet, text_encoder, vae = random_sd15.models()
    layout = Layout.of(find_targets(unet, text_encoder))
    torch.manual_seed(0)
    model = Hypernet(settings.model, settings.adapter.build(layout))
    parts = {"unet": unet, "text_encoder": text_encoder, "vae": vae, "encoder": model.encoder, "decoder": model.decoder}
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    if not file.is_file():
        model.save(file, {})
    if not (work / "heads/index.json").is_file():
        people = ["size=512", "identities=2", "views=2", "photo_views=2", f"out={work / 'heads'}"]
        config.run("render_heads", people)
    save_png(work / "photo.png", render(Identity(1_100_003), View(), size=768))
    return {**count, "weight_tokens": len(layout.names), "lidb_numbers": model.lidb.numbers}


def process(words: list[str], watch: Path | None = None, until: int | None = None) -> dict[str, Any]:
    """Run one command; return its seconds, its peak memory, and when each step of the checkpoint `watch` was done."""
    began = time.perf_counter()
    steps: dict[int, float] = {}
    print("hyperdb", *words, flush=True)
    running = subprocess.Popen([sys.executable, "-m", "hyperdb", *words])
    killed = False
    while True:
        pid, status, usage = os.wait4(running.pid, os.WNOHANG)
        now = time.perf_counter() - began
        if pid:
            break
        if watch is not None and watch.is_file():
            try:
                steps.setdefault(int(load_metadata(watch)["step"]), round(now, 1))
            except UserError:  # replaced under our eyes
                continue
        if until is not None and until in steps and not killed:
            running.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.2)
    if status and not killed:
        sys.exit(f"hyperdb {words[0]} failed")
    found: dict[str, Any] = {"command": " ".join(["hyperdb", *words]), "seconds": round(now, 1)}
    found["peak_gb"] = round(usage.ru_maxrss / 2**20, 2)
    return {**found, **({"seconds_when_step_was_done": steps} if steps else {}), **({"killed": True} if killed else {})}


def main(work: Path, stages: list[str]) -> None:
    """Run the stages in order, write the JSON after each."""
    os.chdir(work)
    here = Path(".")
    out = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = load_json(out) if out.is_file() else {"runs": {}}
    result |= {"parameters": prepare(here), "cores": os.cpu_count(), "cpu_has_bf16": cpu_has_bf16()}
    result |= {"cpu": torch.backends.cpu.get_cpu_capability(), **provenance()}
    commit = result.pop("commit")
    base = ["diffusion=sd15", "diffusion.path=./base"]
    fits = [*base, "experiment=paper_fits", "data=heads", "identities=2", "batch=1", "fit.steps=2", "out=fits"]
    train = [*base, "experiment=paper", "data=heads", "validation=null", "weights=fits", "batch=1"]
    train += ["model.encoder.pretrained=false", "out=train"]
    train += ["fit_share=1.0", f"steps={STEPS}", "warmup=1", "save_every=1"]

    def done(name: str, run: dict[str, Any], **more: Any) -> None:
        result["runs"][name] = {**run, **more, "commit": commit}
        save_json(out, result)

    words = [*base, "hypernet=./hypernet", "image=photo.png", "preview=false", "finetune.levels=1", "out=person"]
    if "personalize" in stages:
        run = process(["personalize", *words])
        report = load_json("person/report.json")
        done("personalize", run, phases=report["seconds"], bytes=report["bytes"])
    if "generate" in stages:
        shutil.rmtree("pictures", ignore_errors=True)
        done("generate", process(["generate", *base, "adapter=person", "num_images=1", "out=pictures"]))
    if "precompute" in stages:
        shutil.rmtree("fits", ignore_errors=True)
        done("precompute", process(["precompute", *fits]))
    if "train_hypernet" in stages:
        shutil.rmtree("train", ignore_errors=True)
        checkpoint = here / "train/checkpoint.safetensors"
        done("train_hypernet", process(["train_hypernet", *train], checkpoint, KILLED_AT))
        resumed = process(["train_hypernet", *train], checkpoint)
        done("train_hypernet_resumed", resumed, last_step=read(here / "train/journal.jsonl")[-1])
    print(f"seconds and memory in {out}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder.resolve(), sys.argv[2:] or list(STAGES))
