"""How many people an hour are fitted: `hyperdb precompute`, many in a pass or one after another, and the public script.

    hyperdb render_heads split=validation identities=8 views=9 photo_views=9 out=data/heads_fits
    python benchmarks/fits.py data=data/heads_fits split=validation --script PATH
    python benchmarks/fits.py data=data/heads_fits split=validation --quick      (two people, two steps: does it run?)

PATH is your copy of diffusers' train_dreambooth_lora.py, as for experiments/tables/public_script.py; without it the
first two are compared alone. The words are settings of `hyperdb precompute`.

All learn the same photos of the same people. The script takes as many steps, of `--ladder`, as it needs to be as like
the person as the fits are, on photos that nobody has seen; where none is enough, its last one is timed and that is
said. Then the three take turns. Every command is a process of its own, and the script takes one for each person. Each
is timed with all its steps and with one: what both have in common (start, loading, encoding, writing) is the difference
to its time "without the start". The average that fits may begin at is made before, once for all people there will be.
Writes fits.json beside this file, unless it is quick.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hyperdb import config
from hyperdb.adapters import LoRAConfig
from hyperdb.adapters.base import Changes, LowRank
from hyperdb.adapters.layout import Layout
from hyperdb.data.fits import load_store
from hyperdb.data.people import load_people
from hyperdb.diffusion.targets import find_sites
from hyperdb.faces.image import save_png
from hyperdb.formats import lora
from hyperdb.metrics.face import SFace
from hyperdb.metrics.figures import Standard
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import save_json
from hyperdb.runtime.precision import cpu_has_bf16
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.precompute import reference_rows
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import FitConfig

ROOT = Path(__file__).parent.parent
UNSEEN, IMAGES = 4, 8  # photos a person that judge, and pictures that are judged
TOGETHER, APART, SCRIPT = "precompute", "precompute, batch=1", "script"
AIMS = {APART: 8, SCRIPT: 20}  # times as many people an hour


def public_script() -> ModuleType:
    """Return the module that knows how the script is called."""
    spec = importlib.util.spec_from_file_location("public_script", ROOT / "experiments/tables/public_script.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(command: list[str]) -> float:
    """Run a command without a network and return its seconds. Raises `UserError` with its last line if it fails."""
    known = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    seconds = time.perf_counter() - began
    if done.returncode:
        *_, last = ["it printed nothing", *(done.stdout + done.stderr).splitlines()]
        raise UserError(f"{' '.join(command[1:4])} has failed: {last}")
    return seconds


def main(arguments: list[str]) -> dict[str, Any]:
    """Fit, find the script's steps, take turns, print, write; return what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ladder", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="steps of the script")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the script")
    parser.add_argument("--rank", type=int, default=4, help="of the script's LoRA")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    if given.quick:
        given.people, given.turns, given.ladder = 2, 1, [2, 3]
        given.words += ["fit.steps=2", "average.steps=1"]
    words = [*given.words, f"identities={given.people}"]
    settings = config.load("precompute", [*words, "by=person"])
    views = settings.fit.views
    if settings.fit.first_view or settings.fit.steps < 2:
        raise UserError("fit.first_view must be 0 here, and fit.steps at least 2")
    script = public_script()

    def command(steps: int) -> list[str]:
        tuning = FitConfig(steps=steps, levels=1, rate=given.rate)
        return script.command(given.script, settings.diffusion, LoRAConfig(rank=given.rank), tuning, text=True)

    if given.script is not None:
        command(1)  # says now what is wrong with the script
    base = settings.diffusion.load()
    people = load_people(settings.data, given.people, settings.split, settings.diffusion.size, first=settings.first)
    if people.identities < 2 or any(len(rows) < views + UNSEEN for rows in people.photos):
        raise UserError(f"{settings.data} needs at least two people with {views + UNSEEN} photos each")
    shown = people.images[torch.tensor(reference_rows(people, views))]  #              [I, V, 3, H, W]
    unseen = people.images[torch.stack([rows[views : views + UNSEEN] for rows in people.photos])]
    count, sites, layout = people.identities, find_sites(base.unet, base.text_encoder), Layout.of(base.targets())
    standard = Standard([SFace()], None, shown, unseen, [], {}, [])

    def likeness(changes: Changes) -> float:
        pictures = draw(base, changes, count, [base.config.instance_prompt] * IMAGES, list(range(IMAGES)))
        return standard.measure({"": pictures})[""]["cosine"].mean().item()

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)

        def fits(batch: int, steps: int) -> float:
            """Fit everybody anew, beginning at the average that is there, and return the seconds."""
            out = folder / f"fits{batch}-{steps}"
            for path in [*out.glob("fits-*.safetensors"), *out.glob("index.json")]:
                path.unlink()
            asked = [*words, "by=person", f"batch={batch}", f"fit.steps={steps}", f"out={out}"]
            return told([sys.executable, "-m", "hyperdb", "precompute", *asked])

        def loras(steps: int) -> float:
            """Run the script for one person after another, each in a new folder, and return the seconds."""
            seconds = 0.0
            for person, photos in enumerate(shown):
                place = folder / f"lora{person}"
                for path in sorted(place.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                for view, photo in enumerate(photos):
                    save_png(place / "photo" / f"{view}.png", photo.permute(1, 2, 0).numpy())
                where = {"{photo}": str(place / "photo"), "{out}": str(place / "out")}
                asked = command(steps)
                for name, value in where.items():
                    asked = [word.replace(name, value) for word in asked]
                seconds += told(asked)
            return seconds

        # --- the first of each makes the average, and is drawn
        steps = settings.fit.steps
        kinds: dict[str, tuple[Callable[[int], float], int]] = {
            TOGETHER: (lambda n: fits(count, n), steps),
            APART: (lambda n: fits(1, n), steps),
        }
        reached: dict[str, float] = {}
        for name, batch in ((TOGETHER, count), (APART, 1)):
            fits(batch, steps)
            fits(batch, 1)
            store = load_store(folder / f"fits{batch}-{steps}", layout)
            rows = store.rows_of(people.keys("person", torch.stack([rows[0] for rows in people.photos])))
            reached[name] = likeness(store.lidb.to(base.device).factors({"tokens": store.tokens[rows].to(base.device)}))
            print(f"{name}: {steps} steps, face cosine {reached[name]:.3f}", flush=True)
        for number in given.ladder if given.script is not None else []:
            loras(number)
            made = [folder / f"lora{person}" / "out" / "pytorch_lora_weights.safetensors" for person in range(count)]
            parts = [lora.read(file).factors(sites, base.config.path) for file in made]
            joined = {k: LowRank(*map(torch.cat, zip(*(p[k] for p in parts), strict=True))) for k in parts[0]}
            reached[SCRIPT], kinds[SCRIPT] = likeness(joined), (loras, number)
            print(f"{SCRIPT}: {number} steps, face cosine {reached[SCRIPT]:.3f}", flush=True)
            if reached[SCRIPT] >= reached[TOGETHER]:
                break

        # --- turns
        seconds: dict[str, dict[str, list[float]]] = {name: {"whole": [], "one_step": []} for name in kinds}
        for turn in range(given.turns):
            for name, (run, number) in kinds.items():
                for part, some in (("whole", number), ("one_step", 1)):
                    seconds[name][part].append(round(run(some), 3))
                print(f"turn {turn + 1}  {name:20s}{seconds[name]['whole'][-1]:10.2f} s", flush=True)

    result: dict[str, Any] = {"people": count, "views": views, "rows": {}, "seconds": seconds}
    for name, (_, number) in kinds.items():
        whole, once = (statistics.median(seconds[name][part]) for part in ("whole", "one_step"))
        trained = max(whole - once, 1e-3) * number / (number - 1)
        result["rows"][name] = {
            "steps": number, "cosine": round(reached[name], 4), "as_like": reached[name] >= reached[TOGETHER] - 0.005,
            "people_an_hour": round(3600 * count / whole, 1),
            "people_an_hour_without_start": round(3600 * count / trained, 1),
        }  # fmt: skip
    first = result["rows"][TOGETHER]
    for name, row in result["rows"].items():
        for figure in ("people_an_hour", "people_an_hour_without_start"):
            row[f"{figure}_ratio"] = round(first[figure] / row[figure], 2)
        print(
            f"{name:20s}{row['people_an_hour']:10.1f} people an hour ({row['people_an_hour_ratio']:.2f} x), "
            f"{row['people_an_hour_without_start']:.1f} without the start "
            f"({row['people_an_hour_without_start_ratio']:.2f} x), face cosine {row['cosine']:.3f} after "
            f"{row['steps']} steps{'' if row['as_like'] else ': LESS LIKE'}"
        )
    result["aims"] = {name: aim for name, aim in AIMS.items() if name in result["rows"]}
    ratios = {name: result["rows"][name]["people_an_hour_ratio"] for name in result["aims"]}
    result["within"] = {name: ratio >= AIMS[name] for name, ratio in ratios.items()}
    device = torch.cuda.get_device_name() if base.device.type == "cuda" else "cpu"
    result |= {"device": device, "cores": os.cpu_count(), "cpu_has_bf16": cpu_has_bf16(), "base": base.digest}
    result |= provenance()
    if not given.quick:
        save_json(Path(__file__).with_suffix(".json"), result)
    return result


if __name__ == "__main__":
    run_script(main)
