"""G3: are the fits a function of the photo, and of what is known about the person?

    hyperdb precompute fit.views=1 fit.signal_weight=null fit.face_weight=0
    hyperdb precompute fit.views=1 fit.signal_weight=null fit.face_weight=0 identities=20 fit.seed=1 name=repeat
    python experiments/embedded/gates/g3_learnability.py

Intra-class correlation of the residuals of 20 photos fitted twice with other streams of noise (> .5); ridge regression
from morph coefficients and attributes to the residuals, R2 on held-out people (>= .2).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.data.fits import load_store
from hyperdb.data.people import load_people
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.space import ridge

FOLDS, PENALTIES, PENALTY = 5, (1.0, 10.0, 100.0, 1000.0), 100.0  # the last is the one that counts


def residuals(lidb: LiDB, tokens: Tensor) -> Tensor:
    """Return every residual in its bases, `A_train B_train` of each layer, flat: `[I, N * a * b]`."""
    A, B = lidb.split(tokens)
    return (A @ B).flatten(1)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the intra-class correlation of two measurements `[I, C]`, all columns pooled."""
    mean = (a + b).mean(0) / 2
    within = (a - b).square().sum() / 2 / len(a)
    between = ((a + b) / 2 - mean).square().sum() * 2 / (len(a) - 1)
    return ((between - within) / (between + within)).item()


def held_out(x: Tensor, y: Tensor, penalty: float) -> float:
    """Return R2 on held-out folds of a ridge regression from x `[I, F]` to y `[I, C]`."""
    fold = torch.arange(len(x)) % FOLDS
    missed = total = 0.0
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        w, offset = ridge(x[train], y[train], penalty)
        missed += (y[test] - x[test] @ w - offset).square().sum().item()
        total += (y[test] - y[train].mean(0)).square().sum().item()
    return 1 - missed / total


def main() -> None:
    """Load, correlate, regress, write."""
    base = config.load("personalize", ["image=none"]).diffusion.load()
    layout = Layout.of(base.targets())
    store, again = (load_store(f"runs/precompute/{name}", layout) for name in ("default", "repeat"))
    once = store.tokens[store.rows_of(again.keys)]
    icc = correlation(*(residuals(store.lidb, t) for t in (once, again.tokens)))
    people = load_people("data/heads", limit=len(store.keys))
    rows = torch.stack([r[0] for r in people.rows])
    rows = rows[torch.tensor([int(r) for r in store.rows_of(people.seed[rows])]).argsort()]
    labels = people.labels
    words = [one_hot(labels[k][rows], len(people.names[k])).float() for k in ("sex", "skin", "hair")]
    known = torch.cat([labels["coefficients"][rows].float(), labels["age"][rows, None].float() / 50, *words], 1)
    known = (known - known.mean(0)) / known.std(0).clamp_min(1e-3)
    fits = residuals(store.lidb, store.tokens)
    r2 = {str(p): held_out(known, fits, p) for p in PENALTIES}
    result = {"people": len(fits), "repeated": len(once), "icc": icc, "r2_by_penalty": r2, "r2": r2[str(PENALTY)]}
    result["passed"] = {"icc": icc > 0.5, "r2": result["r2"] >= 0.2}
    save_json(Path(__file__).with_name("g3.json"), {**result, "base": base.digest, **provenance()})
    print(result)


if __name__ == "__main__":
    main()
