"""Guidance, noise levels and starts of the fast fine-tuning, on validation people (see README.md).

    hyperdb render_heads split=validation identities=88 views=30 photo_views=9 out=data/heads_validation
    python experiments/embedded/base64/guidance/measure.py data/heads_validation

Every setting is a file in --runs, so a run that was stopped goes on where it was, and several processes share the work
(`--part 1/4` ... `--part 4/4`; or `--study noise`). Whoever finishes last writes results.json and curves.png;
`--collect` writes them from the settings there are.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hyperdb import config
from hyperdb.adapters.base import Factors, concatenate, select
from hyperdb.data.people import load_people
from hyperdb.heads import prompt
from hyperdb.metrics.face import RECOGNISERS
from hyperdb.metrics.figures import Standard
from hyperdb.metrics.obedience import Judge
from hyperdb.metrics.score import bootstrap, paired
from hyperdb.runtime.files import load_json, load_tensors, save_json, save_tensors
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.evaluate import styled_views
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import fit
from hyperdb.tuning.personalizer import Personalizer

HERE = Path(__file__).parent
STYLES = ["cartoon", "sketch", "oil", "clay", "bronze", "watercolour", "cartoon/beach", "clay/city"]
TODAY = "40 of all, guidance 3"  # what every other setting is compared with, person by person
KEPT_RANK = 32  # of an average of many people's residuals

Guide = tuple[float, float | None]
ORDINARY: Guide = (3.0, None)


@dataclass(frozen=True)
class Way:
    """How a person is fitted: where it begins, and what is changed of the shipped fine-tuning."""

    name: str
    start: str = "own"
    tuning: dict[str, Any] = field(default_factory=dict, hash=False)
    flip: bool = False  # the photo's mirror image is a second view


@dataclass(frozen=True)
class Setting:
    """One row: a way to fit and a guidance (text, subject; None is the ordinary one)."""

    study: str
    way: Way
    guide: Guide

    @property
    def name(self) -> str:
        text, subject = self.guide
        return f"{self.way.name}, guidance {text:g}" + ("" if subject is None else f" and {subject:g}")


def sweep() -> list[Setting]:
    """Return every setting, those that say most first."""
    everywhere = Way("40 of all", tuning={"noise": [0.0, 1.0], "steps": 40})
    low = Way("60 of 0-0.65", tuning={"noise": [0.0, 0.65], "steps": 60})
    prediction = Way("prediction", tuning={"steps": 0})
    two: list[Guide] = [ORDINARY, (3.0, 3.0)]
    found = [Setting("guidance", way, pair) for way in (everywhere, low) for pair in [*two, (3.0, 4.0)]]

    middle = {"noise": [0.0, 0.65]}
    ways = [
        Way("60 of 0-0.65, 3 levels and 1 of the prior", tuning={**middle, "steps": 60, "levels": 3, "prior_rows": 1}),
        Way("40 of 0-0.65", tuning=middle),
        Way("40 of 0-0.65, rate 0.009", tuning={**middle, "rate": 0.009}),
        Way("40 of 0-0.5", tuning={"noise": [0.0, 0.5]}),
        Way("40 of 0-0.8", tuning={"noise": [0.0, 0.8]}),
        Way("60 of 0-0.5", tuning={"noise": [0.0, 0.5], "steps": 60}),
        Way("60 of 0-0.8", tuning={"noise": [0.0, 0.8], "steps": 60}),
        Way("80 of 0-0.65", tuning={**middle, "steps": 80}),
        Way("40 of 0.1-0.65", tuning={"noise": [0.1, 0.65]}),
        Way("40 of 0-0.65, flipped too", tuning=middle, flip=True),
        Way("20 of all", tuning={"noise": [0.0, 1.0], "steps": 20}),
    ]
    found += [Setting("noise", way, (3.0, 3.0)) for way in ways[:2]]
    starts = ("average prediction", "none", "average of 8", "average of 64")
    others = [Way(f"{everywhere.name} from {start}", start, everywhere.tuning) for start in starts]
    found += [Setting("start", way, (3.0, 3.0)) for way in others]
    found += [Setting("noise", way, (3.0, 3.0)) for way in ways[2:]]
    found += [Setting("start", way, ORDINARY) for way in others] + [Setting("noise", way, ORDINARY) for way in ways]
    more: list[Guide] = [(2.0, None), (4.0, None), (2.0, 2.0), (4.0, 4.0), (3.0, 2.0), (2.0, 3.0), (3.0, 5.0)]
    found += [Setting("guidance", way, pair) for way in (everywhere, low) for pair in more]
    found += [Setting("guidance", prediction, pair) for pair in [*two, (3.0, 5.0)]]
    return found


class Studio:
    """The people, their judges and the networks; fits and draws."""

    def __init__(self, data: str, people: int, runs: Path, batch: int, seeds: int, words: list[str]) -> None:
        known = ["sface", *(["dlib"] if importlib.util.find_spec("dlib") else [])]
        fixed = [f"data={data}", "split=validation", f"out={runs}", "images=8", "views=4"]
        fixed += [f"recognisers=[{','.join(known)}]", f"styled=[{','.join(STYLES)}]"]
        self.config = config.load("evaluate", [*fixed, *words])
        self.runs, self.batch, self.seeds = runs, batch, seeds
        everyone = load_people(data, None, "validation", self.config.diffusion.size)
        rows = [r for r in everyone.photos if len(r) > self.config.views]
        if len(rows) < people:
            raise SystemExit(f"{data} has {len(rows)} people with {self.config.views + 1} photos, {people} are needed")
        self.shown = everyone.images[torch.stack([r[0] for r in rows[:people]])]  #        [I, 3, H, W]
        self.others = everyone.images[torch.stack([r[0] for r in rows[people:]])]  #       nobody of those judged
        views = everyone.images[torch.stack([r[1 : 1 + self.config.views] for r in rows[:people]])]
        words_only = [word.partition("/")[0] for word in STYLES]
        styled = {k: v[:, 1:] for k, v in styled_views(everyone, rows[:people], words_only).items()}
        self.standard = Standard(
            [RECOGNISERS[name]() for name in self.config.recognisers],
            Judge.load(resolve("package:embedded/judge.safetensors")), self.shown[:, None], views, words_only, styled,
        )  # fmt: skip
        self.model = Personalizer(self.config)
        self.base = self.model.base
        weights = b"".join(v.cpu().numpy().tobytes() for v in self.model.hypernet.state_dict().values())
        where = ("out", "data", "batch", "name", "results", "recognisers")
        plain = {k: v for k, v in asdict(self.config).items() if k not in where}
        plain["diffusion"].pop("device")
        known_by = [everyone.digest, people, len(rows), self.base.digest, hashlib.sha256(weights).hexdigest(), plain]
        self.key = hashlib.sha256(json.dumps(known_by, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.digests = {"data": everyone.digest, "base": self.base.digest, "people": people, "others": len(self.others)}

    # --- fits

    def predict(self, photos: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.base.autocast():
            return torch.cat([self.model.hypernet(part).float() for part in photos.split(32)])

    def lidb(self, tokens: torch.Tensor) -> Factors:
        return {k: (d.detach(), u.detach()) for k, (d, u) in self.model.lidb.factors({"tokens": tokens}).items()}

    def start(self, name: str) -> Factors | None:
        """Return what lies frozen under a fit: one identity for all, or each their own."""
        if name == "own":
            return self.lidb(self.predict(self.shown))
        if name == "average prediction":
            return self.lidb(self.predict(self.others).mean(0, keepdim=True))
        if name == "none":
            return None
        count = int(name.rpartition(" ")[2])
        if len(self.others) < count:
            raise SystemExit(f"{name} needs {count} people beside those judged, there are {len(self.others)}")
        return self.cached(f"{name} others", lambda: average(self.trained(self.others[:count], Way(name, "none"), 0)))

    def cached(self, name: str, make: Callable[[], Factors]) -> Factors:
        path = self.runs / "fits" / f"{hashlib.sha256((self.key + name).encode()).hexdigest()[:16]}.safetensors"
        if path.is_file():
            tensors = {k: v.to(self.base.device) for k, v in load_tensors(path)[0].items()}
            names = [k.removesuffix(".down") for k in tensors if k.endswith(".down")]
            return {n: (tensors[f"{n}.down"], tensors[f"{n}.up"]) for n in names}
        found = make()
        flat = {f"{n}.{part}": pair[i].cpu() for n, pair in found.items() for i, part in enumerate(("down", "up"))}
        save_tensors(path, flat, {"name": name})
        return found

    def trained(self, photos: torch.Tensor, way: Way, seed: int, under: Factors | None = None) -> Factors:
        """Return the relaxed factors of everyone."""
        settings = replace(self.config.finetune, **way.tuning, seed=seed)
        lora = self.config.relaxed.build(self.model.layout)
        shared = under is not None and next(iter(under.values()))[0].shape[0] == 1
        parts = []
        for first in range(0, len(photos), self.batch):
            some = slice(first, min(len(photos), first + self.batch))
            views = photos[some, None]
            if way.flip:
                views = torch.cat([views, views.flip(-1)], 1)
            moments = self.base.moments(views.flatten(0, 1)).unflatten(0, views.shape[:2])
            frozen = under if under is None or shared else select(under, some)
            parts.append(lora.changes(fit(self.base, lora, moments, settings, frozen, self.model.prior)))
        return {n: tuple(torch.cat([p[n][side] for p in parts]) for side in (0, 1)) for n in parts[0]}  # type: ignore[misc]

    def person(self, way: Way, seed: int) -> tuple[Factors, float | None]:
        """Return everyone's adapter and the seconds that a person's fit took, None if it was there."""
        seconds: list[float] = []

        def make() -> Factors:
            under = self.start(way.start)
            if way.tuning.get("steps") == 0:
                assert under is not None
                return under
            if self.base.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            relaxed = self.trained(self.shown, way, seed, under)
            made = relaxed if under is None else concatenate(under, relaxed)
            if self.base.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / len(self.shown))
            return made

        made = self.cached(f"{way.name} {way.start} {sorted(way.tuning.items())} {way.flip} {seed}", make)
        return made, round(seconds[0], 3) if seconds else None

    # --- a setting

    def path(self, setting: Setting) -> Path:
        how = f"{setting.name} {setting.way} {self.seeds} {self.key}"
        return self.runs / "settings" / f"{hashlib.sha256(how.encode()).hexdigest()[:16]}.json"

    def run(self, setting: Setting) -> None:
        """Fit, draw and judge one setting; write its file."""
        settings = self.config
        text, subject = setting.guide
        self.base.config.guidance, self.base.config.subject_guidance = text, subject
        words = [word.partition("/")[::2] for word in STYLES]
        prompts = [self.base.config.instance_prompt] * settings.images
        prompts += [prompt(style, "[V]", place or None) for style, place in words]
        found: list[dict[str, torch.Tensor]] = []
        fitting: list[float] = []
        drawing = 0.0
        steps = 0 if setting.way.tuning.get("steps") == 0 else self.seeds
        for seed in range(max(1, steps)):
            factors, took = self.person(setting.way, seed)
            fitting += [took] if took is not None else []
            began = time.perf_counter()
            images = draw(self.base, factors, len(self.shown), prompts, list(range(len(prompts))))
            drawing += (time.perf_counter() - began) / images.shape[:2].numel() / max(1, steps)
            row = self.standard.measure({"row": images})["row"]
            found.append({k: torch.as_tensor(v, dtype=torch.float64).nan_to_num(0.0) for k, v in row.items()})
        values = {k: torch.stack([f[k] for f in found]).mean(0) for k in found[0]}  #      a value a person
        save_json(self.path(setting), {
            "name": setting.name, "study": setting.study, "way": asdict(setting.way), "guidance": setting.guide,
            "seconds_a_fit": fitting[0] if fitting else None, "seconds_a_picture": round(drawing, 4),
            "device": str(self.base.device), "fit_seeds": max(1, steps),
            "values": {k: [round(x, 4) for x in v.tolist()] for k, v in values.items()},
        })  # fmt: skip
        mean = {k: float(v.mean()) for k, v in values.items()}
        print(
            f"{setting.name:44s} cosine {mean['cosine']:.3f} rank-1 {mean['rank1']:.2f} in the style "
            f"{mean['rank1_styled']:.2f} obeyed {mean['style_accuracy']:.2f} pose {mean['copy_pose']:.2f} backdrop "
            f"{mean['copy_background']:.2f} diversity {mean['diversity']:.3f}",
            flush=True,
        )


def average(factors: Factors, rank: int = KEPT_RANK) -> Factors:
    """Return the mean residual of all identities, `[1, ...]`, by its largest singular directions."""
    found = {}
    for name, (down, up) in factors.items():
        mean = torch.einsum("imr,irn->mn", up.float(), down.float()) / len(up)
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        root = s[:rank].sqrt()
        found[name] = (root[:, None] * vh[:rank])[None], (u[:, :rank] * root)[None]
    return found


# --- results -----------------------------------------------------------------------------------------


def collect(studio: Studio, settings: list[Setting]) -> None:
    """Write results.json and curves.png from the settings that are done."""
    done = [load_json(path) for path in map(studio.path, settings) if path.is_file()]
    seconds = {s["way"]["name"]: s["seconds_a_fit"] for s in done if s["seconds_a_fit"] is not None}
    today = next((s for s in done if s["name"] == TODAY), None)
    rows = {}
    for s in done:
        row = {k: s[k] for k in ("study", "way", "guidance", "seconds_a_picture", "device", "fit_seeds")}
        row["seconds_a_fit"] = seconds.get(s["way"]["name"])
        row |= {k: bootstrap(v, seed=0) for k, v in s["values"].items()}
        if today is not None and s is not today:
            compared = ("cosine", "rank1_styled", "style_accuracy", "copy_pose", "copy_background")
            row["against_today"] = {k: paired(s["values"][k], today["values"][k], seed=0) for k in compared}
        rows[s["name"]] = row
    recipe = {"styled": STYLES, "images": studio.config.images, "recognisers": studio.config.recognisers}
    shipped = {"shipped_finetune": asdict(studio.config.finetune), "missing": len(settings) - len(done)}
    save_json(HERE / "results.json", {"rows": rows, **studio.digests, **recipe, **shipped, **provenance()})
    curves(HERE / "results.json")
    print(f"{len(done)} of {len(settings)} settings in {HERE / 'results.json'} and curves.png")


def curves(file: Path) -> None:
    """Draw the person in the style against style obeyed, and likeness against copying."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = load_json(file)["rows"].values()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))

    def label(axes: Any, x: float, y: float, text: str) -> None:
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(3, 3), fontsize=6)

    studied = [r for r in rows if r["study"] == "guidance"]
    for k, name in enumerate(dict.fromkeys(r["way"]["name"] for r in studied)):
        for ordinary, marker in ((True, "s"), (False, "o")):
            mine = [r for r in studied if r["way"]["name"] == name and (r["guidance"][1] is None) == ordinary]
            x = [r["style_accuracy"]["mean"] for r in mine]
            y = [r["rank1_styled"]["mean"] for r in mine]
            left.plot(x, y, linestyle="-" if ordinary else "", marker=marker, color=f"C{k}",
                      label=f"{name}, {'ordinary' if ordinary else 'hybrid'}")  # fmt: skip
            for r, a, b in zip(mine, x, y, strict=True):
                label(left, a, b, ", ".join(f"{g:g}" for g in r["guidance"] if g is not None))
    left.set(xlabel="style obeyed", ylabel="rank-1 in the style", title="guidance (text, subject)")
    if studied:
        left.legend(fontsize=7)
    for guide, marker, color in ((list(ORDINARY), "s", "C0"), ([3.0, 3.0], "o", "C1")):
        mine = [r for r in rows if r["guidance"] == guide]
        x = [(r["copy_pose"]["mean"] + r["copy_background"]["mean"]) / 2 for r in mine]
        y = [r["cosine"]["mean"] for r in mine]
        text = "guidance " + " and ".join(f"{g:g}" for g in guide if g is not None)
        right.plot(x, y, marker=marker, linestyle="", color=color, label=text)
        for r, a, b in zip(mine, x, y, strict=True):
            label(right, a, b, r["way"]["name"])
    right.set(xlabel="copied of pose and backdrop", ylabel="face cosine", title="iterations of noise levels, start")
    right.legend(fontsize=7)
    figure.savefig(file.with_name("curves.png"), dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Do the part asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="rendered validation people; those after --people make the averages")
    parser.add_argument("words", nargs="*", help="key=value of `hyperdb evaluate`, such as diffusion.device=cuda")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--runs", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--study", choices=["guidance", "noise", "start"], help="only this one")
    parser.add_argument("--only", default="", help="only settings whose name has this in it")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n equal parts")
    parser.add_argument("--batch", type=int, default=24, help="people fitted in one pass")
    parser.add_argument("--seeds", type=int, default=1, help="fits of everyone, of which a person's figures are means")
    parser.add_argument("--collect", action="store_true", help="only write results from what is done")
    parser.add_argument("--list", action="store_true", help="only say what is asked for")
    given = parser.parse_intermixed_args()
    settings = sweep()
    asked = [s for s in settings if given.study in (None, s.study) and given.only in s.name]
    number, of = map(int, given.part.split("/"))
    mine = asked[len(asked) * (number - 1) // of : len(asked) * number // of]
    if given.list:
        print("\n".join(s.name for s in mine))
        return
    studio = Studio(given.data, given.people, given.runs, given.batch, given.seeds, given.words)
    for setting in [] if given.collect else mine:
        if not studio.path(setting).is_file():
            studio.run(setting)
    if given.collect or all(studio.path(s).is_file() for s in asked):
        collect(studio, settings)


if __name__ == "__main__":
    main()
