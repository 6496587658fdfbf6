"""What reading 15,000 pictures of 512 px and as many fits takes: memory, seconds to the first batch, time waited.

    python benchmarks/data.py WORK [pictures=15000] [size=512] [fits=15000] [steps=60]

In the folder WORK, which stays: rendered people of 64 px, enlarged and shifted until there are so many pictures, PNG as
`hyperdb preprocess` writes them; a base of Stable Diffusion's latents with few numbers; the cache; a store of random
fits of Stable Diffusion's LiDB. Then, each as a process of its own, the data part of `train_hypernet experiment=paper`
with an empty cache and a full one, that of `precompute experiment=paper_fits`, and the store. The networks are left
out: a step sleeps as long as one takes on the card of gpu_h200.json, a fit of 200 iterations as long as there. Memory
is what comes on top of the networks: `anonymous` cannot be given back, `resident` counts pages of files too, which the
system drops when it needs room. Writes data.json beside this file; takes about an hour the first time, 10 GB of disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import random_sd15
import torch
from PIL import Image

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.data import fits
from hyperdb.data.people import load_people
from hyperdb.diffusion.targets import find_targets
from hyperdb.faces.image import save_png
from hyperdb.runtime.files import load_json, save_json, save_lines
from hyperdb.runtime.provenance import provenance

GIGABYTE = 2**30
WORDS = ["a", "photo", "of", "face", "sks"]
FIT = 10.0  # seconds of 200 iterations of 16 people on that card, less than what its runs of 20 say
LIMITS = {"memory_gb": 1.5, "first_batch_seconds": 20, "waited": 0.03}


def status(name: str) -> float:
    """Return a line of /proc/self/status in GB."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) / GIGABYTE


@contextmanager
def memory(found: dict[str, Any]) -> Iterator[None]:
    """Put down by how many GB the process grows at most within the block."""
    before = {name: status(name) for name in ("RssAnon", "VmRSS")}
    most, ended = dict(before), threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for name in most:
                most[name] = max(most[name], status(name))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
    found["anonymous_gb"] = round(most["RssAnon"] - before["RssAnon"], 3)
    found["resident_gb"] = round(most["VmRSS"] - before["VmRSS"], 3)


def make(work: Path, pictures: int, size: int) -> None:
    """Write base and faces, those that are missing."""
    if not (work / "base/model_index.json").is_file():
        from diffusers import AutoencoderKL

        from hyperdb.stages.train_base import Config, new_base, save_base

        torch.manual_seed(0)
        levels = 4  # halved three times, as Stable Diffusion's
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(4, 4, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=size,
            mid_block_add_attention=False,
        )  # fmt: skip
        small = Config(channels=[16, 32], heads=[2, 2], text_width=32, text_layers=1)
        save_base(new_base(small, vae, WORDS), work / "base")
    drawn = ["size=64", f"identities={max(2, min(200, pictures // 30))}", "views=6", "photo_views=6"]
    people = load_people(str(config.run("render_heads", [*drawn, f"out={work / 'heads'}"])))
    faces, records = work / f"faces{size}", []
    for k in range(pictures):
        name = f"faces/{k:05d}.png"
        if not (faces / name).is_file():
            pixels = people.images[k % len(people)].roll(k // len(people), -1).permute(1, 2, 0).numpy()
            save_png(faces / name, np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)))
        records.append({"file": name, "identity": f"{k // 3}", "split": "train"})  # three pictures of each
    save_lines(faces / "manifest.jsonl", records)


def settings(stage: str, work: Path, size: int) -> Any:
    """Return the paper's settings of a stage, for the base and the faces made here."""
    named = {"train_hypernet": ["experiment=paper", "weights=null"], "precompute": ["experiment=paper_fits"]}[stage]
    base = [f"diffusion.path={work / 'base'}", f"diffusion.size={size}", "diffusion.dtype=fp32", "diffusion.device=cpu"]
    return config.load(stage, [*named, *base, f"data={work / f'faces{size}'}", "batch=16"])


def training(work: Path, size: int, steps: int) -> dict[str, Any]:
    """Read as the hypernetwork's training does: everybody's latents, a photo of 16 people in each step."""
    from hyperdb.stages.train_hypernet import Batches

    whole = settings("train_hypernet", work, size)
    base = whole.diffusion.load()
    step = load_json(Path(__file__).with_name("gpu_h200.json"))["runs"]["train_hypernet_16"]["seconds_a_step"]
    found: dict[str, Any] = {"seconds_a_step": step}
    waited = 0.0
    with memory(found):
        began = time.perf_counter()
        people = load_people(whole.data, size=size)
        found["pictures"] = len(people)
        found["seconds_to_find"] = round(time.perf_counter() - began, 2)
        people.keys("image", torch.cat(people.photos))  # whose fit is whose
        batches = Batches(whole, base, people, torch.full((len(people),), -1), None)
        batches.ahead(0, 0, 1)
        found["first_batch_seconds"] = round(time.perf_counter() - began, 2)
        for number in range(1, steps + 1):
            time.sleep(step)
            began = time.perf_counter()
            batches.ahead(number, 0, 1)
            waited += time.perf_counter() - began
    return found | {"waited": round(waited / (waited + steps * step), 4)}


