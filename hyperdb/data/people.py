"""A set of face images with captions and identities, from rendered shards or from an aligned folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hyperdb.diffusion.base import Base
from hyperdb.diffusion.digest import digest_latents
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_files, load_json, load_tensors, load_text, save_tensors
from hyperdb.runtime.recipe import AROUND
from hyperdb.runtime.seed import derive

ONE_POSE = 0.15  # radians by which yaw and pitch may differ


@dataclass
class People:
    """`n` images `[n, 3, H, W]` uint8; `identity [n]` numbers the person, 0 .. I-1 by first appearance.

    `seed [n]` is the person's own number, the same whatever else is loaded: a render's seed, a hash of the name that a
    dataset gives the person. `labels` holds further columns `[n, ...]`, `names` the words behind label columns that
    are indices. `digest` names the whole data set, whichever people of it were loaded.
    """

    images: Tensor
    seed: Tensor
    captions: list[str]
    labels: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        number, self.identities = _numbered(self.seed.numpy())
        self.identity = torch.from_numpy(number)
        by_person = np.argsort(self.identity.numpy(), kind="stable")
        ends = np.cumsum(np.bincount(self.identity.numpy(), minlength=self.identities))
        self.rows = [torch.from_numpy(r) for r in np.split(by_person, ends[:-1])]

    def __len__(self) -> int:
        return len(self.images)

    def is_style(self, name: str) -> Tensor:
        """Return a mask `[n]` of the images of one style; photos of real people are all 'photo'."""
        if "style" not in self.labels:
            return torch.full((len(self),), name == "photo")
        return self.labels["style"] == self.names["style"].index(name)

    @cached_property
    def photos(self) -> list[Tensor]:
        """Each person's rows in the style photo, possibly none."""
        photo = self.is_style("photo")
        return [rows[photo[rows]] for rows in self.rows]

    def unlike(self, given: Tensor, others: Tensor) -> Tensor:
        """Order a person's photos `others [K]` such that those come first which are unlike the photos `given [V]`.

        Last come photos with an accessory that a given one shows, before them those in a place of a given one, before
        them those in its pose. Light needs no label, for every render has its own. What is equally unlike keeps its
        order, and so do photos of real people, of which nothing of this is known.
        """
        if not {"accessory", "place", "yaw", "pitch"} <= self.labels.keys():
            return others
        there, here = ({name: x[rows] for name, x in self.labels.items()} for rows in (others[:, None], given))
        worn = (there["accessory"] == here["accessory"]) & (here["accessory"] != self.names["accessory"].index("none"))
        place = there["place"] == here["place"]
        pose = ((there["yaw"] - here["yaw"]).abs() < ONE_POSE) & ((there["pitch"] - here["pitch"]).abs() < ONE_POSE)
        alike = 4 * worn.any(1) + 2 * place.any(1) + pose.any(1).long()  #            [K]
        return others[alike.argsort(stable=True)]

    def keys(self, by: str, rows: Tensor) -> Tensor:
        """Return whose fit a picture's is, `[len(rows)]` int64: by `image` a hash of its pixels, by `person` the seed.

        Either is the same whatever else is loaded.
        """
        if by == "person":
            return self.seed[rows]
        return torch.tensor(
            [
                int.from_bytes(hashlib.blake2b(self.images[row].numpy().data, digest_size=8).digest(), "big") >> 1
                for row in rows.tolist()
            ],
            dtype=torch.long,
        )


