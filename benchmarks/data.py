"""What reading 15,000 pictures of 512 px and as many fits takes: memory, seconds to the first batch, time waited.

    python benchmarks/data.py WORK [pictures=15000] [size=512] [fits=15000] [steps=60]

In the folder WORK, which stays: rendered people of 64 px, enlarged and shifted until there are so many pictures, PNG as
`hyperdb preprocess` writes them; a base of Stable Diffusion's latents with few numbers; the cache; a store of random
fits of Stable Diffusion's LiDB, of these pictures. Then, each as a process of its own, with an empty cache and a full
one, the data part of `train_hypernet experiment=paper`, the store and what is learned from it included, and that of
`precompute experiment=paper_fits`; last the store alone. The networks are left out: a step sleeps as long as one takes
on the card of gpu_h200.json, a fit of 200 iterations counts as long as there, and an encoder of few numbers sees the
photos that features are standardised by. Memory is what comes on top of the networks: `anonymous` cannot be given back,
`resident` counts pages of files too, which the system drops when it needs room. Writes data.json beside this file;
takes about 45 minutes the first time, 6 GB of disk.
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
from hyperdb.adapters.lidb import LiDB
from hyperdb.data import fits
from hyperdb.data.people import load_people
from hyperdb.diffusion.targets import find_targets
from hyperdb.faces.image import save_png
from hyperdb.runtime.files import load_json, save_json, save_lines
from hyperdb.runtime.provenance import provenance

GIGABYTE = 2**30
WORDS = ["a", "photo", "of", "face", "sks"]
ENCODER = ["name=vit_tiny_patch16_224", "size=32", "patch=16", "depth=1", "pretrained=false"]
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
    """Return the paper's settings of a stage, for the base, the faces and the fits made here."""
    small = ["model.width=32", "model.heads=2", *(f"model.encoder.{word}" for word in ENCODER)]
    trained = ["experiment=paper", f"weights={work / 'fits'}", *small]
    named = {"train_hypernet": trained, "precompute": ["experiment=paper_fits"]}[stage]
    base = [f"diffusion.path={work / 'base'}", f"diffusion.size={size}", "diffusion.dtype=fp32", "diffusion.device=cpu"]
    return config.load(stage, [*named, *base, f"data={work / f'faces{size}'}", "batch=16"])


def paper_lidb() -> LiDB:
    """Return Stable Diffusion's LiDB, without its networks."""
    with torch.device("meta"):
        unet, text_encoder, _ = random_sd15.models()
    return config.load("precompute", ["experiment=paper_fits"]).adapter.tokens(
        Layout.of(find_targets(unet, text_encoder))
    )


def filled(work: Path, size: int, count: int) -> dict[str, Any]:
    """Write a store of random fits of the first pictures, unless it is there; those beyond the last are nobody's."""
    people, folder = load_people(str(work / f"faces{size}"), size=size), work / "fits"
    made = {"by": "image", "data": people.digest}
    index = load_json(folder / "index.json") if (folder / "index.json").is_file() else {}
    if {"fits": count, **made}.items() <= index.items():
        return {"fits": count}
    for path in folder.glob("*"):
        path.unlink()
    lidb, g = paper_lidb(), torch.Generator().manual_seed(0)
    keys = people.keys("image", torch.cat(people.photos))[:count]
    parts = torch.cat([keys, torch.arange(len(keys) - count, 0)]).split(16)
    for number, part in enumerate(parts):
        fits.save_shard(folder, number, torch.randn(len(part), *lidb.mask.shape, generator=g) * lidb.mask, part, "")
    fits.finish(folder, len(parts), lidb, made)
    return {"fits": count}


