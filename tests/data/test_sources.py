"""Every place that people can come from, and what is refused there; no place is written into."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import cv2
import datasets
import numpy as np
import pillow_heif
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hyperdb import config as configuration
from hyperdb.data import pictures, sources
from hyperdb.data.people import People, latent_moments, load_people
from hyperdb.diffusion import DiffusionConfig
from hyperdb.faces.image import read_image
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_files, load_json, save_json, save_tensors
from hyperdb.runtime.seed import derive, split_of
from hyperdb.stages import render_heads

NAMES = ["ben", "ada", "cy", "ben"]


@pytest.fixture
def images() -> list[Image.Image]:
    """Four pictures of noise, 40 px."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in NAMES]


@pytest.fixture
def folder(images: list[Image.Image], tmp_path: Path) -> Path:
    """A folder with a folder a person."""
    root = tmp_path / "folder"
    for i, (name, image) in enumerate(zip(NAMES, images, strict=True)):
        (root / name).mkdir(parents=True, exist_ok=True)
        image.save(root / name / f"{i}.png")
    return root


@pytest.fixture
def table(images: list[Image.Image]) -> datasets.Dataset:
    """The same as a data set, whose people are a column of classes."""
    kinds = datasets.ClassLabel(names=["ada", "ben", "cy"])
    features = datasets.Features({"image": datasets.Image(), "identity": kinds})
    return datasets.Dataset.from_dict({"image": images, "identity": [1, 0, 2, 1]}, features)


def same(people: People, images: list[Image.Image], names: list[str]) -> None:
    assert people.seed.tolist() == [derive(0, "person", name) for name in names]
    wanted = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    assert torch.equal(people.images[:], wanted)


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


# --- a folder a person


def test_a_folder_a_person(folder: Path, images: list[Image.Image]) -> None:
    people = load_people(folder, split=None)
    same(people, [images[i] for i in (1, 0, 3, 2)], ["ada", "ben", "ben", "cy"])
    assert people.captions == ["a photo of a face"] * 4
    digest = people.digest
    assert load_people(folder, limit=1, split=None, size=32).digest == digest
    images[0].save(folder / "ada" / "another.png")
    assert load_people(folder, split=None).digest != digest


def test_the_people_of_a_folder_are_divided_by_their_names(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        names = [name for name in sorted(NAMES) if split_of(name) == split]
        if names:
            assert load_people(folder, split=split).seed.tolist() == [derive(0, "person", name) for name in names]


def test_folders_called_after_splits_are_splits(folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    for name, split in (("ada", "train"), ("ben", "train"), ("cy", "test")):
        (tmp_path / "split" / split).mkdir(parents=True, exist_ok=True)
        (folder / name).rename(tmp_path / "split" / split / name)
    same(load_people(tmp_path / "split"), [images[1], images[0], images[3]], ["ada", "ben", "ben"])
    same(load_people(tmp_path / "split", split="test"), [images[2]], ["cy"])
    shutil.copytree(tmp_path / "split" / "train" / "ada", tmp_path / "split" / "test" / "ada")
    with pytest.raises(UserError, match="a person is in both splits test and train"):
        load_people(tmp_path / "split")


def test_folders_called_like_splits_are_nobody(folder: Path, tmp_path: Path) -> None:
    for name, split in (("ada", "train"), ("ben", "val"), ("cy", "test")):
        (tmp_path / "split" / split).mkdir(parents=True)
        (folder / name).rename(tmp_path / "split" / split / name)
    with pytest.raises(UserError, match="is divided into test, train, val: call these folders train, validation, test"):
        load_people(tmp_path / "split")


def test_pictures_in_no_folder_are_a_person_each(images: list[Image.Image], tmp_path: Path) -> None:
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("of no picture")
    assert load_people(tmp_path, split=None).identities == 4


def test_a_folder_that_preprocess_has_not_finished_is_nobody(folder: Path) -> None:
    (folder / ".hyperdb.json").write_text("{}")
    with pytest.raises(UserError, match="holds no faces"):
        load_people(folder, split=None)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("RGB", (40, 60)), "has 40x60 px and is no square crop of a face; cut the faces out with"),
        (Image.new("RGB", (8, 8)), "at least 32 px"),
        (b"no picture at all", "is not an image .or badly damaged.; use PNG or JPEG"),
    ],
)
def test_pictures_that_are_no_faces(folder: Path, image: Image.Image | bytes, said: str) -> None:
    path = folder / "ada" / "1.png"
    image.save(path) if isinstance(image, Image.Image) else path.write_bytes(image)
    with pytest.raises(UserError, match=f"1.png {said}|1.png has 8x8 px; {said}"):
        load_people(folder, split=None, size=32)


