"""Rendered shards and aligned folders become one set of people; incomplete folders are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hyperdb.data.people import People, latent_moments, load_people
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, save_json


def pixels(image: Image.Image) -> torch.Tensor:
    """Return a picture as `[3, H, W]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def people(rendered: Path) -> People:
    return load_people(rendered)


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


def test_rendered_shards_in_order(people: People, rendered: Path) -> None:
    assert len(people) == 12
    assert people.images.shape == (12, 3, 32, 32)
    assert people.images[0].dtype == torch.uint8
    assert people.identities == 4
    assert people.identity.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [rows.tolist() for rows in people.rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    second = datasets.load_from_disk(str(rendered)).select(range(6, 12))
    assert torch.equal(people.images[6:], torch.stack([pixels(row["image"]) for row in second]))
    assert people.seed[6:].tolist() == second["seed"][:]
    assert len(people.captions) == 12
    assert all("face" in caption for caption in people.captions)


def test_labels_have_words(people: People) -> None:
    assert people.labels["coefficients"].shape[0] == 12
    assert people.is_style("photo").tolist() == [True, True, False] * 4
    assert people.is_style("clay").logical_not().any()
    styles = {people.names["style"][i] for i in people.labels["style"].tolist()}
    assert "photo" in styles
    assert len(styles) > 1


def test_identities_are_numbered_by_first_appearance() -> None:
    seed = torch.tensor([40, 7, 40, 99, 7])
    people = People(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), seed, list("abcde"))
    assert people.identity.tolist() == [0, 1, 0, 2, 1]
    assert [rows.tolist() for rows in people.rows] == [[0, 2], [1, 4], [3]]
    assert people.is_style("photo").all()
    assert not people.is_style("clay").any()


def test_a_choice_of_people_and_photos_is_that_part_of_all(people: People, rendered: Path) -> None:
    later = load_people(rendered, 2, first=1)
    assert torch.equal(later.images[:], people.images[3:9])
    assert later.captions == people.captions[3:9]
    assert torch.equal(later.labels["age"], people.labels["age"][3:9])
    photos = load_people(rendered, first=1, photos=3)
    assert torch.equal(photos.images[:], people.images[[3, 4, 6]])
    assert load_people(rendered, least=2).identities == 4
    with pytest.raises(UserError, match="of people with 3 photos"):  # two views of three are photos
        load_people(rendered, least=3)
    with pytest.raises(UserError, match="from person 4 on"):
        load_people(rendered, first=4)


def test_photos_unlike_those_given_come_first() -> None:
    """A hat on the beach; a hat, the beach, its pose, then nothing of it twice."""
    names = {"accessory": ["none", "glasses", "hat"], "place": ["plain", "beach", "forest"]}
    labels = {
        "accessory": torch.tensor([2, 2, 0, 0, 1, 0]),
        "place": torch.tensor([1, 2, 1, 2, 2, 2]),
        "yaw": torch.tensor([0.0, 0.5, 0.5, 0.1, 0.1, -0.5]),
        "pitch": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.3, 0.0]),
    }
    people = People(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.zeros(6), ["a face"] * 6, labels, names)

    def order(given: list[int], others: list[int]) -> list[int]:
        return people.unlike(torch.tensor(given), torch.tensor(others)).tolist()

    assert order([0], [1, 2, 3, 4, 5]) == [4, 5, 3, 2, 1]
    assert order([0, 3], [1, 2, 4, 5]) == [4, 5, 2, 1]  # two in the second one's place, one in the first one's
    assert order([5], [3, 2, 0]) == [2, 0, 3]  # to wear nothing is no accessory
    people.labels = {}
    assert order([0], [1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5]


def test_keys_are_of_the_pixels_or_of_the_person(
    people: People, rendered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert people.keys("image", torch.arange(3).repeat(70)).unique().numel() == 3  # in parts, with a bar
    assert "hashing photos" in capsys.readouterr().err
    later, rows = load_people(rendered, first=2), torch.tensor([7, 10])
    assert torch.equal(later.keys("image", rows - 6), people.keys("image", rows))
    assert torch.equal(later.keys("person", rows - 6), people.seed[rows])
    assert people.keys("image", torch.arange(12)).unique().numel() == 12


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_limit_keeps_the_first_identities(people: People, rendered: Path, limit: int) -> None:
    few = load_people(rendered, limit)
    assert few.identities == min(limit, 4)
    assert torch.equal(few.images[:], people.images[: 3 * limit])


def test_a_folder_without_index_is_not_complete(rendered: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no faces; make it with `hyperdb render_heads out="):
        load_people(tmp_path / "nowhere")
    asked = "render_heads split=test size=32 identities=3 views=6 photo_views=6 out="
    with pytest.raises(UserError, match=f"holds no faces; make it with `hyperdb {asked}"):
        load_people(tmp_path / "nowhere", 3, "test", 32, least=6)
    with pytest.raises(UserError, match=f"`hyperdb {asked}FOLDER`"):
        load_people(rendered, 3, "test", 32, least=6)
    shutil.copytree(rendered, tmp_path / "part")
    for name in ("index.json", "state.json", "dataset_info.json"):  # which are written when all shards are there
        (tmp_path / "part" / name).unlink()
    with pytest.raises(UserError, match="holds no faces"):
        load_people(tmp_path / "part")