def training(work: Path, size: int, steps: int) -> dict[str, Any]:
    """Read as the hypernetwork's training does: everybody's fits and latents, a photo of 16 people in each step."""
    from hyperdb.hypernet.loss import WeightSpace
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.stages.train_hypernet import FEATURE_PHOTOS, Batches

    whole = settings("train_hypernet", work, size)
    base, layout = whole.diffusion.load(), paper_lidb().layout
    step = load_json(Path(__file__).with_name("gpu_h200.json"))["runs"]["train_hypernet_16"]["seconds_a_step"]
    found: dict[str, Any] = {"seconds_a_step": step}
    waited = 0.0
    with memory(found):
        began = clock = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            found[name] = round(time.perf_counter() - clock, 2)
            clock = time.perf_counter()

        people = load_people(whole.data, size=size)
        photos, found["pictures"] = torch.cat(people.photos), len(people)
        lap("seconds_to_find")
        store = fits.load_store(whole.weights, layout)
        found["store"] = store.digest
        lap("seconds_of_the_store")
        fit_rows = torch.full((len(people),), -1)
        fit_rows[photos] = store.rows_of(people.keys(store.by, photos))  # whose fit is whose
        found["with_a_fit"] = int((fit_rows >= 0).sum())
        lap("seconds_of_the_keys")
        batches = Batches(whole, base, people, fit_rows, None)
        lap("seconds_of_the_latents")
        torch.manual_seed(0)  # the encoder has the same numbers in each run, as in a training: its features are kept
        model = Hypernet(whole.model, store.lidb, whole.default_spread)
        model.standardise(store.tokens, store.moment)
        shown = photos[:FEATURE_PHOTOS]
        model.standardise_features(people.images.part(shown), people.images.key(shown))
        WeightSpace(store.lidb, store.tokens, whole.weight_loss, store.moment)
        lap("seconds_to_standardise")

        def read(number: int) -> None:
            rows = batches.ahead(number, 0, 1).fit_rows
            store.tokens[rows[rows >= 0]]

        read(0)
        found["first_batch_seconds"] = round(time.perf_counter() - began, 2)
        for number in range(1, steps + 1):
            time.sleep(step)
            clock = time.perf_counter()
            read(number)
            waited += time.perf_counter() - clock
    return found | {"waited": round(waited / (waited + steps * step), 4)}


def fitting(work: Path, size: int, steps: int) -> dict[str, Any]:
    """Read as precomputing does: the keys of many files at once, then of each file the photos, then a long fit.

    Whole groups of files are counted, `steps` files at least. The first batch is there when its keys and photos are.
    """
    from hyperdb.stages.precompute import KEYS, _photos, file_keys

    whole = settings("precompute", work, size)
    found: dict[str, Any] = {}
    with memory(found):
        began = time.perf_counter()
        people = load_people(whole.data, whole.identities, whole.split, size, first=whole.first, photos=whole.photos)
        files = _photos(whole, people, whole.fit.first_view).split(whole.batch)
        found["seconds_to_find"] = round(time.perf_counter() - began, 2)
        together, seconds = max(1, KEYS // whole.batch), []
        keys_of = file_keys(people, whole.by, files, whole.batch)
        for k, photos in enumerate(files[: -(-steps // together) * together]):
            clock = time.perf_counter()
            keys_of(k)
            people.images[photos.flatten()]
            seconds.append(time.perf_counter() - clock)
    mean = sum(seconds) / len(seconds)
    found["first_batch_seconds"] = round(found["seconds_to_find"] + seconds[0], 2)
    return found | {"files": len(seconds), "seconds_a_batch": round(mean, 3), "waited": round(mean / (mean + FIT), 4)}


def store(work: Path, count: int) -> dict[str, Any]:
    """Open the store of fits, read a row, read everything in random order."""
    folder, lidb, g = work / "fits", paper_lidb(), torch.Generator().manual_seed(0)
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
    measured(work, "filled", size, fits)
    result: dict[str, Any] = {"size": size}
    for name, part in (("train_hypernet", "training"), ("precompute", "fitting")):
        for file in (work / "cache").glob("*"):
            file.unlink()
        result[f"{name}_empty_cache"] = measured(work, part, size, steps)
        result[name] = measured(work, part, size, steps)
    result["store"] = measured(work, "store", fits)
    runs = [run for name, run in result.items() if name.startswith(("train_hypernet", "precompute"))]
    warm = [run for name, run in result.items() if name in ("train_hypernet", "precompute", "precompute_empty_cache")]
    result["limits"] = LIMITS | {"first_batch_of": "all but train_hypernet_empty_cache, which encodes every picture"}
    result["within"] = {
        "memory_gb": max(run["anonymous_gb"] for run in (*runs, result["store"])) <= LIMITS["memory_gb"],
        "first_batch_seconds": max(run["first_batch_seconds"] for run in warm) <= LIMITS["first_batch_seconds"],
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