def test_a_picture_that_is_cut_off_is_named(folder: Path) -> None:
    path = folder / "ada" / "1.png"
    path.write_bytes(path.read_bytes()[:1000])
    people = load_people(folder, split=None)
    with pytest.raises(UserError, match=r"ada/1\.png is truncated or damaged"):
        people.images[[0]]


@pytest.mark.parametrize("suffix", ["heic", "tiff", "16.png"])
def test_files_are_read_as_a_photo_to_personalise_is(folder: Path, images: list[Image.Image], suffix: str) -> None:
    """A phone's format, float colours, and colours of 16 bits, of which Pillow alone keeps the upper byte."""
    path = folder / "ada" / f"2.{suffix}"
    if suffix == "heic":
        pillow_heif.from_pillow(images[0]).save(path)
    else:
        deep = np.asarray(images[0])[..., ::-1] / np.float32(255)
        cv2.imwrite(str(path), deep if suffix == "tiff" else (deep * 64_000).astype(np.uint16))
    people = load_people(folder, limit=1, split=None)
    wanted = torch.from_numpy(read_image(path)).permute(2, 0, 1)
    assert torch.equal(people.images[:][1], wanted)
    assert wanted.float().std() > 30


def test_pictures_of_several_sizes_need_one_that_is_asked_for(folder: Path, images: list[Image.Image]) -> None:
    images[0].resize((48, 48)).save(folder / "ada" / "2.png")
    with pytest.raises(UserError, match="has 48 px a side, others 40"):
        load_people(folder, split=None)
    assert load_people(folder, split=None, size=32).images[:].shape == (5, 3, 32, 32)


# --- tables of `datasets`


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet", "parquet folder"])
def test_a_table(table: datasets.Dataset, images: list[Image.Image], tmp_path: Path, kind: str) -> None:
    place = tmp_path / "faces.parquet"
    if kind == "save_to_disk":
        place = tmp_path / "faces"
        table.save_to_disk(place)
    else:
        table.to_parquet(place)
    people = load_people(place.parent if kind == "parquet folder" else place, split=None)
    same(people, images, NAMES)
    some = load_people(place, split=split_of("ben"), first=0, limit=1)
    assert some.digest == people.digest
    assert set(some.seed.tolist()) == {derive(0, "person", "ben")}


def test_splits_are_taken_at_their_word(table: datasets.Dataset, images: list[Image.Image], tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": table.select([0, 1, 3]), "test": table.select([2])})
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for split, part in both.items():
        part.to_parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet")
    for place in (tmp_path / "saved", tmp_path / "files"):
        same(load_people(place), [images[0], images[1], images[3]], ["ben", "ada", "ben"])
        same(load_people(place, split="test"), [images[2]], ["cy"])
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "test")
    same(load_people(tmp_path / "test", split="test"), images, NAMES)
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "overlap")
    with pytest.raises(UserError, match="a person is in both splits"):
        load_people(tmp_path / "overlap")


