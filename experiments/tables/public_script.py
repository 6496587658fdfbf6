"""Check the row `lora` against the script that it follows, diffusers' LoRA DreamBooth: same base, people and settings.

    hyperdb render_heads split=validation identities=3 views=9 photo_views=9 out=data/heads_script
    python experiments/tables/public_script.py --script PATH data=data/heads_script steps=200 rate=2e-3

PATH is your own copy of examples/dreambooth/train_dreambooth_lora.py of github.com/huggingface/diffusers, at the tag of
the diffusers that is installed (`pip show diffusers`). It is run as it is, without a network, and needs the extra peft.

Rows: the base; the script; `alike`, hyperdb's trainer at the places that the script adapts, begun as widely as it
begins; `places`, at those places alone; `lora`, as conf/adapters/lora.yaml says. The words are steps, rate and rank,
which hold for all of these and are else those of that yaml, and settings of `hyperdb evaluate experiment=sweep/lora`,
such as people, images and seeds.
Writes public_script.json beside this file; what the script has trained is kept in the folder `--runs`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperdb import config
from hyperdb.adapters import LoRAConfig
from hyperdb.adapters.base import Adapter, LowRank
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.data.people import load_people
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.targets import find_sites
from hyperdb.faces.image import save_png
from hyperdb.formats import lora
from hyperdb.metrics.face import SFace
from hyperdb.metrics.figures import Standard, differences, summary
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import load_text, save_json
from hyperdb.runtime.optim import adamw
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.evaluate import Config
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import Begin, FitConfig, fit
from hyperdb.tuning.trainable import numbers, trainable

SCRIPT = "examples/dreambooth/train_dreambooth_lora.py"
WORDS = ["experiment=sweep/lora", "people=3", "images=8", "styled=[]", "hypernet=null", "diffusion.dtype=fp32"]
SHORT = {"steps": "methods.lora.finetune.", "rate": "methods.lora.finetune.", "rank": "methods.lora.adapter."}
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
LEFT = (  # options of the script that decide the training too, and that are left as it has them
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "lr_scheduler", "lora_dropout",
    "with_prior_preservation", "center_crop",
)  # fmt: skip
AGAINST = {"script": ["base"], "alike": ["script"], "places": ["alike"], "lora": ["places", "script", "base"]}


def read(words: list[str]) -> tuple[Config, LoRAConfig, FitConfig]:
    """Return the settings of `hyperdb evaluate`, and what the row `lora` trains and how."""
    keys = {word: word.partition("=")[0] for word in words}
    whole = config.load("evaluate", [*WORDS, *(f"{SHORT.get(k, '')}{w}" for w, k in keys.items())])
    adapter, settings = whole.methods["lora"].adapter, whole.fit("lora")
    assert isinstance(adapter, LoRAConfig)
    if settings.levels != 1:
        raise UserError(f"methods.lora.finetune.levels={settings.levels}: expected 1, as in the script")
    return whole, adapter, dataclasses.replace(settings, seed=settings.seed + whole.seed)


def options(script: Path) -> dict[str, Any]:
    """Return the options of a script by name, and their defaults, without running it. Raises `UserError`."""
    if not script.is_file():
        raise UserError(
            f"no script at {script}: fetch {SCRIPT} of github.com/huggingface/diffusers, tag v{version('diffusers')}"
        )
    try:
        tree = ast.parse(load_text(script))
    except SyntaxError as error:
        raise UserError(f"{script} is not Python (line {error.lineno}): fetch the file itself, not its page") from error
    found = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "add_argument" and call.args:
            name = getattr(call.args[0], "value", None)
            default = next((word.value for word in call.keywords if word.arg == "default"), None)
            if isinstance(name, str) and name.startswith("--"):
                found[name[2:]] = default.value if isinstance(default, ast.Constant) else None
    return found


def command(script: Path, base: DiffusionConfig, adapter: LoRAConfig, settings: FitConfig, text: bool) -> list[str]:
    """Return how the script is run, with {photo} and {out} for the folders of the photo and of what it makes.

    All that is not named is left as the script has it. Raises `UserError` for a script that does not take all of it.
    """
    flags = {
        "pretrained_model_name_or_path": resolve(base.path), "instance_data_dir": "{photo}", "output_dir": "{out}",
        "instance_prompt": base.instance_prompt, "resolution": base.size, "mixed_precision": PRECISION[base.dtype],
        "train_batch_size": 1, "max_train_steps": settings.steps, "learning_rate": settings.rate, "rank": adapter.rank,
        "seed": settings.seed,
    }  # fmt: skip
    needed = [*flags, "train_text_encoder", *LEFT]
    if missing := [name for name in needed if name not in options(script)]:
        raise UserError(f"{script} knows no --{missing[0]}: is it {SCRIPT} of diffusers?")
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, str(script), *words, *(["--train_text_encoder"] if text else [])]


def run(words: list[str], image: torch.Tensor, digest: str, runs: Path) -> Path:
    """Run the `command` on one photo `[3, H, W]`, unless it was, and return the LoRA that it wrote.

    `digest` stands for the contents of base and script. Raises `UserError` where the script fails.
    """
    folder = runs / hashlib.sha256(f"{digest} {words[2:]}".encode() + image.numpy().tobytes()).hexdigest()[:16]
    file, photo, out, log = (folder / name for name in ("lora.safetensors", "photo", "out", "log.txt"))
    if file.is_file():
        return file
    save_png(photo / "photo.png", image.permute(1, 2, 0).numpy())
    told = [word.replace("{photo}", str(photo)).replace("{out}", str(out)) for word in words]
    with log.open("wb") as printed:
        done = subprocess.run(told, stdout=printed, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    made = out / "pytorch_lora_weights.safetensors"
    if done.returncode or not made.is_file():
        *_, last = ["it printed nothing", *log.read_text(encoding="utf-8", errors="replace").splitlines()]
        raise UserError(f"{words[1]} has failed: {last} (all that it printed: {log})")
    os.replace(made, file)
    return file


def alike(base: Base, adapter: LoRAConfig, names: list[str], people: int) -> tuple[Adapter, Begin]:
    """Return the adapter over the layers of these names, and its start as PEFT's `gaussian` has it: deviation 1 / r."""
    built = adapter.build(Layout.listing({name: Site(name, base.sites(names)[name]) for name in names}))
    params = built.init(people)
    for name, value in params.items():
        if name.endswith(".down"):
            value *= value[0, 0].numel() ** 0.5 / adapter.rank
    return built, Begin(params, {})


