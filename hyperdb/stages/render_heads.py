"""Render procedural people with captions and labels into shards.

    hyperdb render_heads split=train identities=6000 out=data/heads

Writes `shard-00000.safetensors` ... and, at the end, `index.json` into `out`. Every picture is a
function of (seed, identity), so neither the number of workers nor an interruption changes a pixel;
running the command again renders only the shards that are missing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.recipe import recipe

WRITES = ("shard-*.safetensors", "index.json")
KEPT = "finished shards are kept"


@dataclass
class Config:
    """How many people are rendered, of which split, and how many pictures of each.

    The people are numbered, and each number belongs to one split: `train` is for training, `validation` for choosing
    settings, `test` for the figures that are published. `first` and `identities` choose a range of a split. So two
    folders with different ranges have no person in common, and a person is the same in every folder.
    """

    out: FilePath = "data/heads"  # folder that is written
    split: str = "train"  # train, validation or test
    identities: int = 10000  # people to render
    views: int = 6  # pictures of each person
    photo_views: int = 3  # of these pictures the first so many are photos; the others are in other styles
    size: int = 128  # side of the square pictures in pixels
    seed: int = 0  # of pose, light, style and place; who the people are does not depend on it
    first: int = 0  # how many people of the split to skip
    workers: int = 2  # processes that render; their number changes no pixel
    shard: int = 100  # people in one file


def _made_from(config: Config) -> dict[str, Any]:
    from hyperdb.heads import ALGORITHM

    # the key keeps its first name: it is in every shard, and so in the digest of every data set
    return {**recipe(config), "heads_sha256": ALGORITHM}


def _check(config: Config) -> None:
    from hyperdb.heads import SPLITS
    from hyperdb.runtime.errors import UserError

    if config.split not in SPLITS:
        raise UserError(f"split={config.split!r}: use one of {', '.join(SPLITS)}")
    for name in ("identities", "views", "workers", "shard"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: must be at least 1")
    if not 0 <= config.photo_views <= config.views:
        raise UserError(f"photo_views={config.photo_views}: must be 0 ... views={config.views}")
    if not 16 <= config.size <= 1024:
        raise UserError(f"size={config.size}: must be 16 ... 1024 pixels")
    people = len(SPLITS[config.split])
    if config.first < 0 or config.first + config.identities > people:
        raise UserError(
            f"first={config.first} identities={config.identities}: "
            f"the {config.split} split has {people} people"
        )


def _header(path: Path) -> dict[str, str] | None:
    """Metadata of a shard; None when it is absent or unreadable."""
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return None


def _refuse_other(folder: Path, made_from: dict[str, Any]) -> None:
    """Raise if anything in the folder was made from other settings."""
    from hyperdb.runtime.errors import UserError

    for path in sorted(folder.glob("shard-*.safetensors")):
        header = _header(path)
        if header is None:
            continue
        other = json.loads(header.get("made_from", "{}"))
        differences = [
            f"{key}={other.get(key)!r} there, {value!r} now"
            for key, value in made_from.items()
            if other.get(key) != value
        ]
        if differences:
            raise UserError(
                f"{folder} holds renders made with other settings ({'; '.join(differences)}); "
                "choose another out or delete the folder"
            )


def _columns() -> dict[str, list[str]]:
    from hyperdb import heads

    return {
        "style": list(heads.STYLES),
        "place": list(heads.PLACES),
        "expression": list(heads.EXPRESSIONS),
        "accessory": list(heads.ACCESSORIES),
        "sex": list(heads.SEXES),
        "skin": list(heads.SKINS),
        "hair": list(heads.HAIRS),
    }


def _person_rows(config: Config, seed: int) -> list[tuple[dict[str, Any], str]]:
    """Render all views of one person: columns and caption of each."""
    import numpy as np

    from hyperdb import heads

    identity, names = heads.Identity(seed), _columns()
    labels, coefficients = identity.attributes, identity.coefficients
    rng = np.random.default_rng((config.seed, seed, 51))
    others = [style for style in heads.STYLES if style != "photo"]
    order = [others[i] for i in rng.permutation(len(others))]
    rows = []
    for k in range(config.views):
        drawn = order[(k - config.photo_views) % len(order)]
        view = heads.sample_view(rng, style="photo" if k < config.photo_views else drawn)
        row: dict[str, Any] = {"image": heads.render(identity, view, config.size), "seed": seed}
        for column in ("style", "place", "expression", "accessory"):
            row[column] = names[column].index(getattr(view, column))
        for column in ("sex", "skin", "hair"):
            row[column] = names[column].index(str(labels[column]))
        row |= {"age": labels["age_value"], "yaw": view.yaw, "pitch": view.pitch}
        row["coefficients"] = coefficients
        rows.append((row, heads.caption(labels, view, rng)))
    return rows


def _render_shard(task: tuple[Config, int, dict[str, Any]]) -> int:
    """Write one shard; runs in a worker process."""
    import cv2
    import numpy as np
    from safetensors.numpy import save_file

    from hyperdb.heads import SPLITS
    from hyperdb.runtime.files import atomic

    config, number, made_from = task
    cv2.setNumThreads(1)
    start = number * config.shard
    stop = min(start + config.shard, config.identities)
    rows: list[tuple[dict[str, Any], str]] = []
    for i in range(start, stop):
        rows += _person_rows(config, SPLITS[config.split][config.first + i])
    types = {"image": np.uint8, "age": np.float32, "yaw": np.float32, "pitch": np.float32}
    types["coefficients"] = np.float32
    tensors = {
        key: np.stack([np.asarray(row[key], types.get(key, np.int64)) for row, _ in rows])
        for key in rows[0][0]
    }
    metadata = {
        "captions": json.dumps([text for _, text in rows]),
        "columns": json.dumps(_columns()),
        "made_from": json.dumps(made_from),
    }
    path = Path(config.out) / f"shard-{number:05d}.safetensors"
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return stop - start


def _one_thread() -> None:
    """Keep the maths libraries of a worker to one thread; runs before they are imported."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def run(config: Config) -> Path:
    """Render what is missing and return the folder."""
    from tqdm import tqdm

    from hyperdb.runtime.files import save_json
    from hyperdb.runtime.output import claim

    _check(config)
    made_from = _made_from(config)
    _refuse_other(Path(config.out), made_from)
    folder = claim(config.out, WRITES, made_from)
    shards = -(-config.identities // config.shard)
    paths = [folder / f"shard-{number:05d}.safetensors" for number in range(shards)]
    missing = [number for number, path in enumerate(paths) if _header(path) is None]
    tasks = [(config, number, made_from) for number in missing]
    done = config.identities - sum(
        min(config.shard, config.identities - number * config.shard) for number in missing
    )
    with tqdm(total=config.identities, initial=done, desc="people", unit="person") as bar:
        if tasks:
            context = multiprocessing.get_context("spawn")
            with context.Pool(min(config.workers, len(tasks)), _one_thread) as pool:
                for people in pool.imap_unordered(_render_shard, tasks):
                    bar.update(people)
    index = {
        "config": asdict(config),
        "shards": shards,
        "pictures": config.identities * config.views,
        "heads_sha256": made_from["heads_sha256"],
    }
    save_json(folder / "index.json", index)
    return folder