def test_columns_have_any_names(table: datasets.Dataset, images: list[Image.Image], tmp_path: Path) -> None:
    other = table.rename_columns({"image": "photo", "identity": "who"}).add_column("said", list("abcd"))
    other.save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"has no column identity; .*\?identity=COLUMN.*its columns: photo, who, said"):
        load_people(tmp_path / "other")
    people = load_people(f"{tmp_path / 'other'}?identity=who&caption=said", split=None)
    same(people, images, NAMES)
    assert people.captions == list("abcd")
    assert load_people(f"{tmp_path / 'other'}?identity=", split=None).identities == 4
    several = other.remove_columns("said").add_column("caption", [["a", "b"]] * 4)
    several.save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match=r"caption holds .*expected a text in each row; .* none with \?caption=$"):
        load_people(f"{tmp_path / 'several'}?identity=who")
    none = load_people(f"{tmp_path / 'several'}?identity=who&caption=", split=None)
    assert none.captions == ["a photo of a face"] * 4
    two = other.add_column("more", [b"1", b"2", b"3", b"4"]).cast_column("more", datasets.Image())
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="several columns of pictures, photo, more; name one with"):
        load_people(f"{tmp_path / 'two'}?identity=who")
    same(load_people(f"{tmp_path / 'two'}?image=photo&identity=who", split=None), images, NAMES)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("identity=nobody", "has no column nobody; it has image, identity"),
        ("image=nothing", "has no column nothing"),
        ("image=identity", "the column of pictures holds int64, expected encoded pictures"),
        ("caption=identity", "the column identity holds int64, expected a text in each row"),
        ("identity=image", "the column image holds .*, expected names or numbers"),
        ("trust_remote_code=true", "after the question mark stand image=..., identity=..."),
        ("image", "after the question mark stand"),
    ],
)
def test_columns_that_cannot_be(table: datasets.Dataset, tmp_path: Path, query: str, said: str) -> None:
    table.save_to_disk(tmp_path / "faces")
    with pytest.raises(UserError, match=said):
        load_people(f"{tmp_path / 'faces'}?{query}")


def test_a_place_with_columns_is_a_word_of_the_command_line() -> None:
    place = "hub:org/name?image=photo&identity=who"
    assert configuration.load("precompute", [f"data={place}"]).data == place


def test_paths_in_a_table_are_not_followed(table: datasets.Dataset, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2
    image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image, "identity": ["a", "b"]}), tmp_path / "faces.parquet")
    with pytest.raises(UserError, match="2 pictures are paths without bytes, which are not followed"):
        load_people(f"{tmp_path / 'faces.parquet'}?image=image")


def test_what_is_no_table_is_refused(tmp_path: Path, table: datasets.Dataset) -> None:
    (tmp_path / "faces.parquet").write_bytes(pickle.dumps({"image": 1}))
    with pytest.raises(UserError, match=r"faces\.parquet is no parquet file"):
        load_people(tmp_path / "faces.parquet")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "faces.pkl").write_bytes(pickle.dumps({"image": 1}))
    with pytest.raises(UserError, match="holds no faces"):
        load_people(tmp_path / "only")
    table.save_to_disk(tmp_path / "saved")
    shard = next((tmp_path / "saved").glob("*.arrow"))
    shard.write_bytes(pickle.dumps(list(range(9))))
    with pytest.raises(UserError, match="saved is damaged"):
        load_people(tmp_path / "saved")
    table.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty\.parquet is damaged"):
        load_people(tmp_path / "empty.parquet")


