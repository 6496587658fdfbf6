"""Where people come from, one function a kind of place; each says who is on which picture and decodes none."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hyperdb import heads
from hyperdb.data.pictures import Files, Reader, Shards, Table
from hyperdb.runtime.errors import UserError, first_line
from hyperdb.runtime.files import hash_files, load_json, load_tensors, load_text
from hyperdb.runtime.output import RECORD
from hyperdb.runtime.paths import expand
from hyperdb.runtime.recipe import AROUND
from hyperdb.runtime.seed import derive, split_of

if TYPE_CHECKING:
    from datasets import Dataset, Features

SPLITS = ("train", "validation", "test")
LIKE_SPLITS = {*SPLITS, "training", "valid", "val", "dev", "eval", "testing"}  # as others call such folders
CAPTION = "a photo of a face"
READ = ("image", "identity", "caption", "config", "revision")  # what can be set after the question mark of a place
NONE = ("identity", "caption")  # of these what can be set to nothing: everybody is somebody else, no captions
BUILDERS = ("arrow", "cache", "imagefolder", "parquet")  # of datasets: how data on the hub may be stored
METADATA = "metadata.csv", "metadata.jsonl", "metadata.parquet"
ENDS = 4096  # bytes at each end of a photo's file that count in a digest
SAMPLE = 256  # pictures whose bytes count in a digest; of all others the lengths do


@dataclass
class Source:
    """Pictures that are not decoded yet, and what is known of each of the `n`.

    `seed [n]` is the person's own number, `split [n]` whose pictures may be trained on, `photo [n]` which are photos.
    `labels`, `names` and `digest` are those of `People`. `rendered` are the settings of a folder of `render_heads`.
    """

    reader: Reader
    seed: NDArray[np.int64]
    split: NDArray[np.str_]
    captions: Sequence[str]
    photo: NDArray[np.bool_]
    digest: str
    labels: dict[str, NDArray[Any]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    rendered: dict[str, Any] = field(default_factory=dict)


def _numbers(words: Sequence[str]) -> NDArray[np.int64]:
    """Return the numbers of the people called so, the same wherever they are."""
    of = {word: derive(0, "person", word) for word in set(words)}
    return np.array([of[word] for word in words], dtype=np.int64)


def _photos(reader: Reader, identity: Sequence[str], split: Sequence[str], digest: str) -> Source:
    """Return photos of the people called `identity [n]`, of which nothing else is known."""
    count = len(identity)
    photo = np.ones(count, dtype=np.bool_)
    return Source(reader, _numbers(identity), np.array(split, dtype=np.str_), [CAPTION] * count, photo, digest)


def _ends_of(file: Path) -> tuple[int, str]:
    """Return a picture's length, and 16 hex digits over its first and last bytes: an edited one differs there."""
    with file.open("rb") as content:
        size = file.stat().st_size
        ends = content.read(ENDS)
        content.seek(max(ENDS, size - ENDS))
        return size, hashlib.sha256(ends + content.read()).hexdigest()[:16]


def _aligned(path: Path) -> Source:
    """Read what `hyperdb preprocess` wrote."""
    every = [json.loads(line) for line in load_text(path / "manifest.jsonl").splitlines()]
    files = [path / record["file"] for record in every]
    # of all splits, and of the pictures too: other crops can have the same manifest
    told = [_ends_of(file) for file in files]
    digest = hashlib.sha256(f"{hash_files([path / 'manifest.jsonl'])} {told}".encode()).hexdigest()[:16]
    identity, split = ([str(record[key]) for record in every] for key in ("identity", "split"))
    return _photos(Files(files), identity, split, digest)


def _folder(path: Path) -> Source | None:
    """Read a folder with a folder a person, perhaps in folders `train`, `validation` and `test`; None for no pictures.

    A picture beside these folders is somebody's only one. Without split folders a person's name decides, as in
    `preprocess`.
    """
    from hyperdb.faces.image import suffixes

    readable = suffixes()
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in readable)
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        return None
    tops = {name.parts[0] for name in names if len(name.parts) > 1}
    divided = tops <= set(SPLITS) and all(name.parts[0] in tops for name in names)
    if not divided and tops and all(top.lower() in LIKE_SPLITS for top in tops):
        raise UserError(
            f"{path} is divided into {', '.join(sorted(tops))}: call these folders {', '.join(SPLITS)} and put no "
            "picture beside them, or each would be taken for one person"
        )
    inside = [Path(*name.parts[1:]) if divided else name for name in names]
    identity = [name.parts[0] if len(name.parts) > 1 else name.stem for name in inside]
    split = [name.parts[0] if divided else split_of(who) for name, who in zip(names, identity, strict=True)]
    digest = hashlib.sha256(json.dumps([(str(n), *_ends_of(path / n)) for n in names]).encode()).hexdigest()[:16]
    return _apart(path, _photos(Files([path / name for name in names]), identity, split, digest))


