"""Render procedural people with captions and labels into a folder of Hugging Face `datasets`.

    hyperdb render_heads split=train identities=6000 out=data/heads

Writes `data-00000-of-00060.arrow` ... and, at the end, `dataset_info.json`, `state.json` and
`index.json` into `out`, which `datasets.load_from_disk` reads. Every picture is a function of
(seed, identity), so neither the number of workers nor an interruption changes a pixel; running the
command again renders only the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.recipe import recipe

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

WRITES = ("data-*.arrow", "dataset_info.json", "state.json", "index.json")
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


def _header(path: Path) -> str | None:
    """What a shard says it was made from; None when it is absent, unreadable or cut off."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_stream(file).read_all().schema  # of the pictures it looks at the places alone
        header = (schema.metadata or {}).get(b"made_from", b"{}").decode()
        return header if isinstance(json.loads(header), dict) else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def _former(path: Path) -> str:
    """What a shard of the former kind says it was made from."""
    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.files import load_metadata

    try:
        return load_metadata(path).get("made_from", "{}")
    except UserError:
        return "{}"


def _refuse_other(folder: Path, made_from: dict[str, Any]) -> None:
    """Raise if anything in the folder was made from other settings."""
    from hyperdb.runtime.errors import UserError

    found = [_header(path) for path in sorted(folder.glob("data-*.arrow"))]
    found += [_former(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    for header in found:
        other = json.loads(header or "{}")
        differences = [
            f"{key}={other.get(key)!r} there, {value!r} now"
            for key, value in made_from.items()
            if header is not None and other.get(key) != value
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


def _features() -> Features:
    """The columns of a folder: the picture, what it shows and who."""
    from datasets import ClassLabel, Features, Image, List, Value

    features = {"image": Image(), "caption": Value("string"), "seed": Value("int64")}
    features |= {name: ClassLabel(names=words) for name, words in _columns().items()}
    features |= {name: Value("float32") for name in ("age", "yaw", "pitch")}
    return Features(features | {"coefficients": List(Value("float32"))})


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


def _path(config: Config, number: int) -> Path:
    """The file of a shard, called as `save_to_disk` would call it."""
    return Path(config.out) / f"data-{number:05d}-of-{-(-config.identities // config.shard):05d}.arrow"


def _render_shard(task: tuple[Config, int, pa.Schema]) -> int:
    """Write one shard; runs in a worker process."""
    import cv2
    import pyarrow as pa

    from hyperdb.heads import SPLITS
    from hyperdb.runtime.files import atomic

    config, number, schema = task
    cv2.setNumThreads(1)
    start = number * config.shard
    stop = min(start + config.shard, config.identities)
    with atomic(_path(config, number)) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
        for i in range(start, stop):
            rows = _person_rows(config, SPLITS[config.split][config.first + i])
            writer.write_batch(pa.RecordBatch.from_pylist([_plain(*row) for row in rows], schema))
    return stop - start


def _plain(row: dict[str, Any], caption: str) -> dict[str, Any]:
    """A row as Arrow takes it: the picture as a PPM file, which is read as fast as it is copied."""
    from hyperdb.faces.image import ppm

    image = {"bytes": ppm(row["image"]), "path": None}
    return {**row, "image": image, "caption": caption, "coefficients": row["coefficients"].tolist()}


def _known(folder: Path) -> dict[str, str]:
    """Return {shard: its checksum} of a finished folder; nothing of another, or of one whose index is damaged."""
    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.files import load_json

    try:
        known = load_json(folder / "index.json").get("checksums", {})
    except (AttributeError, UserError):
        return {}
    return known if isinstance(known, dict) else {}


def _is_whole(path: Path, known: dict[str, str]) -> bool:
    """Whether a shard is there and as it was written; says so of one that is damaged."""
    from hyperdb.runtime.files import hash_files

    if not path.is_file():
        return False
    whole = _header(path) is not None and known.get(path.name) in (None, hash_files([path]))
    if not whole:
        print(f"{path} is damaged and is made again")
    return whole


def _finish(config: Config, made_from: dict[str, Any], shards: int, checked: dict[str, str]) -> None:
    """Write what makes the shards a folder of `datasets`, and last of all the index.

    `checked` are checksums that shards were just found to have.
    """
    from hyperdb.runtime.files import hash_files, save_json

    folder = Path(config.out)
    save_json(folder / "dataset_info.json", {"features": _features().to_dict()})
    state: dict[str, Any] = {
        "_data_files": [{"filename": _path(config, number).name} for number in range(shards)],
        "_fingerprint": hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16],
        "_split": config.split,
    }
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    save_json(folder / "state.json", state)
    index = {
        "config": asdict(config),
        "shards": shards,
        "pictures": config.identities * config.views,
        "heads_sha256": made_from["heads_sha256"],
        "checksums": {
            path.name: checked.get(path.name) or hash_files([path])
            for path in (_path(config, number) for number in range(shards))
        },
    }
    save_json(folder / "index.json", index)


def run(config: Config) -> Path:
    """Render what is missing and return the folder."""
    from tqdm import tqdm

    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.pool import each

    _check(config)
    made_from = _made_from(config)
    _refuse_other(Path(config.out), made_from)
    if any(Path(config.out).glob("shard-*.safetensors")):
        if (Path(config.out) / "index.json").is_file():
            return Path(config.out)
        raise UserError(f"{config.out} holds unfinished renders of a former version; delete it or choose another out")
    folder = claim(config.out, WRITES, made_from)
    shards = -(-config.identities // config.shard)
    known = _known(folder)
    missing = [number for number in range(shards) if not _is_whole(_path(config, number), known)]
    schema = _features().arrow_schema
    schema = schema.with_metadata({**schema.metadata, b"made_from": json.dumps(made_from).encode()})
    tasks = [(config, number, schema) for number in missing]
    done = config.identities - sum(
        min(config.shard, config.identities - number * config.shard) for number in missing
    )
    with tqdm(total=config.identities, initial=done, desc="people", unit="person") as bar:
        if tasks:
            for _, people in each(_render_shard, tasks, config.workers):
                bar.update(people)
    written = {_path(config, number).name for number in missing}
    _finish(config, made_from, shards, {name: found for name, found in known.items() if name not in written})
    return folder
