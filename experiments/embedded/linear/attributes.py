"""What do the directions in which the linear map moves the predictions say of a person?

    python experiments/embedded/linear/attributes.py HYPERNET data=FOLDER [key=value of `hyperdb train_hypernet` ...]

HYPERNET is the file of `hyperdb train_hypernet experiment=linear`, FOLDER holds rendered people, whose attributes and
coefficients of shape are known. A ridge regression learns them from the first directions of the summary of one photo of
half of the people; written is the share of the variance that it explains in the other half. The components are those of
`hyperdb train_encoder`. Writes attributes_RUN.json beside this file, RUN the folder of HYPERNET.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.heads import Identity
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.files import hash_files, save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.train_encoder import components
from hyperdb.tuning.space import ridge

SIZES = [6, 12, 24, 64]
RIDGE = 10.0
COMPONENTS = 40


def explained(x: Tensor, y: Tensor) -> float:
    """Return the share of the variance of `y [n, d]` in its second half that `x [n, k]` explains."""
    half = len(x) // 2
    coefficients, offset = ridge(x[:half], y[:half], RIDGE)
    missed, whole = y[half:] - x[half:] @ coefficients - offset, y[half:] - y[:half].mean(0)
    return round(1 - (missed.square().sum() / whole.square().sum()).item(), 3)


def main(file: str, *words: str) -> None:
    """Measure every size, write."""
    settings = config.load("train_hypernet", ["experiment=linear", *words])
    people = load_people(settings.data, size=settings.diffusion.size)
    first = torch.stack([rows[0] for rows in people.photos])
    model = Hypernet.load(Path(file))
    model.cut(model.config.summary)
    with torch.no_grad():
        summary = torch.cat([model.features(people.images[part])[1] for part in first.split(64)]).double()
    known = {name: torch.nn.functional.one_hot(people.labels[name][first]) for name in ("sex", "skin", "hair")}
    known |= {"age": people.labels["age"][first, None], "shape": people.labels["coefficients"][first]}
    faces = np.stack([Identity(int(seed)).face.ravel() for seed in people.seed[first]])
    form = components(torch.from_numpy(faces), COMPONENTS)
    known |= {"components 1-10": form[:, :10], "components 11-40": form[:, 10:]}
    known |= {"yaw of the photo": people.labels["yaw"][first, None]}
    result = {
        str(size): {name: explained(summary[:, :size], values.double()) for name, values in known.items()}
        for size in SIZES
    }
    for size, found in result.items():
        print(size, found)
    save_json(
        Path(__file__).with_name(f"attributes_{Path(file).parent.name}.json"),
        {"explained": result, "people": len(first), "hypernet": hash_files([Path(file)]), **provenance()},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