def _apart(where: Any, source: Source) -> Source:
    """Raise `UserError` if a person is in two splits: whoever is trained on must not be measured on."""
    found: dict[int, str] = {}
    for seed, split in zip(source.seed.tolist(), source.split.tolist(), strict=True):
        if found.setdefault(seed, split) != split:
            raise UserError(f"{where}: a person is in both splits {found[seed]} and {split}; put each in one of them")
    return source


def _index(path: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """Read the index of a folder of `render_heads`; `UserError` if shards are missing."""
    index: dict[str, Any] = load_json(path / "index.json")
    if len(shards) != index["shards"]:
        found = f"{len(shards)} of {index['shards']} shards"
        raise UserError(f"{path} has {found}; run the `hyperdb render_heads` that made it again")
    return index


def _digest_of_renders(start: str, config: Mapping[str, Any]) -> str:
    whole = {k: v for k, v in config.items() if k not in AROUND}
    return hashlib.sha256((start + json.dumps(whole, sort_keys=True)).encode()).hexdigest()[:16]


def _former(path: Path) -> Source:
    """Read what `hyperdb render_heads` wrote before it wrote Arrow."""
    shards = sorted(path.glob("shard-*.safetensors"))
    config = _index(path, shards)["config"]
    columns: dict[str, list[NDArray[Any]]] = {}
    captions: list[str] = []
    names: dict[str, list[str]] = {}
    for shard in shards:
        tensors, metadata = load_tensors(shard, without="image")
        captions += json.loads(metadata["captions"])
        names = json.loads(metadata["columns"])
        for name, value in tensors.items():
            columns.setdefault(name, []).append(value.numpy())
    labels = {name: np.concatenate(values) for name, values in columns.items()}
    seed, photo = labels.pop("seed"), labels["style"] == names["style"].index("photo")
    split = np.full(len(seed), config["split"])
    digest = _digest_of_renders(hash_files(shards[:1]), config)
    return Source(Shards(shards), seed, split, captions, photo, digest, labels, names, config)


def _rendered(path: Path) -> Source:
    """Read what `hyperdb render_heads` wrote."""
    shards = sorted(path.glob("data-*.arrow"))
    index = _index(path, shards)
    config = index["config"]
    source = _saved(path, {})
    # of how they were made, not of their pixels: another processor rounds a few of those to the next level
    source.digest, source.rendered = _digest_of_renders(str(index.get("heads_sha256")), config), config
    return source


def _saved(path: Path, columns: Mapping[str, str]) -> Source:
    """Read a folder of `save_to_disk`: Arrow and JSON, nothing that could be run."""
    import datasets

    found = datasets.load_from_disk(str(path), keep_in_memory=False)
    return _of_table(str(path), found if isinstance(found, dict) else {str(found.split or "whole"): found}, columns)


def _parquet(path: Path, files: Sequence[Path], columns: Mapping[str, str]) -> Source:
    """Read parquet files, through the cache of `datasets`; of the splits that their names begin with, or of none."""
    import datasets

    found: dict[str, list[str]] = {}
    for file in files:
        with file.open("rb") as content:
            if content.read(4) != b"PAR1":
                raise UserError(f"{file} is no parquet file, or damaged; copy or download it again")
        named = re.match(r"(train|validation|test)(?![a-z])", file.name)
        found.setdefault(named[1] if named else "whole", []).append(str(file.resolve()))
    if "whole" in found:
        found = {"whole": [str(file.resolve()) for file in files]}
    return _of_table(str(path), datasets.load_dataset("parquet", data_files=found), columns)


def _described(path: Path) -> bool:
    """Whether a folder of pictures has a table of what they show, beside them or in folders of splits."""
    return any((path / where / name).is_file() for name in METADATA for where in ("", *SPLITS))


def _imagefolder(path: Path, columns: Mapping[str, str]) -> Source:
    """Read a folder of pictures with such a table, as `datasets` does and through its cache."""
    import datasets

    try:
        found = datasets.load_dataset("imagefolder", data_dir=str(path.resolve()))
    except Exception as error:  # of what a table may hold it says no more
        why = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UserError(
            f"{path}: the metadata does not fit the pictures ({why}); expected a column file_name with their names, as "
            "datasets' imagefolder has it, in every folder of a split"
        ) from error
    return _of_table(str(path), {split: _embedded(part) for split, part in found.items()}, columns)


def _hub(name: str, settings: Mapping[str, str]) -> Source:
    """Read a data set of the hub, or offline of its cache."""
    import datasets

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"hub:{name} is no id of a data set; expected hub:ORG/NAME")
    if Path(name).exists():  # which would be read instead
        raise UserError(f"{name} is a folder here; read it as {name}, or the hub's from another folder")
    where = {"name": settings.get("config"), "revision": settings.get("revision")}
    builder = datasets.load_dataset_builder(name, **where)
    kind = type(builder).__module__.split(".")[-1]
    if kind not in BUILDERS:
        raise UserError(f"hub:{name} is stored as {kind}; expected parquet or a folder of pictures")
    builder.download_and_prepare()
    found = builder.as_dataset()
    if "imagefolder" in (kind, builder.info.builder_name):  # whose table has paths of what was downloaded
        found = datasets.DatasetDict({split: _embedded(part) for split, part in found.items()})
    return _of_table(f"hub:{name}", found, settings)


