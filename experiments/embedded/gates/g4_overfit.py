"""G4: trained on one person alone, does the hypernetwork reach that person's own fit?

    hyperdb precompute identities=1 name=one && hyperdb train_hypernet experiment=overfit_one \
      model.encoder.weights=package:embedded/hypernet/hypernet.safetensors
    python experiments/embedded/gates/g4_overfit.py

Face cosine of 32 pictures of "a [V] face" with the person's photos: base, fit, prediction. Also writes g4.png.
"""

from __future__ import annotations

from pathlib import Path

import torch

import hyperdb
from hyperdb.data.fits import load_store
from hyperdb.data.people import load_people
from hyperdb.faces.image import grid, save_png
from hyperdb.metrics.face import SFace
from hyperdb.metrics.likeness import face_cosine, galleries
from hyperdb.metrics.score import bootstrap
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.draw import draw

PICTURES = 32


def main() -> None:
    """Draw, compare, write."""
    model = hyperdb.load("embedded", "hypernet=runs/train_hypernet/overfit_one")
    people = load_people("data/heads", limit=1)
    photos = people.images[people.photos[0]]
    fit = load_store("runs/precompute/one", model.layout).tokens[:1]
    with torch.no_grad(), model.base.autocast():
        predicted = model.hypernet(photos[:1])
    feature, seeds = SFace(), list(range(PICTURES))
    prompts = [model.base.config.instance_prompt] * PICTURES
    gallery = galleries(feature, photos[None])
    ways = {"base": None, "fit": fit, "prediction": predicted}
    result, rows = {}, {}
    for name, tokens in ways.items():
        factors = None if tokens is None else model.lidb.factors({"tokens": tokens})
        rows[name] = draw(model.base, factors, 1, prompts, seeds)
        result[name] = bootstrap(face_cosine(feature, rows[name], gallery)[0].numpy(), 0)
    result["passed"] = result["prediction"]["mean"] >= result["fit"]["mean"] - 0.02
    here = Path(__file__)
    save_json(here.with_name("g4.json"), {**result, "base_digest": model.base.digest, **provenance()})
    pixels = [*photos[:1].repeat(4, 1, 1, 1), *(x for row in rows.values() for x in row[0, :4])]
    save_png(here.with_name("g4.png"), grid([x.permute(1, 2, 0).numpy() for x in pixels], 4, rows=["photo", *rows]))
    print(result)


if __name__ == "__main__":
    main()
