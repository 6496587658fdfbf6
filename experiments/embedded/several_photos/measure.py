"""One photo of a person against two and four, judged by the same further photos (see README.md).

    hyperdb render_heads split=test identities=50 views=30 photo_views=9 out=data/heads_likeness
    python experiments/embedded/several_photos/measure.py

Writes results.json and people.png beside this file.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.faces.image import grid, save_png
from hyperdb.metrics.face import SFace
from hyperdb.metrics.score import cosine, paired
from hyperdb.runtime.files import load_json, load_tensors, save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.likeness import galleries

HERE = Path(__file__).parent
PEOPLE, COUNTS, VIEWS = 30, (1, 2, 4), 4
MOST = max(COUNTS)  # the photos given are the last ones before number MOST, the judges those from there on
ROWS = ("hyper_only", "hyper_40")
FIGURES = ("cosine", "rank1", "rank1_styled", "style_accuracy", "copy_pose", "copy_background")
SHOWN = 6  # people in the picture


def main() -> None:
    """Evaluate each count of photos, compare person by person, draw."""
    words = ["data=data/heads_likeness", f"people={PEOPLE}", "images=8", f"views={VIEWS}", f"rows=[{','.join(ROWS)}]"]
    words += ["styled=[cartoon,sketch,oil,clay]"]
    people = load_people("data/heads_likeness", PEOPLE, "test")
    photos = torch.stack([r[: MOST + VIEWS] for r in people.photos])  #            [I, MOST + VIEWS]
    feature = SFace()
    judges = galleries(feature, people.images[photos[:, MOST:]])  #                 [I, C]
    rows: dict[str, dict[str, object]] = {}
    scores, pictures = {}, {}
    for count in COUNTS:
        out = Path("runs/evaluate") / f"photos_{count}"
        config.run("evaluate", [*words, f"photos={count}", f"reference={MOST - count}", f"out={out}"])
        found = load_json(out / "results.json")
        for row in ROWS:
            name = f"{row}, {count}"
            rows[name] = {key: found["rows"][row][key] for key in FIGURES}
            images = load_tensors(out / "rows" / f"{row}.safetensors")[0]["images"]
            drawn = images[:, : found["images_a_person"]]
            embedded = feature(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
            scores[name] = cosine(embedded, judges[:, None]).mean(1)
            pictures[name] = images[:SHOWN, 0]
    differences = {
        f"{row}, {count} - {row}, 1": paired(scores[f"{row}, {count}"], scores[f"{row}, 1"], seed=0)
        for row in ROWS
        for count in COUNTS[1:]
    }
    same = {key: found[key] for key in ("people", "images_a_person", "styled", "base", "hypernet", "data")}
    file = save_json(HERE / "results.json", {"rows": rows, "paired": differences, **same, **provenance()})
    given = [people.images[photos[:SHOWN, k]] for k in reversed(range(MOST))]  #    the single photo first
    pixels = [x.permute(1, 2, 0).numpy() for row in (*given, *pictures.values()) for x in row]
    labels = [f"photo {k + 1}" for k in range(MOST)] + [f"{name} of them" for name in pictures]
    sheet = grid(pixels, SHOWN, rows=labels)
    save_png(HERE / "people.png", sheet, {"software": "hyperdb", "synthetic": "all"})
    for name, difference in differences.items():
        print(f"{name:28s} {difference['mean']:+.3f} [{difference['lo']:+.3f}, {difference['hi']:+.3f}]")
    print(f"results and picture in {file.parent}")


if __name__ == "__main__":
    main()
