"""G3 against rows: how much of a person's data must a fit see before it is a function of the person?

    hyperdb render_heads split=validation identities=100 views=9 photo_views=9 size=128 out=data/heads_g3
    python experiments/embedded/gates/g3_rows.py [key=value of `hyperdb precompute` ...]

Fits of 4, 16 and 48 steps of the configured rows each, all begun at one average: the same people twice, on other photos
under other noise, as in g3_learnability.py. Each number of rows is told by the correlation of the two and by the
likeness of what is drawn with the first, beside the average's and the hypernetwork's own prediction. Writes
g3_rows.json and draws g3_rows.png.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from g3_learnability import HYPERNET, PICTURES, correlation
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.data.people import latent_moments, load_people
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics.face import SFace
from hyperdb.metrics.likeness import face_cosine, galleries
from hyperdb.metrics.score import bootstrap, paired
from hyperdb.runtime.files import save_json
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.recipe import recipe
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import Begin, fit
from hyperdb.tuning.prior import load_prior
from hyperdb.tuning.start import load_start

PEOPLE, STEPS = 24, (4, 16, 48)
SECOND = 4  # the first photo of the second fit
OUT = Path("runs/g3_rows")


def main(*words: str) -> None:
    """Fit twice for each number of rows, correlate, draw, plot."""
    settings = config.load("precompute", ["data=data/heads_g3", *words])
    base = settings.diffusion.load()
    lidb = settings.adapter.tokens(Layout.of(base.targets()))
    people = load_people(settings.data, PEOPLE, "validation", settings.diffusion.size, least=9)
    rows = torch.stack([r[:9] for r in people.photos])  #                             [I, 9]
    model = Hypernet.load(resolve(HYPERNET))
    with torch.no_grad(), base.autocast():
        predicted = model(people.images[rows[:, 0]]).float()
    views = settings.fit.views
    prior = load_prior(base, settings.prior, OUT / "prior.safetensors")

    def moments(first: int) -> Tensor:
        shown = rows[:, first : first + views]
        return latent_moments(base, people, rows=shown.flatten()).unflatten(0, shown.shape)

    start = load_start(
        base, lidb, lambda: (moments(0), None), settings.average, settings.fit, prior,
        OUT / "start.safetensors", f"{base.digest} {people.digest} {recipe(settings)}", settings.batch,
    )  # fmt: skip
    begin = Begin({"tokens": start.average.expand(PEOPLE, -1, -1)}, {"tokens": start.gain(lidb, "B")})
    fits: dict[int, list[Tensor]] = {}
    with tqdm(total=2 * sum(STEPS), desc="fits", unit="step") as bar:
        for steps in STEPS:
            one, other = replace(settings.fit, steps=steps), replace(settings.fit, steps=steps, seed=1)
            fits[steps] = [
                fit(base, lidb, moments(first), c, None, None, lambda *_: bar.update() and None, begin)["tokens"].cpu()
                for first, c in ((0, one), (SECOND, other))
            ]
    judge = SFace()
    known = galleries(judge, people.images[rows[:, SECOND:].flatten()].unflatten(0, (PEOPLE, 5)))

    def cosine(tokens: Tensor) -> Tensor:
        prompts = [base.config.instance_prompt] * PICTURES
        drawn = draw(base, lidb.factors({"tokens": tokens}), PEOPLE, prompts, list(range(PICTURES)))
        return face_cosine(judge, drawn, known).mean(1)

    moving = lidb.part("B").cpu()
    metric = start.moment[moving].sqrt()
    average, prediction = cosine(begin.params["tokens"]), cosine(predicted)
    points = []
    for steps, (once, twice) in fits.items():
        found = cosine(once)
        points.append({
            "steps": steps,
            "rows": steps * settings.fit.levels,
            "icc": correlation(once[:, moving] * metric, twice[:, moving] * metric),
            "face_cosine": bootstrap(found.numpy(), 0),
            "minus_average": paired(found.numpy(), average.numpy(), 0),
            "minus_prediction": paired(found.numpy(), prediction.numpy(), 0),
        })  # fmt: skip
        print(points[-1])
    result = {"people": PEOPLE, "average": average.mean().item(), "prediction": prediction.mean().item()}
    here = Path(__file__).with_suffix(".json")
    save_json(here, {**result, "points": points, "base": base.digest, **provenance()})
    plot(result, points, here.with_suffix(".png"))
    print(here)


def plot(result: dict[str, float], points: list[dict], path: Path) -> None:
    """Draw reliability and quality of the fits against the rows of each."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [p["rows"] for p in points]
    left.plot(seen, [p["icc"] for p in points], marker="o")
    left.axhline(0.6, color="grey", linestyle=":", label="asked")
    left.set(xlabel="rows a person", ylabel="correlation of two fits", xscale="log", ylim=(0, 1))
    mean = [p["face_cosine"]["mean"] for p in points]
    reach = [[abs(p["face_cosine"][k] - m) for p, m in zip(points, mean, strict=True)] for k in ("lo", "hi")]
    right.errorbar(seen, mean, reach, marker="o", capsize=3, label="fit")
    right.axhline(result["average"], color="grey", linestyle="--", label="average")
    right.axhline(result["prediction"], color="C1", linestyle="--", label="prediction")
    right.set(xlabel="rows a person", ylabel="face cosine", xscale="log")
    for panel in (left, right):
        panel.legend()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