def fitting(work: Path, size: int, steps: int) -> dict[str, Any]:
    """Read as precomputing does: the photos of 16 fits, then a long fit."""
    from hyperdb.stages.precompute import KEYS, _photos

    whole = settings("precompute", work, size)
    found: dict[str, Any] = {}
    with memory(found):
        began = time.perf_counter()
        people = load_people(whole.data, whole.identities, whole.split, size, first=whole.first, photos=whole.photos)
        rows = _photos(whole, people, whole.fit.first_view)
        for part in rows[:, 0].split(KEYS):
            people.keys(whole.by, part)
        people.images[rows[: whole.batch].flatten()]
        found["first_batch_seconds"] = round(time.perf_counter() - began, 2)
        began, count = time.perf_counter(), 0
        for photos in list(rows.split(whole.batch))[1 : 1 + steps]:
            people.images[photos.flatten()]
            count += 1
        seconds = (time.perf_counter() - began) / max(1, count)
    return found | {"seconds_a_batch": round(seconds, 3), "waited": round(seconds / (seconds + FIT), 4)}


def store(work: Path, count: int) -> dict[str, Any]:
    """Write a store of random fits, open it, read a row, read everything in random order."""
    with torch.device("meta"):
        unet, text_encoder, _ = random_sd15.models()
    layout = Layout.of(find_targets(unet, text_encoder))
    lidb = config.load("precompute", ["experiment=paper_fits"]).adapter.tokens(layout)
    folder, g = work / "fits", torch.Generator().manual_seed(0)
    if not (folder / "index.json").is_file() or load_json(folder / "index.json")["fits"] != count:
        keys = torch.arange(count).split(16)
        for number, part in enumerate(keys):
            fits.save_shard(folder, number, torch.randn(len(part), *lidb.mask.shape, generator=g) * lidb.mask, part, "")
        fits.finish(folder, len(keys), lidb, {"by": "image"})
    size = sum(file.stat().st_size for file in folder.iterdir())
    found: dict[str, Any] = {"fits": count, "numbers": lidb.numbers, "gb": round(size / GIGABYTE, 3)}
    with memory(found):
        began = time.perf_counter()
        opened = fits.load_store(folder, lidb.layout)
        found["seconds_to_open"] = round(time.perf_counter() - began, 2)
        order = torch.randperm(count, generator=g)
        began = time.perf_counter()
        for row in order[:100].tolist():
            opened.tokens[row]
        found["milliseconds_a_row"] = round(10 * (time.perf_counter() - began), 3)
        began = time.perf_counter()
        for rows in order.split(16):
            opened.tokens[rows]
        found["seconds_an_epoch"] = round(time.perf_counter() - began, 2)
    return found


def measured(work: Path, *part: Any) -> dict[str, Any]:
    """Run a part in a process of its own and return what it found."""
    words = [sys.executable, __file__, str(work), "part", *map(str, part)]
    environment = {**os.environ, "HYPERDB_CACHE": str(work / "cache")}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(*part, found, flush=True)
    return found


def main(work: Path, pictures: int = 15000, size: int = 512, fits: int = 15000, steps: int = 60) -> None:
    """Make what is missing, measure, compare with what is wanted, write."""
    make(work, pictures, size)
    for file in (work / "cache").glob("*"):
        file.unlink()
    result: dict[str, Any] = {"size": size, "train_hypernet_empty_cache": measured(work, "training", size, steps)}
    result["train_hypernet"] = measured(work, "training", size, steps)
    result["precompute"] = measured(work, "fitting", size, steps)
    result["store"] = measured(work, "store", fits)
    runs = [result[name] for name in ("train_hypernet_empty_cache", "train_hypernet", "precompute")]
    result["limits"] = LIMITS
    result["within"] = {
        "memory_gb": max(run["anonymous_gb"] for run in (*runs, result["store"])) <= LIMITS["memory_gb"],
        "first_batch_seconds": max(run["first_batch_seconds"] for run in runs[1:]) <= LIMITS["first_batch_seconds"],
        "waited": max(run["waited"] for run in runs) <= LIMITS["waited"],
    }
    print(save_json(Path(__file__).with_suffix(".json"), {**result, **provenance()}), result["within"])


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[2] == "part":
        print(json.dumps(globals()[sys.argv[3]](Path(sys.argv[1]), *map(int, sys.argv[4:]))))
    elif len(sys.argv) > 1:
        told = dict(word.split("=") for word in sys.argv[2:])
        main(Path(sys.argv[1]).resolve(), **{name: int(value) for name, value in told.items()})
    else:
        sys.exit(__doc__)
