"""G3: are the fits a function of the person, and can another photo tell them?

    hyperdb render_heads split=validation identities=100 views=9 photo_views=9 size=128 out=data/heads_g3
    hyperdb precompute data=data/heads_g3 identities=100 name=g3
    hyperdb precompute data=data/heads_g3 identities=100 name=g3_again fit.first_view=4 fit.seed=1
    python experiments/embedded/gates/g3_learnability.py [result.json] [key=value of `hyperdb precompute` ...]

The same people are fitted twice, on other photos under other noise. Asked: an intra-class correlation of the fits of
at least .6; a ridge regression from the hypernetwork's summary of a ninth photo, which no fit has seen, with R2 of at
least .3 on held-out people; and pictures drawn with a fit that are more like the person's other photos than those drawn
with the hypernetwork's own prediction, by an interval over people that excludes 0. Numbers count by the mean square of
people's gradients (the metric `fisher` of the weight-space loss), and all alike beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.data.fits import load_store
from hyperdb.data.people import load_people
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics.copying import background, pose, similarity
from hyperdb.metrics.face import SFace
from hyperdb.metrics.likeness import face_cosine, galleries
from hyperdb.metrics.score import paired
from hyperdb.runtime.files import save_json
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.draw import draw
from hyperdb.tuning.space import ridge

FOLDS, PENALTY = 5, 30.0
PICTURES = 4
HYPERNET = "package:embedded/hypernet/hypernet.safetensors"


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the intra-class correlation of two measurements `[I, C]`, all columns pooled."""
    mean = (a + b).mean(0) / 2
    # what both of a kind have in common, their photos' and noise's, is neither the person nor an error of measurement
    within = ((a - b) - (a - b).mean(0)).square().sum() / 2 / (len(a) - 1)
    between = ((a + b) / 2 - mean).square().sum() * 2 / (len(a) - 1)
    return ((between - within) / (between + within)).item()


def held_out(x: Tensor, y: Tensor) -> float:
    """Return R2 on held-out folds of a ridge regression from x `[I, F]` to y `[I, C]`."""
    fold = torch.arange(len(x)) % FOLDS
    missed = total = 0.0
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        w, offset = ridge(x[train], y[train], PENALTY)
        missed += (y[test] - x[test] @ w - offset).square().sum().item()
        total += (y[test] - y[train].mean(0)).square().sum().item()
    return 1 - missed / total


def main(out: str = "g3.json", *words: str) -> None:
    """Load, correlate, regress, draw, write."""
    given = dict(w.split("=", 1) for w in words)
    data, hypernet = given.pop("data", "data/heads_g3"), given.pop("hypernet", HYPERNET)
    first, second = given.pop("stores", "runs/precompute/g3,runs/precompute/g3_again").split(",")
    settings = config.load("precompute", [f"data={data}", *(f"{k}={v}" for k, v in given.items())])
    base = settings.diffusion.load()
    layout = Layout.of(base.targets())
    store, again = (load_store(folder, layout) for folder in (first, second))
    people = load_people(data, len(store.keys), "validation", settings.diffusion.size, least=9)
    rows = torch.stack([r[:9] for r in people.photos])  #                             [I, 9]
    keys = people.seed[rows[:, 0]]
    once, twice = (s.tokens[s.rows_of(keys)] for s in (store, again))
    lidb, moving = store.lidb, (once != once[0]).any(0)
    assert torch.equal(once[:1, ~moving], twice[:1, ~moving]), "the stores differ in what is no person's own, their A"
    assert store.moment is not None, f"{first} does not begin at the average"
    metric = store.moment[moving].sqrt()
    model = Hypernet.load(resolve(hypernet))
    with torch.no_grad(), base.autocast():
        summary = model.features(people.images[rows[:, 8]])[1].float()
        predicted = model(people.images[rows[:, 0]]).float()
    asked = {"icc": 0.6, "r2": 0.3}
    result: dict[str, object] = {"people": len(rows), "numbers_moving": int(moving.sum()), "asked": asked}
    for name, weight in (("fisher", metric), ("plain", torch.ones_like(metric))):
        a, b = once[:, moving] * weight, twice[:, moving] * weight
        result[name] = {"icc": correlation(a, b), "r2": held_out(summary, (a + b) / 2)}
    # judged on photos 5 to 9, of which the first fits have seen none
    judge, unseen = SFace(), people.images[rows[:, 4:].flatten()].unflatten(0, (len(rows), 5))
    known = galleries(judge, unseen)
    ways = {"average": store.tokens[:].mean(0, keepdim=True).expand_as(once), "fit": once}
    if model.lidb.layout == layout:
        ways["prediction"] = predicted
    seeds, prompts = list(range(PICTURES)), [base.config.instance_prompt] * PICTURES
    drawn = {k: draw(base, lidb.factors({"tokens": v}), len(v), prompts, seeds) for k, v in ways.items()}
    cosines = {k: face_cosine(judge, v, known).mean(1) for k, v in drawn.items()}
    result["face_cosine"] = {k: v.mean().item() for k, v in cosines.items()}
    result["fit_minus"] = {k: paired(cosines["fit"].numpy(), v.numpy(), 0) for k, v in cosines.items() if k != "fit"}
    views = settings.fit.views
    for name, feature in (("pose", pose), ("background", background)):
        given = feature(people.images[rows[:, :views].flatten()]).unflatten(0, (-1, views))
        others = feature(unseen.flatten(0, 1)).unflatten(0, (-1, 5))
        pictures = {k: feature(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for k, v in drawn.items()}
        result[f"{name}_copied"] = {k: similarity(v, given, others).mean().item() for k, v in pictures.items()}
    save_json(Path(__file__).parent / out, {**result, "base": base.digest, "index": store.index, **provenance()})
    print({k: v for k, v in result.items() if k != "index"})


if __name__ == "__main__":
    main(*sys.argv[1:])
