"""One photo of a person against two, judged by the same further photos (see README.md).

    hyperdb render_heads split=test identities=50 views=30 photo_views=9 out=data/heads_likeness
    python experiments/embedded/base64/several_photos/measure.py

Writes results.json and people.png beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.faces.image import grid, save_png
from hyperdb.metrics.copying import background, pose, similarity
from hyperdb.metrics.face import SFace
from hyperdb.metrics.likeness import galleries
from hyperdb.metrics.score import bootstrap, cosine, paired
from hyperdb.runtime.files import load_json, load_tensors, save_json
from hyperdb.runtime.provenance import provenance

HERE = Path(__file__).parent
PEOPLE, JUDGED_FROM, VIEWS = 30, 4, 4  # the photos given are the last ones before number JUDGED_FROM
WAYS = (  # name, photos, iterations, row of `hyperdb evaluate`
    ("prediction, 1 photo", 1, 40, "hyper_only"),
    ("prediction, 2 photos", 2, 40, "hyper_only"),
    ("40 iterations, 1 photo", 1, 40, "hyper_40"),
    ("40 iterations, 2 photos", 2, 40, "hyper_40"),
    ("80 iterations, 2 photos", 2, 80, "hyper_40"),
)
PAIRS = ((1, 0), (3, 2), (4, 2))  # ways compared person by person
FIGURES = ("cosine", "rank1", "rank1_styled", "style_accuracy")
SHOWN = 6  # people in the picture


def copied(what: Any, pictures: torch.Tensor, given: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """Compare pictures `[I, K, ...]` with the nearest photo given `[I, V, ...]`: 1 is a copy, 0 as another photo.

    The other photos `[I, L, ...]` set the scale.
    """
    drawn, photos, further = (what(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (pictures, given, others))
    return bootstrap(similarity(drawn, photos, further).numpy(), seed=0)


def main() -> None:
    """Evaluate each way, compare person by person, draw."""
    words = ["data=data/heads_likeness", f"people={PEOPLE}", "images=8", f"views={VIEWS}"]
    words += ["styled=[cartoon,sketch,oil,clay]"]
    people = load_people("data/heads_likeness", PEOPLE, "test")
    photos = torch.stack([r[: JUDGED_FROM + VIEWS] for r in people.photos])  #     [I, JUDGED_FROM + VIEWS]
    feature = SFace()
    judges = galleries(feature, people.images[photos[:, JUDGED_FROM:]])  #          [I, C]
    rows: dict[str, dict[str, object]] = {}
    scores, pictures = [], {}
    for name, count, steps, row in WAYS:
        out = Path("runs/evaluate") / f"photos_{count}_{steps}"
        given = [f"photos={count}", f"reference={JUDGED_FROM - count}", f"finetune.steps={steps}"]
        config.run("evaluate", [*words, *given, f"rows=[{row}]", f"results={row}.json", f"out={out}"])
        found = load_json(out / f"{row}.json")
        rows[name] = {key: found["rows"][row][key] for key in FIGURES}
        images = load_tensors(out / "rows" / f"{row}.safetensors")[0]["images"]
        drawn = images[:, : found["images_a_person"]]
        embedded = feature(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
        mine = people.images[photos[:, JUDGED_FROM - count : JUDGED_FROM]]
        others = people.images[photos[:, JUDGED_FROM:]]
        rows[name] |= {f"copy_{w.__name__}": copied(w, drawn, mine, others) for w in (pose, background)}
        scores.append(cosine(embedded, judges[:, None]).mean(1))
        pictures[name] = images[:SHOWN, 0]
    names = [name for name, *_ in WAYS]
    differences = {f"{names[a]} - {names[b]}": paired(scores[a], scores[b], seed=0) for a, b in PAIRS}
    same = {key: found[key] for key in ("people", "images_a_person", "styled", "base", "hypernet", "data")}
    file = save_json(HERE / "results.json", {"rows": rows, "paired": differences, **same, **provenance()})
    given_photos = [people.images[photos[:SHOWN, JUDGED_FROM - k]] for k in (1, 2)]
    pixels = [x.permute(1, 2, 0).numpy() for images in (*given_photos, *pictures.values()) for x in images]
    sheet = grid(pixels, SHOWN, rows=["the photo", "the other photo", *pictures])
    save_png(HERE / "people.png", sheet, {"software": "hyperdb", "synthetic": "all"})
    for name, difference in differences.items():
        print(f"{name:52s} {difference['mean']:+.3f} [{difference['lo']:+.3f}, {difference['hi']:+.3f}]")
    print(f"results and picture in {file.parent}")


if __name__ == "__main__":
    main()