def differing(defaults: dict[str, Any], rank: int) -> dict[str, dict[str, Any]]:
    """Return what the script and the row `lora` do otherwise, beside the places that they adapt."""
    ours = adamw([torch.nn.Parameter(torch.zeros(1))], 1.0).defaults
    return {
        "betas": {"script": [defaults["adam_beta1"], defaults["adam_beta2"]], "hyperdb": list(ours["betas"])},
        "weight_decay": {"script": defaults["adam_weight_decay"], "hyperdb": ours["weight_decay"]},
        "longest_gradient": {"script": defaults["max_grad_norm"], "hyperdb": None},
        "deviation_of_down_at_the_start": {"script": 1 / rank, "hyperdb": "1 / sqrt(inputs)"},
    }


def main(arguments: list[str]) -> None:
    """Run the script, train, draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--unet-only", action="store_true", help="script and `alike` leave the text encoder as it is")
    parser.add_argument("--runs", type=Path, default=Path("runs/public_script"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    whole, adapter, settings = read(given.words)
    text, least = not given.unet_only, 1 + whole.views
    command(given.script, whole.diffusion, adapter, settings, text)  # says now what is wrong with the script
    people = load_people(whole.data, whole.people, whole.split, whole.diffusion.size, least=least)
    rows = [r[:least] for r in people.given_first(whole.data, 1, least)]
    images = people.images[torch.stack(rows)]  #                                     [I, 1 + views, 3, H, W]
    shown, views, count = images[:, 0], images[:, 1:], len(images)
    base = whole.diffusion.load()
    sites, moments = find_sites(base.unet, base.text_encoder), base.moments(shown)[:, None]  # [I, 1, 2, c, h, w]
    prompts = [base.config.instance_prompt] * whole.images + whole.changed
    standard = Standard([SFace()], None, shown[:, None], views, [], {}, [None] * len(whole.changed))
    sha = hashlib.sha256(given.script.read_bytes()).hexdigest()
    own = trainable(base, adapter)[1]

    # --- the same pictures at the same seeds, of the script's LoRAs and of hyperdb's
    found: dict[str, dict[str, list[Any]]] = {}
    for seed in range(whole.seeds):
        seeded = dataclasses.replace(settings, seed=settings.seed + seed)
        words = command(given.script, whole.diffusion, adapter, seeded, text)
        parts = []
        for number, image in enumerate(shown):
            print(f"seed {seed}: script, person {number + 1} of {count}", flush=True)
            file = run(words, image, f"{base.digest} {sha}", given.runs)
            parts.append(lora.read(file).factors(sites, base.config.path))
        theirs = {
            name: LowRank(*map(torch.cat, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]
        }
        same, begin = alike(base, adapter, list(theirs), count)
        print(f"seed {seed}: alike, places, lora", flush=True)
        changes = {
            "base": None,
            "script": theirs,
            "alike": same.changes(fit(base, same, moments, seeded, begin=begin)),
            "places": same.changes(fit(base, same, moments, seeded)),
            "lora": own.changes(fit(base, own, moments, seeded)),
        }
        noises = [seed * len(prompts) + k for k in range(len(prompts))]
        pictures = {row: draw(base, change, count, prompts, noises) for row, change in changes.items()}
        for row, score in standard.measure(pictures).items():
            for name, values in score.items():
                found.setdefault(row, {}).setdefault(name, []).append(values.double().numpy().round(6))
    scores = {row: {name: np.stack(v, 1) for name, v in score.items()} for row, score in found.items()}  # [I, S] each

    # --- figures
    adapters = {"script": same, "alike": same, "places": same, "lora": own}
    sizes = {row: {"layers": len(one.layout), "numbers": numbers(one)} for row, one in adapters.items()}
    defaults, origin = options(given.script), provenance()
    stated = re.search(r"check_min_version\(.([\w.]+).\)", load_text(given.script))
    result = {
        "rows": {row: sizes.get(row, {}) | summary(score, 0) for row, score in scores.items()},
        "paired": {figure: differences(scores, AGAINST, figure, 0) for figure in ("cosine", "cosine_changed")},
        "differs": differing(defaults, adapter.rank),
        "script": {
            "file": SCRIPT,
            "asks_for_diffusers": stated[1] if stated else None,
            "sha256": sha,
            "options": [w.replace(str(resolve(base.config.path)), base.config.path) for w in words[2:]],
            "left_as_it_has_them": {name: defaults[name] for name in LEFT},
        },
        "settings": {
            "adapter": dataclasses.asdict(adapter),
            "finetune": dataclasses.asdict(settings),
            "text_encoder": text,
            "diffusion": dataclasses.asdict(whole.diffusion),
        },
        "people": count,
        "seeds": whole.seeds,
        "split": whole.split,
        "images_a_person": whole.images,
        "changed": whole.changed,
        "base": base.digest,
        "data": people.digest,
        **origin,
        "versions": origin["versions"] | {name: version(name) for name in ("peft", "accelerate")},
        "persons": people.seed[torch.stack(rows)[:, 0]].tolist(),
        "values": {row: {name: v.T.tolist() for name, v in score.items()} for row, score in scores.items()},  # [S, I]
    }
    save_json(given.out, result)
    for row, score in result["rows"].items():
        print(f"{row:8s} face cosine {score['cosine']['mean']:.3f}")
    for figure, pairs in result["paired"].items():
        for name, c in pairs.items():
            print(f"{figure:16s} {name:14s} {c['mean']:+.3f} [{c['lo']:+.3f}, {c['hi']:+.3f}]")
    print(f"results in {given.out}")


if __name__ == "__main__":
    run_script(main)