def test_nothing_is_decoded_before_it_is_used(
    table: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.save_to_disk(tmp_path / "faces")
    decoded: list[int] = []
    real = pictures.Table.pixels
    monkeypatch.setattr(pictures.Table, "pixels", lambda self, row: decoded.append(row) or real(self, row))
    people = load_people(tmp_path / "faces", limit=2, split=None, size=32)
    assert decoded == []
    assert people.images[[2, 0]].shape == (2, 3, 32, 32)
    assert decoded == [3, 0]  # of the four, the third is nobody's whom we asked for


# --- renders


def test_renders_are_a_data_set(rendered: Path, tmp_path: Path) -> None:
    found, people = datasets.load_from_disk(str(rendered)), load_people(rendered)
    assert found[:]["caption"] == people.captions
    assert isinstance(found.features["image"], datasets.Image)
    assert found.features["style"].int2str(0) == "photo"
    files = [str(path) for path in sorted(rendered.glob("data-*.arrow"))]
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == found.features
    assert loaded["caption"][:] == people.captions
    found.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    found.filter(lambda row: row["seed"] > 0).save_to_disk(tmp_path / "few")
    again = datasets.load_dataset("parquet", data_files=str(tmp_path / "train-00000-of-00001.parquet"), split="train")
    assert again.features == found.features
    copy, few = load_people(tmp_path / "train-00000-of-00001.parquet"), load_people(tmp_path / "few")
    assert torch.equal(copy.images[:], people.images[:])
    assert torch.equal(copy.seed, people.seed)
    assert copy.names == people.names
    assert all(torch.equal(copy.labels[name], value) for name, value in people.labels.items())
    assert torch.equal(few.images[:], people.images[3:])
    assert len({people.digest, copy.digest, few.digest}) == 3
    with pytest.raises(UserError, match="no images of the split 'test'"):  # by their seeds, whatever the file is called
        load_people(tmp_path / "train-00000-of-00001.parquet", split="test")


@pytest.fixture
def former(rendered: Path, tmp_path: Path) -> Path:
    """The same people as `render_heads` wrote them before it wrote Arrow."""
    people, index = load_people(rendered), load_json(rendered / "index.json")
    made_from = render_heads._made_from(render_heads.Config(**index["config"]))
    for number, part in enumerate((slice(0, 6), slice(6, 12))):
        tensors = {name: value[part] for name, value in people.labels.items()} | {"seed": people.seed[part]}
        tensors["image"] = people.images[part].permute(0, 2, 3, 1)
        metadata = {"captions": people.captions[part], "columns": people.names, "made_from": made_from}
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        save_tensors(tmp_path / "former" / f"shard-{number:05d}.safetensors", tensors, texts)
    save_json(tmp_path / "former" / "index.json", index)
    return tmp_path / "former"


def test_renders_of_a_former_version_are_read(former: Path, rendered: Path) -> None:
    people, now = load_people(former), load_people(rendered)
    assert torch.equal(people.images[:], now.images[:])
    assert torch.equal(people.images[[7, 2]], now.images[[7, 2]])
    assert torch.equal(people.seed, now.seed)
    assert people.captions == now.captions
    assert people.names == now.names
    assert all(torch.equal(people.labels[name], value) for name, value in now.labels.items())
    config = {k: v for k, v in load_json(former / "index.json")["config"].items() if k not in ("out", "workers")}
    text = hash_files([former / "shard-00000.safetensors"]) + json.dumps(config, sort_keys=True)
    assert people.digest == hashlib.sha256(text.encode()).hexdigest()[:16]  # what was made from them states it
    with pytest.raises(UserError, match="renders of 32 px, and 64 px are needed"):
        load_people(former, size=64)
    with pytest.raises(UserError, match="people of the train split"):
        load_people(former, split="test")


def test_renders_of_a_former_version_are_not_made_again(former: Path) -> None:
    config = render_heads.Config(**load_json(former / "index.json")["config"] | {"out": str(former)})
    before = listing(former)
    assert render_heads.run(config) == former
    assert listing(former) == before
    (former / "index.json").unlink()
    with pytest.raises(UserError, match="unfinished renders of a former version"):
        render_heads.run(config)


# --- the hub


@pytest.fixture
def cached(table: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets` after somebody read the data set org/faces from the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table.to_parquet(tmp_path / "faces.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(tmp_path / "faces.parquet")})
    builder.download_and_prepare()
    version, digest = Path(builder.cache_dir).parts[-2:]
    there = tmp_path / "cache" / "org___faces" / "default" / version / digest
    shutil.copytree(builder.cache_dir, there)
    (there / "parquet-train.arrow").rename(there / "faces-train.arrow")
    info = load_json(there / "dataset_info.json") | {"dataset_name": "faces", "config_name": "default"}
    (there / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def test_a_data_set_of_the_hub_offline(cached: Path, images: list[Image.Image], in_tmp: Path) -> None:
    same(load_people("hub:org/faces", split=None), images, NAMES)
    same(load_people("hub:org/faces?image=image&identity=identity", split=None), images, NAMES)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hub:org/nothing", "hub:org/nothing cannot be read, from the hub or its cache: "),
        ("hub:nothing", "hub:nothing is no id of a data set; expected hub:ORG/NAME"),
        ("hub:../faces/x", "is no id of a data set"),
        ("hub:here/faces", "here/faces is a folder here"),
    ],
)
def test_what_the_hub_does_not_have(in_tmp: Path, place: str, said: str) -> None:
    (in_tmp / "here" / "faces").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        load_people(place)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_set_with_a_program_of_its_own_is_refused(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found faces.py")

    monkeypatch.setattr(datasets, "load_dataset_builder", script)
    with pytest.raises(UserError, match=r"hub:org/faces needs a program .* none is run: .*faces\.py"):
        load_people("hub:org/faces")


def test_a_data_set_that_is_no_table_of_pictures_is_refused(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "faces.csv").write_text("image,identity\n1,2\n")
    builder = datasets.load_dataset_builder("csv", data_files=str(in_tmp / "faces.csv"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(UserError, match="hub:org/faces is stored as csv; expected parquet or a folder of pictures"):
        load_people("hub:org/faces")


def test_a_folder_of_pictures_on_the_hub(folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = datasets.load_dataset_builder("imagefolder", data_dir=str(folder), drop_labels=False)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    people = load_people("hub:org/faces?identity=label", split=None)
    assert torch.equal(people.images[:], load_people(folder, split=None).images[:])
    assert sorted(people.seed.tolist()) == sorted(derive(0, "person", name) for name in NAMES)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # `datasets` leaves these tables open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_pictures_with_a_table_beside_them(images: list[Image.Image], tmp_path: Path, kind: str) -> None:
    """As `datasets` writes and reads them: file names, who it is, what is said of it."""
    for split, rows in (("train", [0, 1, 3]), ("test", [2])):
        (there := tmp_path / "faces" / split).mkdir(parents=True)
        for i in rows:
            images[i].save(there / f"{i}.png")
        lines = [{"file_name": f"{i}.png", "identity": NAMES[i], "text": f"picture {i}"} for i in rows]
        if kind == "csv":
            text = "\n".join(",".join(line.values()) for line in [{key: key for key in lines[0]}, *lines])
        else:
            text = "\n".join(map(json.dumps, lines))
        (there / f"metadata.{kind}").write_text(text + "\n")
    before = listing(tmp_path / "faces")
    people = load_people(f"{tmp_path / 'faces'}?caption=text")
    same(people, [images[0], images[1], images[3]], ["ben", "ada", "ben"])
    assert people.captions == ["picture 0", "picture 1", "picture 3"]
    same(load_people(tmp_path / "faces", split="test"), [images[2]], ["cy"])
    assert listing(tmp_path / "faces") == before
    with pytest.raises(UserError, match="has no column who; it has image, identity, text"):
        load_people(f"{tmp_path / 'faces'}?identity=who")
    (tmp_path / "faces" / "test" / f"metadata.{kind}").write_text("file_name\nnowhere.png\n")
    with pytest.raises(UserError, match=r"faces: the metadata does not fit .*expected a column file_name"):
        load_people(tmp_path / "faces")
    gc.collect()  # what is left open is told of here, not in another test


# --- what is kept


@pytest.mark.parametrize("kind", ["folder", "table", "rendered"])
def test_no_place_is_written_into(
    kind: str, folder: Path, table: datasets.Dataset, rendered: Path, tiny_base: Path, tmp_path: Path
) -> None:
    place = {"folder": folder, "table": tmp_path / "table", "rendered": rendered}[kind]
    if kind == "table":
        table.save_to_disk(place)
    before = listing(place)
    people = load_people(place, split=None, size=32)
    base = DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()
    latent_moments(base, people)
    people.keys("image", torch.arange(len(people)))
    assert listing(place) == before


def test_hashes_of_pictures_are_computed_once(rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERDB_CACHE", str(tmp_path))
    people, rows = load_people(rendered), torch.tensor([3, 1])
    keys = people.keys("image", rows)
    monkeypatch.setattr(pictures.Table, "pixels", None)
    assert torch.equal(load_people(rendered, limit=2).keys("image", rows), keys)
    assert len(list(tmp_path.iterdir())) == 1


def test_kinds_of_tables_that_are_read_hold_no_pickle() -> None:
    assert not {"pandas", "webdataset", "generator"} & set(sources.BUILDERS)
