"""How many people an hour are fitted: `hyperdb precompute`, many in a pass or one after another, and the public script.

    hyperdb render_heads split=validation identities=16 views=9 photo_views=9 out=data/heads_fits
    python benchmarks/fits.py data=data/heads_fits split=validation --script PATH
    python benchmarks/fits.py data=data/heads_fits split=validation --quick      (two people, two steps: does it run?)

PATH is your copy of diffusers' train_dreambooth_lora.py, as for experiments/tables/public_script.py; without it the
first two are compared alone. The words are settings of `hyperdb precompute`; `batch` is how many share a pass.

All learn the same photos of the same people; the script those of the first `--script-people` alone, one after another,
and by these all are judged. It takes as many steps, of `--ladder`, as it needs to be as like them as the fits are, on
photos that nobody has seen. Where none is enough, its last one counts and that is said. Then the three take turns, in
which the script has one person. Every command is a process of its own. The average that fits may begin at, and the
class pictures that hold it, are made before, once for all people there will be. Figures "without the start" leave out
what is always the same: of `precompute` the time of a job that has nothing to fit, of the script that of one step.

What is measured stays in the folder `--work`, so that the same command goes on where it was stopped, and with further
turns or steps does only these. On two cores a fit takes about 5 seconds and the script 15 and .18 for each step: about
35 minutes if 400 steps are enough, 45 if 800 are needed. Writes fits.json beside this file, unless it is quick.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
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
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.output import RECORD
from hyperdb.runtime.precision import cpu_has_bf16
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.recipe import plain, recipe
from hyperdb.stages.precompute import reference_rows
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import FitConfig

ROOT = Path(__file__).parent.parent
UNSEEN, IMAGES = 4, 8  # photos a person that judge, and pictures that are judged
NEAR = 0.005  # of face cosine: as like
TOGETHER, APART, SCRIPT = "precompute", "precompute, batch=1", "script"
AIMS = {APART: 8, SCRIPT: 20}  # times as many people an hour, at the same likeness


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


class Kept:
    """Measurements by name in a JSON file, each written as soon as it is made.

    `asked` says what they are of. Raises `UserError` for a file of something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        there = load_json(path) if path.is_file() else {"asked": {}, "found": {}}
        asked = plain(asked)
        if odd := [name for name, value in asked.items() if there["asked"].get(name, value) != value]:
            raise UserError(f"{path} has measurements of another {odd[0]}; choose another --work, or delete it")
        self.path, self.asked = path, there["asked"] | asked
        self.found: dict[str, float] = there["found"]

    def once(self, name: str, make: Callable[[], float]) -> float:
        """Return a measurement, made unless it was."""
        if name not in self.found:
            self.found[name] = round(make(), 4)
            save_json(self.path, {"asked": self.asked, "found": self.found})
        print(f"{name:40s}{self.found[name]:10.3f}", flush=True)
        return self.found[name]


def figures(
    seconds: dict[str, dict[str, Any]], steps: dict[str, int], reached: dict[str, float], people: int
) -> dict[str, Any]:
    """Return each row: people an hour with and without the start, and how many times fewer than the first."""
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        number, some = steps[name], 1 if name == SCRIPT else people  # people in each of the times
        median = statistics.median(times["whole"])
        alone = median - times["start"] if name != SCRIPT else (median - times["one_step"]) * number / (number - 1)
        rows[name] = {
            "steps": number, "cosine": reached[name], "as_like": reached[name] >= reached[TOGETHER] - NEAR,
            "people_an_hour": round(3600 * some / median, 1),
            "people_an_hour_without_start": round(3600 * some / max(alone, 1e-3), 1),
        }  # fmt: skip
    for row in rows.values():
        for figure in ("people_an_hour", "people_an_hour_without_start"):
            row[f"{figure}_ratio"] = round(rows[TOGETHER][figure] / row[figure], 2)
    return rows


def measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Fit, find the script's steps, take turns; return what was found."""
    words = [*given.words, "by=person", f"identities={given.people}"]
    settings = config.load("precompute", words)
    views, store = settings.fit.views, work / "store"
    if settings.fit.first_view or given.turns < 1 or min(given.ladder) < 2:
        raise UserError("fit.first_view must be 0 here, --turns at least 1, and --ladder steps of at least 2")
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
    count, judged = people.identities, min(given.script_people, people.identities)
    if judged < 2:
        raise UserError(f"--script-people {given.script_people}: expected at least 2")
    shown = people.images[torch.tensor(reference_rows(people, views))[:judged]]  #      [J, V, 3, H, W]
    unseen = people.images[torch.stack([rows[views : views + UNSEEN] for rows in people.photos[:judged]])]
    sites, layout = find_sites(base.unet, base.text_encoder), Layout.of(base.targets())
    standard = Standard([SFace()], None, shown, unseen, [], {}, [])
    device = torch.cuda.get_device_name() if base.device.type == "cuda" else "cpu"
    asked = {"recipe": recipe(settings), "start": settings.start, "base": base.digest, "data set": people.digest}
    asked |= {"number of people": count, "number of judges": judged, "device": device}
    if given.script is not None:
        sha = hashlib.sha256(given.script.read_bytes()).hexdigest()
        asked |= {"script": sha, "rate of the script": given.rate, "rank of the script": given.rank}
    kept = Kept(work / "measured.json", asked)

    def likeness(changes: Changes) -> float:
        pictures = draw(base, changes, judged, [base.config.instance_prompt] * IMAGES, list(range(IMAGES)))
        return standard.measure({"": pictures})[""]["cosine"].mean().item()

    def job(*more: str) -> float:
        return told([sys.executable, "-m", "hyperdb", "precompute", *words, f"out={store}", *more])

    def idle() -> float:
        """Return the seconds of a job for which no fits are left; the first makes where fits begin."""
        return job(f"num_shards={count + 1}", f"shard={count}")

    def fits(batch: int) -> float:
        """Fit everybody anew, beginning where the store's fits begin, which is the same for any `batch`."""
        for pattern in ("fits-*.safetensors", "statistics.safetensors", "index.json"):
            for path in store.glob(pattern):
                path.unlink()
        record = load_json(store / RECORD)  # whose the rest is
        for run in record["runs"]:
            run["made_from"]["batch"] = batch
        save_json(store / RECORD, record)
        return job(f"batch={batch}")

    def fitted() -> float:
        """Return the likeness of what the store holds."""
        there = load_store(store, layout)
        rows = there.rows_of(people.keys("person", torch.stack([rows[0] for rows in people.photos[:judged]])))
        return likeness(there.lidb.to(base.device).factors({"tokens": there.tokens[rows].to(base.device)}))

    def place(person: int, steps: int) -> Path:
        return work / "script" / f"{steps}-{person}"

    def trained(person: int, steps: int) -> float:
        """Run the script for a person, in a new folder."""
        folder = place(person, steps)
        shutil.rmtree(folder, ignore_errors=True)
        for view, photo in enumerate(shown[person]):
            save_png(folder / "photo" / f"{view}.png", photo.permute(1, 2, 0).numpy())
        where = {"{photo}": str(folder / "photo"), "{out}": str(folder / "out")}
        asked = command(steps)
        for name, value in where.items():
            asked = [word.replace(name, value) for word in asked]
        return told(asked)

    def drawn(steps: int) -> float:
        """Return the likeness of what the script has made."""
        made = [place(person, steps) / "out" / "pytorch_lora_weights.safetensors" for person in range(judged)]
        parts = [lora.read(file).factors(sites, base.config.path) for file in made]
        return likeness({k: LowRank(*map(torch.cat, zip(*(p[k] for p in parts), strict=True))) for k in parts[0]})

    # --- the first turn, in which the script has everybody who judges
    kept.once("where fits begin, seconds", idle)
    start = kept.once("precompute with nothing to fit, seconds", idle)
    batches, steps = {TOGETHER: settings.batch, APART: 1}, dict.fromkeys((TOGETHER, APART), settings.fit.steps)
    seconds: dict[str, dict[str, Any]] = {name: {"whole": [], "start": start} for name in batches}
    reached, ladder = {}, {}

    def all_fits(name: str, turn: int) -> None:
        seconds[name]["whole"].append(kept.once(f"{name}, turn {turn}, seconds", lambda: fits(batches[name])))

    def one_script(person: int, turn: int) -> float:
        number = steps[SCRIPT]
        name = f"{SCRIPT}, {number} steps, turn {turn}, person {person + 1}, seconds"
        return kept.once(name, lambda: trained(person, number))

    for name in batches:
        all_fits(name, 1)
        reached[name] = kept.once(f"{name}, face cosine", fitted)
    for number in given.ladder if given.script is not None else []:
        steps[SCRIPT] = number
        each = [one_script(person, 1) for person in range(judged)]
        reached[SCRIPT] = kept.once(f"{SCRIPT}, {number} steps, face cosine", lambda: drawn(steps[SCRIPT]))
        ladder[str(number)] = reached[SCRIPT]
        if reached[SCRIPT] >= reached[TOGETHER] - NEAR:
            break
    if ladder:
        seconds[SCRIPT] = {"whole": each, "one_step": kept.once(f"{SCRIPT}, one step, seconds", lambda: trained(0, 1))}

    # --- the others
    for turn in range(2, given.turns + 1):
        for name in batches:
            all_fits(name, turn)
        if ladder:
            seconds[SCRIPT]["whole"].append(one_script((turn - 2) % judged, turn))

    rows = figures(seconds, steps, reached, count)
    aims = {name: aim for name, aim in AIMS.items() if name in rows}
    return {
        "people": count, "judged": judged, "batch": settings.batch, "views": views, "rows": rows, "ladder": ladder,
        "seconds": seconds, "aims": aims,
        "within": {n: rows[n]["people_an_hour_ratio"] >= aim and rows[n]["as_like"] for n, aim in aims.items()},
        "device": device, "cores": os.cpu_count(), "cpu_has_bf16": cpu_has_bf16(), "base": base.digest, **provenance(),
    }  # fmt: skip


def main(arguments: list[str]) -> dict[str, Any]:
    """Measure what is not measured yet, print, write; return what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--work", type=Path, help="folder that stays; runs/fits, and none if it is quick")
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--script-people", type=int, default=4, help="the first so many, by whom all are judged")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ladder", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="steps of the script")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the script")
    parser.add_argument("--rank", type=int, default=4, help="of the script's LoRA")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    if given.quick:
        given.people, given.script_people, given.turns, given.ladder = 2, 2, 2, [2, 3]
        given.words += ["fit.steps=2", "average.steps=1", "prior.images=8"]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, given.work or Path(folder if given.quick else "runs/fits"))
    for name, row in result["rows"].items():
        print(
            f"{name:20s}{row['people_an_hour']:10.1f} people an hour ({row['people_an_hour_ratio']:.2f} x), "
            f"{row['people_an_hour_without_start']:.1f} without the start "
            f"({row['people_an_hour_without_start_ratio']:.2f} x), face cosine {row['cosine']:.3f} after "
            f"{row['steps']} steps{'' if row['as_like'] else ': LESS LIKE'}"
        )
    if not given.quick:
        save_json(Path(__file__).with_suffix(".json"), result)
    return result


if __name__ == "__main__":
    run_script(main)
