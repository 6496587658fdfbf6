"""The full-size system on a graphics card, with random weights: seconds, memory, and what the method costs.

    pip install --no-deps open-clip-torch          (CLIP's vocabulary)
    python benchmarks/gpu.py [WORK] [minutes=9]

Makes a Stable Diffusion 1.5 and a hypernetwork with a ViT-H of random weights on the card, writes them to WORK (or to
a temporary folder), and runs the stages as a user would, each in this process: `personalize`, `generate` (1 and 8
pictures), `precompute` (people fitted side by side), `train_hypernet experiment=paper`. Beside each: the peak of the
allocator, what `dry_run=true` expects, and the share of the card's bf16 peak, itself measured by a product of large
matrices. Last, an iteration of the fast fine-tuning against the bare networks (iteration.py). Every figure is written
to gpu_CARD.json beside this file as soon as it is there, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import iteration
import random_sd15
import torch

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion.targets import find_targets
from hyperdb.faces.image import save_png
from hyperdb.heads import Identity, View, render
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.journal import read
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.memory import GIGABYTE, need

UNET, TEXT, DECODE, VIT = 0.80, 0.013, 2.5, 0.33  # TFLOP of a forward pass at 512 px (conf/experiment/paper.yaml)


def matrix_peak() -> float:
    """Return the TFLOP a second of an 8192 x 8192 x 8192 product in bf16, the median of ten."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * 8192**3 / 1e12 / sorted(times[3:])[5]


