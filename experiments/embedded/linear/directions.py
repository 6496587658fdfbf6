"""How many directions of the summary does the linear map know, and how many are noise?

    python experiments/embedded/linear/directions.py HYPERNET validation=FOLDER [recogniser=dlib] [key=value ...]

HYPERNET is the file of `hyperdb train_hypernet experiment=linear`, the other words are those of that stage. Its summary
is cut to fewer and fewer directions, and the unseen people of `validation` are drawn with their own prediction and with
everybody's average: twice as "a [V] face", and under each of the `changed` prompts. Writes directions_RUN.json beside
this file, RUN the folder of HYPERNET, and directions_RUN_dlib.json with the other recogniser.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics.face import Dlib, SFace
from hyperdb.metrics.likeness import face_cosine, galleries
from hyperdb.metrics.score import paired
from hyperdb.runtime.files import hash_files, save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.draw import draw

PEOPLE = 60
SIZES = [64, 24, 16, 12, 6]
PLAIN = 2


def main(file: str, *words: str) -> None:
    """Measure every size, write."""
    second = "recogniser=dlib" in words
    settings = config.load("train_hypernet", ["experiment=linear", *(w for w in words if w != "recogniser=dlib")])
    base, recogniser = settings.diffusion.load(), Dlib() if second else SFace()
    out = Path(__file__).with_name(f"directions_{Path(file).parent.name}{'_dlib' if second else ''}.json")
    people = load_people(settings.validation, PEOPLE, "validation", settings.diffusion.size, least=2)
    views = min(len(rows) for rows in people.photos)
    shown = people.images[torch.stack([rows[0] for rows in people.photos])]
    others = people.images[torch.stack([rows[1:views] for rows in people.photos])]
    gallery = galleries(recogniser, others)
    prompts = [base.config.instance_prompt] * PLAIN + settings.changed
    result: dict[str, Any] = {}
    for size in SIZES:
        model = Hypernet.load(Path(file))
        if size > model.config.summary:
            continue
        if size < model.config.summary:
            model.cut(size)
        with torch.no_grad(), base.autocast():
            tokens = model(shown)
        found = {}
        for name, each in (("own", tokens), ("mean", tokens.mean(0, keepdim=True))):
            factors = model.lidb.factors({"tokens": each})
            images = draw(base, factors, len(each), prompts, list(range(len(prompts)))).expand(len(tokens), *[-1] * 4)
            found[name] = face_cosine(recogniser, images, gallery)
        rows = {"plain": slice(PLAIN), "changed": slice(PLAIN, None)}
        result[str(size)] = {
            kind: {
                **{name: round(x[:, part].mean().item(), 4) for name, x in found.items()},
                "own-mean": paired(*(found[n][:, part].mean(1).numpy() for n in ("own", "mean")), 0),
            }
            for kind, part in rows.items()
        }
        print(size, result[str(size)], flush=True)
        save_json(
            out,
            {"directions": result, "people": len(tokens), "hypernet": hash_files([Path(file)]), **provenance()},
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