def _embedded(part: Dataset) -> Dataset:
    """Return the data set with the bytes of its pictures in the table, which is kept in the cache of `datasets`."""
    from datasets.table import embed_table_storage

    whole = part.with_format("arrow").map(embed_table_storage, batched=True, batch_size=64)
    return whole.with_format(None)


def _of_table(where: str, splits: Mapping[str, Dataset], settings: Mapping[str, str]) -> Source:
    """Read data sets of `datasets`, one a split; each is taken at its word if all are called train, validation or test.

    One called train alone, or others, are divided by the hash of a person's name, as in `preprocess`; rendered people
    by their seeds.
    """
    parts = list(splits.values())
    features = parts[0].features
    if any(part.features != features for part in parts[1:]):
        raise UserError(f"{where}: the splits {', '.join(splits)} have different columns")
    table = pa.concat_tables([part.data.table.replace_schema_metadata(None) for part in parts])
    reader = Table(where, table.column(_column(where, features, settings, "image")))
    mine = {"style", "seed"} <= set(features) and "photo" in (getattr(features["style"], "names", None) or ())
    mine = mine and "identity" not in settings
    seed, words = _people(where, table, features, settings, "seed" if mine else "identity")
    named = [split for split, part in splits.items() for _ in range(len(part))]
    if mine or set(splits) == {"train"} or not set(splits) <= set(SPLITS):
        divided = {word: heads.split_of(int(word)) if mine else split_of(word) for word in set(words)}
        named = [divided[word] for word in words]
    caption = settings.get("caption", "caption" if "caption" in features else "")
    captions = _of(where, table, caption).to_pylist() if caption else [CAPTION] * table.num_rows
    if not all(isinstance(text, str) for text in captions):
        raise UserError(
            f"{where}: the column {caption} holds {table.column(caption).type}, expected a text in each "
            "row; name another with ?caption=COLUMN after it, or none with ?caption="
        )
    labels, names = _labels(table, features) if mine else ({}, {})
    photo = labels["style"] == names["style"].index("photo") if mine else np.ones(len(seed), dtype=np.bool_)
    digest = hashlib.sha256(json.dumps([words, named, captions, reader.lengths().tolist()]).encode())
    digest.update(reader.sample(SAMPLE))
    split = np.array(named, dtype=np.str_)
    return _apart(where, Source(reader, seed, split, captions, photo, digest.hexdigest()[:16], labels, names))


def _of(where: str, table: pa.Table, column: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise UserError(f"{where} has no column {column}; it has {', '.join(table.column_names)}")
    return table.column(column)


def _column(where: str, features: Features, settings: Mapping[str, str], kind: str) -> str:
    """Return the column of pictures: the one that is named, else the only one."""
    import datasets

    if kind in settings:
        if settings[kind] not in features:
            raise UserError(f"{where} has no column {settings[kind]}; it has {', '.join(features)}")
        return settings[kind]
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) == 1:
        return found[0]
    which = f"several columns of pictures, {', '.join(found)}" if found else "no column of the kind Image"
    raise UserError(f"{where} has {which}; name one with ?image=COLUMN after it; its columns: {', '.join(features)}")