def test_a_folder_without_a_shard_is_refused(rendered: Path, tmp_path: Path) -> None:
    shutil.copytree(rendered, tmp_path / "part")
    (tmp_path / "part" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="1 of 2 shards"):
        load_people(tmp_path / "part")


def test_another_split_is_refused(rendered: Path) -> None:
    with pytest.raises(UserError, match="people of the train split, and test people"):
        load_people(rendered, split="test")
    assert load_people(rendered, split=None).identities == 4


def test_another_size_is_refused(rendered: Path) -> None:
    with pytest.raises(UserError, match="renders of 32 px, and 64 px are needed"):
        load_people(rendered, size=64)


def test_the_digest_is_of_the_people_not_of_where_they_lie(people: People, rendered: Path, tmp_path: Path) -> None:
    shutil.copytree(rendered, tmp_path / "moved")
    index = load_json(tmp_path / "moved" / "index.json")
    index["config"] |= {"out": "elsewhere", "workers": 7}
    save_json(tmp_path / "moved" / "index.json", index)
    assert load_people(tmp_path / "moved").digest == people.digest
    for key, changed in (("config", {**index["config"], "seed": 1}), ("heads_sha256", "another")):
        save_json(tmp_path / "moved" / "index.json", {**index, key: changed})
        assert load_people(tmp_path / "moved").digest != people.digest


def test_the_digest_is_the_same_where_a_processor_rounds_otherwise(
    people: People, rendered: Path, tmp_path: Path
) -> None:
    shard = min(rendered.glob("data-*.arrow"))

    def rounded(row: dict[str, Any]) -> dict[str, Any]:
        pixels = np.array(row["image"])
        return {"image": Image.fromarray(pixels + (pixels < 255).astype(np.uint8))}

    shutil.copytree(rendered, tmp_path / "there")
    other = datasets.Dataset.from_file(str(shard)).map(rounded)
    other.save_to_disk(tmp_path / "other")
    (written,) = (tmp_path / "other").glob("data-*.arrow")
    shutil.copy(written, tmp_path / "there" / shard.name)
    there = load_people(tmp_path / "there")
    assert not torch.equal(there.images[:1], people.images[:1])
    assert there.digest == people.digest


# --- latents