def _numbered(seed: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Number values `[n]` by first appearance, `[n]` in 0 .. I-1, and count them."""
    _, first, inverse = np.unique(seed, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse], len(first)


@dataclass
class _Choice:
    """Which pictures of a data set are wanted; decided before any is decoded. See `load_people`."""

    first: int
    limit: int | None
    least: int
    photos: int | None

    def rows(self, seed: NDArray[np.int64], photo: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the rows wanted, in order, of pictures with these people `[n]`, some of them photos `[n]`."""
        number, people = _numbered(seed)
        able = np.bincount(number[photo], minlength=people) >= self.least
        rank = np.cumsum(able)[number] - 1 - self.first
        keep = able[number] & (rank >= 0)
        if self.limit is not None:
            keep &= rank < self.limit
        return np.flatnonzero(keep) if self.photos is None else np.flatnonzero(keep & photo)[: self.photos]


def load_people(
    path: str | Path,
    limit: int | None = None,
    split: str | None = "train",
    size: int | None = None,
    *,
    first: int = 0,
    least: int = 0,
    photos: int | None = None,
) -> People:
    """Read rendered shards (`hyperdb render_heads`) or an aligned folder (`hyperdb preprocess`).

    `limit` keeps so many identities from number `first` on, of those with at least `least` photos; `photos` keeps of
    theirs the first so many photos and nothing else. `split` None takes people of any split; `size` is the side
    wanted, None the side there is. Only what is kept is decoded, into one array. Raises `UserError` if the folder is
    not complete, is damaged, or holds renders of another size or another split: training, validation and test never
    share a person.
    """
    path, choice = Path(path), _Choice(first, limit, least, photos)
    try:
        if (path / "index.json").is_file():
            people = _rendered(path, choice, split, size)
        elif (path / "manifest.jsonl").is_file():
            people = _aligned(path, choice, split, size)
        else:
            raise UserError(
                f"{path} holds no faces; make it with `hyperdb render_heads out={path}` or `hyperdb preprocess`"
            )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and make it again") from error
    if len(people) == 0:
        of = f" of people with {least} photos" if least else ""
        of += f" from person {first} on" if first else ""
        raise UserError(f"{path} holds no images of the split {split!r}{of}")
    return people


def _rendered(path: Path, choice: _Choice, split: str | None, size: int | None) -> People:
    shards, index = sorted(path.glob("shard-*.safetensors")), load_json(path / "index.json")
    if size not in (None, there := index["config"]["size"]):
        raise UserError(
            f"{path} holds renders of {there} px, and {size} px are needed here; "
            f"make some with `hyperdb render_heads size={size} out=FOLDER`"
        )
    if split not in (None, here := index["config"]["split"]):
        raise UserError(
            f"{path} holds people of the {here} split, and {split} people are needed here; "
            f"make some with `hyperdb render_heads split={split} out=FOLDER`"
        )
    if len(shards) != index["shards"]:
        found = f"{len(shards)} of {index['shards']} shards"
        raise UserError(f"{path} has {found}; run the `hyperdb render_heads` that made it again")
    columns: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    names: dict[str, list[str]] = {}
    for shard in shards:
        tensors, metadata = load_tensors(shard, without="image")
        captions += json.loads(metadata["captions"])
        names = json.loads(metadata["columns"])
        for name, value in tensors.items():
            columns.setdefault(name, []).append(value)
    merged = {name: torch.cat(values) for name, values in columns.items()}
    photo = merged["style"] == names["style"].index("photo")
    rows = torch.from_numpy(choice.rows(merged["seed"].numpy(), photo.numpy()))
    images = torch.empty(len(rows), 3, there, there, dtype=torch.uint8)
    begin = done = 0
    for shard, seeds in zip(shards, columns["seed"], strict=True):
        inside = rows[(rows >= begin) & (rows < begin + len(seeds))] - begin
        if len(inside):
            images[done : done + len(inside)] = load_tensors(shard)[0]["image"][inside].permute(0, 3, 1, 2)
        begin, done = begin + len(seeds), done + len(inside)
    chosen = {name: value[rows] for name, value in merged.items()}
    whole = {k: v for k, v in index["config"].items() if k not in AROUND}
    digest = hashlib.sha256(hash_files(shards[:1]).encode() + json.dumps(whole, sort_keys=True).encode())
    words = [captions[i] for i in rows.tolist()]
    return People(images, chosen.pop("seed"), words, chosen, names, digest.hexdigest()[:16])


def _aligned(path: Path, choice: _Choice, split: str | None, size: int | None) -> People:
    from PIL import Image

    every = [json.loads(line) for line in load_text(path / "manifest.jsonl").splitlines()]
    # of all splits, and of the pictures too, by their length: other crops can have the same manifest
    lengths = [(path / r["file"]).stat().st_size for r in every]
    digest = hashlib.sha256(f"{hash_files([path / 'manifest.jsonl'])} {lengths}".encode()).hexdigest()[:16]
    records = [r for r in every if split in (None, r["split"])]
    seed = np.array([derive(0, "person", r["identity"]) for r in records], dtype=np.int64)
    rows = choice.rows(seed, np.ones(len(seed), dtype=np.bool_))
    images = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    for k, row in enumerate(rows):
        with Image.open(path / records[row]["file"]) as image:
            rgb = image.convert("RGB")
        if size is not None and rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.LANCZOS)
        if k == 0:
            images = torch.empty(len(rows), 3, rgb.height, rgb.width, dtype=torch.uint8)
        images[k] = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    return People(images, torch.from_numpy(seed[rows]), ["a photo of a face"] * len(rows), digest=digest)


def latent_moments(
    base: Base, people: People, folder: Path, rows: Tensor | None = None, mirrored: bool = False
) -> Tensor:
    """Return the latents' mean and standard deviation `[n, 2, c, h, w]` float16, computed once for a VAE.

    `rows [n]` are those of some pictures, None of all; `mirrored` turns each left to right first. They are kept in
    `folder`, beside the images, under the hashes of encoder and pixels: every base around an autoencoder of the same
    encoder and every stage shares them.
    """
    rows = torch.arange(len(people)) if rows is None else rows
    pixels = hashlib.sha256()
    for row in rows.tolist():
        pixels.update(people.images[row].numpy().data)
    key = f"{digest_latents(base.vae)} {pixels.hexdigest()[:16]}{' mirrored' if mirrored else ''}"
    cache = folder / f"moments-{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"
    if cache.is_file():
        tensors, metadata = load_tensors(cache)
        if metadata.get("key") == key:
            return tensors["moments"]
    parts = rows.split(256)
    bar = tqdm(parts, desc="encoding images", dynamic_ncols=True, disable=len(parts) < 4)
    found = []
    for part in bar:
        images = people.images[part]
        found.append(base.moments(images.flip(-1) if mirrored else images).half())
    moments = torch.cat(found)
    save_tensors(cache, {"moments": moments}, {"key": key})
    return moments