def prepare(work: Path) -> None:
    """Make base, hypernetwork, photo and people: everything the stages read."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        random_sd15.main(str(work / "base"), "bf16")
        settings = config.load("train_hypernet", ["experiment=paper", "model.encoder.pretrained=false"])
        settings.model.encoder.frozen = False  # so that the file holds its random weights
    with torch.device("meta"):
        unet, text_encoder, _ = random_sd15.models()
    layout = Layout.of(find_targets(unet, text_encoder))
    model = Hypernet(settings.model, settings.adapter.build(layout))
    model.save(work / "hypernet/hypernet.safetensors", {})
    words = ["size=512", "identities=16", "views=1", "photo_views=1", "workers=8", f"out={work / 'heads'}"]
    config.run("render_heads", words)
    save_png(work / "photo.png", render(Identity(1_100_003), View(), size=768))


def main(work: Path, minutes: float) -> None:
    """Prepare, run stage after stage while there is time, write after each."""
    began = time.perf_counter()
    card = torch.cuda.get_device_name(0)
    name = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_").removeprefix("nvidia_")
    out = Path(__file__).with_name(f"gpu_{name}.json")
    result: dict[str, Any] = load_json(out) if out.is_file() else {}
    peak = matrix_peak()
    result |= {"card": card, "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / GIGABYTE, 1)}
    result |= {"torch": torch.__version__, "bf16_peak_tflops": round(peak, 1), **provenance()}
    runs: dict[str, Any] = result.setdefault("runs", {})
    if not (work / "photo.png").is_file():
        prepare(work)
    print(f"models made after {time.perf_counter() - began:.0f} s", flush=True)
    torch.cuda.empty_cache()

    def left(name: str) -> bool:
        if time.perf_counter() - began < 60 * minutes:
            return True
        print(f"{name}: no time left", flush=True)
        return False

    def measure(name: str, stage: str, words: list[str], figures: Callable[[], dict[str, float]]) -> None:
        if not left(name):
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter()
        config.run(stage, words)
        torch.cuda.synchronize()
        took = time.perf_counter() - clock
        expected = need(config.stage_module(stage).passes, config.load(stage, words), "cuda").total / GIGABYTE
        run = {"command": " ".join(["hyperdb", stage, *words]).replace(str(work), "WORK"), "seconds": round(took, 2)}
        run |= {"peak_gb": round(torch.cuda.max_memory_allocated() / GIGABYTE, 2)}
        run |= {"reserved_gb": round(torch.cuda.max_memory_reserved() / GIGABYTE, 2)}
        run |= {"expected_gb": round(expected, 2), **figures()}
        runs[name] = run
        save_json(out, result)
        print(name, run, flush=True)

    def share(tflop: float, seconds: float) -> dict[str, float]:
        return {"tflop": round(tflop, 1), "share_of_peak": round(tflop / seconds / peak, 3)}

    base = ["diffusion=sd15", f"diffusion.path={work / 'base'}"]
    row = 2 * (UNET + TEXT)  # forward and backward through frozen weights, for one noise level

    # --- one person
    def personalized() -> dict[str, float]:
        seconds = load_json(work / "person/report.json")["seconds"]
        tuning = config.load("personalize", [*base, "image=none"]).finetune
        rows = tuning.steps * (tuning.levels + (tuning.prior_rows if tuning.prior_weight > 0 else 0))
        return {**{f"seconds_{k}": v for k, v in seconds.items()}, **share(rows * row, seconds["finetune"])}

    person = [*base, f"hypernet={work / 'hypernet'}", f"image={work / 'photo.png'}", "preview=false", "prior.images=8"]
    shutil.rmtree(work / "person", ignore_errors=True)
    measure("personalize", "personalize", [*person, f"out={work / 'person'}"], personalized)
    shutil.rmtree(work / "person", ignore_errors=True)
    measure("personalize_again", "personalize", [*person, f"out={work / 'person'}"], personalized)

    # --- pictures
    for count in (1, 8):
        folder = work / f"pictures{count}"
        shutil.rmtree(folder, ignore_errors=True)
        words = [*base, f"adapter={work / 'person'}", f"num_images={count}", f"batch={count}", f"out={folder}"]
        cost = count * (100 * UNET + DECODE)
        measure(f"generate_{count}", "generate", words, lambda cost=cost: {"tflop": round(cost, 1)})  # type: ignore[misc]

    # --- fits: the same rows for 4 and for 16 people side by side
    for people in (4, 16):
        steps, levels = 20, 1
        words = [*base, "experiment=paper_fits", f"data={work / 'heads'}", f"identities={people}", f"batch={people}"]
        words += [f"fit.steps={steps}", f"out={work / f'fits{people}'}"]
        shutil.rmtree(work / f"fits{people}", ignore_errors=True)
        rows = people * steps * levels
        measure(f"precompute_{people}", "precompute", words, lambda rows=rows: {"rows": rows})  # type: ignore[misc]

    # --- the paper's training, both losses
    for batch in (16, 48):
        folder, steps = work / f"train{batch}", 100

        def trained(folder: Path = folder, batch: int = batch) -> dict[str, float]:
            records = {r["step"]: r["seconds"] for r in read(folder / "journal.jsonl")}
            second = (records[100] - records[50]) / 50
            return {"seconds_a_step": round(second, 4), **share(batch * (row + VIT), second)}

        words = [*base, "experiment=paper", f"data={work / 'heads'}", "validation=null", f"weights={work / 'fits16'}"]
        words += [f"batch={batch}", "model.encoder.pretrained=false", "fit_share=1.0", f"steps={steps}", "warmup=10"]
        words += ["save_every=100000", f"out={folder}"]
        shutil.rmtree(folder, ignore_errors=True)
        measure(f"train_hypernet_{batch}", "train_hypernet", words, trained)

    # --- the method over the bare networks
    if left("iteration"):
        runs["iteration"] = iteration.measure([*base, "repeats=15"])
    save_json(out, result)
    print(f"{out}, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if not w.startswith("minutes=")]
    limit = float(next((w.partition("=")[2] for w in sys.argv[1:] if w.startswith("minutes=")), "9"))
    if not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device here; full_size.py measures the same on a CPU")
    if words:
        Path(words[0]).mkdir(parents=True, exist_ok=True)
        main(Path(words[0]).resolve(), limit)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder), limit)