def test_moments_are_computed_once_and_kept(
    people: People, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, calls = tmp_path, []
    encode = base.moments
    monkeypatch.setattr(base, "moments", lambda images: calls.append(len(images)) or encode(images))
    moments = latent_moments(base, people, cache)
    assert moments.shape == (12, 2, *base.latent_shape)
    assert moments.dtype == torch.float16
    torch.testing.assert_close(moments, encode(people.images[:]).half())
    assert calls == [12]
    assert torch.equal(latent_moments(base, people, cache), moments)
    assert calls == [12]
    monkeypatch.setattr(base, "digest", "another")  # another base around the same autoencoder
    latent_moments(base, people, cache)
    assert calls == [12]
    with torch.no_grad():
        next(base.vae.parameters()).mul_(2)
    latent_moments(base, people, cache)
    assert calls == [12, 12]
    base.vae.register_to_config(scaling_factor=0.5)
    latent_moments(base, people, cache)
    assert calls == [12, 12, 12]


def test_moments_of_some_rows_and_of_pictures_turned_round(people: People, base: Base, tmp_path: Path) -> None:
    rows = torch.tensor([4, 1, 4])
    found = latent_moments(base, people, tmp_path, rows)
    torch.testing.assert_close(found, base.moments(people.images[rows]).half())
    turned = latent_moments(base, people, tmp_path, rows, mirrored=True)
    torch.testing.assert_close(turned, base.moments(people.images[rows].flip(-1)).half())
    assert not torch.equal(turned, found)
    assert torch.equal(latent_moments(base, people, tmp_path, rows), found)


def test_moments_of_another_choice_of_images_are_computed_anew(
    rendered: Path, base: Base, tmp_path: Path
) -> None:
    """The cache of one half of the images is not mistaken for that of the other."""
    cache = tmp_path
    first, second = load_people(rendered, 2), load_people(rendered, 2, first=2)
    assert first.images.shape == second.images.shape
    latent_moments(base, first, cache)
    found = latent_moments(base, second, cache)
    torch.testing.assert_close(found, base.moments(second.images[:]).half())


# --- aligned folders


@pytest.fixture
def aligned(tmp_path: Path) -> Path:
    """What `hyperdb preprocess` leaves: ada and ben in train, cy in test; 40 px."""
    rng = np.random.default_rng(0)
    records = []
    for i, (identity, split) in enumerate(
        [("ben", "train"), ("ada", "train"), ("cy", "test"), ("ben", "train")]
    ):
        (tmp_path / "faces").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "faces" / f"{i}.png")
        records.append({"file": f"faces/{i}.png", "identity": identity, "split": split})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_aligned_folder(aligned: Path) -> None:
    people = load_people(aligned, size=40)
    assert people.identity.tolist() == [0, 1, 0]
    with Image.open(aligned / "faces" / "1.png") as image:
        assert torch.equal(people.images[1], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert people.captions == ["a photo of a face"] * 3
    assert people.is_style("photo").all()
    assert load_people(aligned, split="test", size=32).images.shape == (1, 3, 32, 32)
    assert load_people(aligned, limit=1, size=32).identities == 1


def test_aligned_folder_without_the_split(aligned: Path) -> None:
    with pytest.raises(UserError, match="no images of the split 'validation'"):
        load_people(aligned, split="validation")


def test_a_person_is_the_same_whatever_is_loaded(aligned: Path) -> None:
    """Ben is not numbered anew when others are left out, before him or after him."""
    everyone = load_people(aligned, split=None, size=40)
    ben, ada, cy = everyone.seed[[0, 1, 2]].tolist()
    assert len({ben, ada, cy}) == 3
    assert everyone.seed.tolist() == [ben, ada, cy, ben]
    assert load_people(aligned, split="test", size=32).seed.tolist() == [cy]
    assert load_people(aligned, limit=1, size=32).seed.tolist() == [ben, ben]
    assert load_people(aligned, first=1, size=32).seed.tolist() == [ada]
    assert load_people(aligned, least=2, split=None, size=32).seed.tolist() == [ben, ben]
    lines = (aligned / "manifest.jsonl").read_text().splitlines()
    (aligned / "manifest.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert load_people(aligned, split=None, size=40).seed.tolist() == [ben, cy, ada, ben]


def test_the_digest_is_of_the_whole_folder(aligned: Path) -> None:
    digest = load_people(aligned, size=32).digest
    assert load_people(aligned, 1, None, 40, photos=1).digest == digest
    assert load_people(aligned, split="test", size=32).digest == digest
    Image.new("RGB", (40, 40)).save(aligned / "faces" / "2.png")  # another crop of the same photo: same manifest
    assert load_people(aligned, size=32).digest != digest


def test_only_what_is_wanted_is_decoded(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or real(path))
    load_people(aligned, limit=1, size=32)
    assert opened == ["0.png", "3.png"]
    opened.clear()
    load_people(aligned, size=32, photos=2, split=None)
    assert opened == ["0.png", "1.png"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
def test_only_the_pictures_of_a_batch_are_in_memory(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512), "red").save(tmp_path / "red.png")
    records = [{"file": "red.png", "identity": str(i), "split": "train"} for i in range(256)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in text.splitlines() if line.startswith(name)).split()[1])

    load_people(tmp_path, limit=2, size=512)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    people = load_people(tmp_path, size=512)
    for part in people.images.split(4):
        assert part.shape == (4, 3, 512, 512)
    assert people.images.shape == (256, 3, 512, 512)
    assert status("VmHWM") - before < 0.5 * 256 * 3 * 512 * 512