def _people(
    where: str, table: pa.Table, features: Features, settings: Mapping[str, str], usual: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Return everybody's numbers and names `[n]`, of the column that is named or the `usual` one; `seed` holds numbers.

    An empty setting makes each picture a person of its own.
    """
    column = settings.get("identity", usual)
    if "identity" not in settings and usual not in features:
        raise UserError(
            f"{where} has no column identity; name the one that says who it is with ?identity=COLUMN after it, or "
            f"?identity= where every picture is somebody else; its columns: {', '.join(features)}"
        )
    if column == "":
        words = [str(row) for row in range(table.num_rows)]
        return _numbers(words), words
    values = _of(where, table, column).to_pylist()
    if not all(isinstance(value, str | int) for value in values):
        raise UserError(f"{where}: the column {column} holds {table.column(column).type}, expected names or numbers")
    if (names := getattr(features[column], "names", None)) is not None:
        values = [names[value] if 0 <= value < len(names) else str(value) for value in values]
    words = [str(value) for value in values]
    if usual == "seed" and column == "seed":
        return np.array(values, dtype=np.int64), words
    return _numbers(words), words


def _labels(table: pa.Table, features: Features) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]]]:
    """Return the columns of numbers of rendered people, but the seed, and the words behind those that are indices."""
    labels, names = {}, {}
    for name, feature in features.items():
        column = table.column(name)
        if pa.types.is_list(column.type):
            flat = np.concatenate([chunk.flatten().to_numpy(False) for chunk in column.chunks])
            labels[name] = flat.reshape(table.num_rows, -1)
        elif name != "seed" and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            labels[name] = column.to_numpy()
        if getattr(feature, "names", None) is not None:
            names[name] = list(feature.names)
    return labels, names


def _settings(place: str) -> tuple[str, dict[str, str]]:
    """Divide `PLACE?image=COLUMN&identity=COLUMN` into the place and its settings."""
    where, _, query = place.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and (not pairs or any(key not in READ or (key not in NONE and not value) for key, value in pairs)):
        raise UserError(
            f"{place}: after the question mark stand {', '.join(f'{key}=...' for key in READ)}, joined by &"
        )
    return where, dict(pairs)


def _find(place: str) -> Source | None:
    """Read what is there, whichever kind it is; None for none."""
    where, settings = _settings(place)
    if where.startswith("hub:"):
        return _hub(where.removeprefix("hub:"), settings)
    path = Path(expand(where))
    if (path / "index.json").is_file():
        return _rendered(path) if (path / "state.json").is_file() else _former(path)
    if (path / "manifest.jsonl").is_file():
        return _aligned(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, settings)
    if _described(path):
        return _imagefolder(path, settings)
    files = [path] if path.suffix == ".parquet" and path.is_file() else sorted(path.rglob("*.parquet"))
    if files:
        return _parquet(path, files, settings)
    # of our own folders those that lack their index are not finished
    return _folder(path) if path.is_dir() and not (path / RECORD).is_file() else None


def is_here(place: str) -> bool:
    """Whether a place can be looked at as it is: nothing has to be downloaded, and nothing converted in a cache."""
    where, _ = _settings(place)
    path = Path(expand(where))
    converted = _described(path) or next(path.rglob("*.parquet"), None) is not None
    return not where.startswith("hub:") and path.is_dir() and not converted


def open_source(place: str, renders: str = "") -> Source:
    """Find out who is where, without decoding a picture.

    `place` is a folder of `render_heads` or `preprocess`, a folder with a folder a person, one of pictures with a
    `metadata.csv`, `.jsonl` or `.parquet` (`datasets`' imagefolder), a folder of `save_to_disk`, parquet files, or
    `hub:ORG/NAME`. What stands in tables may be told which columns to read:
    `hub:ORG/NAME?image=COLUMN&identity=COLUMN`. Raises `UserError` for anything else, and for what is damaged.
    """
    try:
        found = _find(place)
    except UserError:
        raise
    except Exception as error:  # libraries raise anything on foreign files
        raise UserError(_told(place, error)) from error
    if found is None:
        raise UserError(
            f"{place} holds no faces; make it with `hyperdb render_heads{renders} out={place}` or `hyperdb preprocess`"
        )
    return found


def _told(place: str, error: Exception) -> str:
    """Say in one line why something cannot be read."""
    why = first_line(error)
    if not place.startswith("hub:"):
        return f"{place} is damaged ({why}); delete it and make it again"
    if "script" in why.lower():
        return f"{place} needs a program of its own to be read, and none is run: {why}"
    return f"{place} cannot be read, from the hub or its cache: {why}"
