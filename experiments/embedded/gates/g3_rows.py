"""G3 against rows: how much of a person's data must a fit see before it is a function of the person?

    hyperdb render_heads split=validation identities=100 views=9 photo_views=9 size=128 out=data/heads_g3
    python experiments/embedded/gates/g3_rows.py                                         (g3_rows.json)
    python experiments/embedded/gates/g3_rows.py start=package:embedded/hypernet         (g3_rows_hypernet.json)

Fits of 4, 16 and 48 steps of the configured rows each, all begun at everybody's average, which is fitted or the mean of
the hypernetwork's predictions: the same people twice, on other photos under other noise, as in g3_learnability.py. Each
number of rows is told by the correlation of the two and by the likeness of what is drawn with the first, beside the
average's and the hypernetwork's own prediction. Where the fits begin at its mean, their correlation is told in the
directions in which its predictions differ, too, and the share of the fits that its prediction from a photo explains
which no first fit has seen. Draws the same as a picture.
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
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import Begin, fit
from hyperdb.tuning.prior import load_prior
from hyperdb.tuning.start import load_start

PEOPLE, STEPS = 24, (4, 16, 48)
SECOND = 4  # the first photo of the second fit
OUT = Path("runs/g3_rows")


def explained(fits: Tensor, told: Tensor) -> float:
    """Return the share of the fits' variance `[I, C]` over people that `told [I, C]`, times one number, explains."""
    a, b = fits - fits.mean(0), told - told.mean(0)
    return ((a * b).sum().square() / (a.square().sum() * b.square().sum())).item()


def main(*words: str) -> None:
    """Fit twice for each number of rows, correlate, draw, plot."""
    settings = config.load("precompute", ["data=data/heads_g3", *words])
    base = settings.diffusion.load()
    lidb = settings.adapter.tokens(Layout.of(base.targets()))
    people = load_people(settings.data, None, "validation", settings.diffusion.size, least=9)
    rows = torch.stack([r[:9] for r in people.photos])  #                             [I, 9]
    model = Hypernet.load(resolve(HYPERNET))
    with torch.no_grad(), base.autocast():
        predicted, unseen = (model(people.images[rows[:PEOPLE, k]]).float() for k in (0, 8))
        others = model(people.images[rows[PEOPLE:, 0]]).float()
    rows = rows[:PEOPLE]
    views = settings.fit.views
    prior = load_prior(base, settings.prior, OUT / "prior.safetensors")

    def moments(first: int) -> Tensor:
        shown = rows[:, first : first + views]
        return latent_moments(base, people, rows=shown.flatten()).unflatten(0, shown.shape)

    fitted = settings.start == "average"
    start = load_start(
        base, lidb, lambda: (moments(0), None if fitted else predicted), settings.average, settings.fit, prior,
        OUT / f"start{'' if fitted else '_hypernet'}.safetensors", f"{base.digest} {people.digest}", settings.batch,
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
    known_by, told = None, None
    if not fitted:
        told = (unseen - start.average)[:, moving] * metric  #                        [I, M]
        spread = (others - others.mean(0))[:, moving] * metric
        known_by = torch.linalg.svd(spread, full_matrices=False).Vh[: model.config.summary]
    points = []
    for steps, (once, twice) in fits.items():
        found = cosine(once)
        a, b = ((x - start.average)[:, moving] * metric for x in (once, twice))
        further = {}
        if known_by is not None and told is not None:
            further["icc_in_directions"] = correlation(a @ known_by.T, b @ known_by.T)
            further["r2_of_prediction"] = explained(a, told)
            further["r2_of_prediction_in_directions"] = explained(a @ known_by.T, told @ known_by.T)
        points.append({
            "steps": steps,
            "rows": steps * settings.fit.levels,
            "icc": correlation(a, b),
            **further,
            "face_cosine": bootstrap(found.numpy(), 0),
            "minus_average": paired(found.numpy(), average.numpy(), 0),
            "minus_prediction": paired(found.numpy(), prediction.numpy(), 0),
        })  # fmt: skip
        print(points[-1])
    result = {"people": PEOPLE, "average": average.mean().item(), "prediction": prediction.mean().item()}
    here = Path(__file__).with_name(f"g3_rows{'' if fitted else '_hypernet'}.json")
    save_json(here, {**result, "points": points, "base": base.digest, **provenance()})
    plot(result, points, here.with_suffix(".png"))
    print(here)


def plot(result: dict[str, float], points: list[dict], path: Path) -> None:
    """Draw reliability and quality of the fits against the rows of each."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [p["rows"] for p in points]
    left.plot(seen, [p["icc"] for p in points], marker="o")
    if "icc_in_directions" in points[0]:
        left.plot(seen, [p["icc_in_directions"] for p in points], marker="o", label="where predictions differ")
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
