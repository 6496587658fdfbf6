"""A set of face images with captions and identities, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hyperdb.data.pictures import Pictures
from hyperdb.data.sources import open_source
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.digest import digest_latents
from hyperdb.runtime.cache import kept
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_picture
from hyperdb.runtime.lazy import PART

ONE_POSE = 0.15  # radians by which yaw and pitch may differ


@dataclass
class People:
    """`n` images `[n, 3, H, W]` uint8; `identity [n]` numbers the person, 0 .. I-1 by first appearance.

    The images are on the disk: `images[rows]` decodes some, and all of them are never in memory.
    `seed [n]` is the person's own number, the same whatever else is loaded: a render's seed, a hash of the name that a
    dataset gives the person. `labels` holds further columns `[n, ...]`, `names` the words behind label columns that
    are indices. `digest` names the whole data set, whichever people of it were loaded.
    """

    images: Pictures
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

        Last come photos with an accessory that the first given one shows, before them those in its place, before them
        those in its pose. What is equally unlike the first one is ordered by the others in the same way. Light needs no
        label, for every render has its own. What is still equal keeps its order, and so do photos of real people, of
        which nothing of this is known.
        """
        if not {"accessory", "place", "yaw", "pitch"} <= self.labels.keys():
            return others
        there, here = ({name: x[rows] for name, x in self.labels.items()} for rows in (others[:, None], given))
        worn = (there["accessory"] == here["accessory"]) & (here["accessory"] != self.names["accessory"].index("none"))
        place = there["place"] == here["place"]
        pose = ((there["yaw"] - here["yaw"]).abs() < ONE_POSE) & ((there["pitch"] - here["pitch"]).abs() < ONE_POSE)
        alike = torch.stack([pose, place, worn], -1)  #                               [K, V, 3]
        first, some = ((x * torch.tensor([1, 2, 4])).sum(-1) for x in (alike[:, 0], alike.any(1)))  # [K]
        return others[(8 * first + some).argsort(stable=True)]

    def given_first(self, named: str, given: int, least: int, reference: int = 0) -> list[Tensor]:
        """Return the photos `[K]` of who has `least` or more: `given` from number `reference` on, then the `unlike`.

        Raises `UserError`, with what the data is `named`, if they are not two people, who can be told from each other.
        """
        turned = [r.roll(-reference) for r in self.photos if len(r) >= least]
        if len(turned) < 2:
            raise UserError(f"{named} needs at least two people with {least} photos each")
        return [torch.cat([r[:given], self.unlike(r[:given], r[given:])]) for r in turned]

    def keys(self, by: str, rows: Tensor) -> Tensor:
        """Return whose fit a picture's is, `[len(rows)]` int64: by `image` a hash of its pixels, by `person` the seed.

        Either is the same whatever else is loaded. The hashes are kept in the cache.
        """
        if by == "person":
            return self.seed[rows]

        def hashed(first: int) -> Iterator[Tensor]:
            for part in _parts(rows, first, "hashing photos"):
                yield torch.tensor([hash_picture(image) for image in self.images[part]], dtype=torch.long)

        return kept(None, "keys", f"keys {self.images.key(rows)}", len(rows), hashed)


def _parts(rows: Tensor, first: int, what: str) -> Iterator[Tensor]:
    """Return the rows from `first` on in parts, with a bar over them all where they are many."""
    parts, done = rows[first:].split(PART), first // PART
    whole = len(parts) + done
    return iter(tqdm(parts, what, whole, initial=done, dynamic_ncols=True, disable=whole < 4))


def _numbered(seed: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Number values `[n]` by first appearance, `[n]` in 0 .. I-1, and count them."""
    _, first, inverse = np.unique(seed, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse], len(first)


@dataclass
class _Choice:
    """Which pictures of a data set are wanted; decided before any is looked at. See `load_people`."""

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
    """Find people in any place that `hyperdb.data.sources.open_source` knows; their pictures are decoded when used.

    `limit` keeps so many identities from number `first` on, of those with at least `least` photos; `photos` keeps of
    theirs the first so many photos and nothing else. `split` None takes people of any split; `size` is the side
    wanted, None the side there is. Raises `UserError` if the place is not complete, is damaged, holds no square
    pictures of faces, or holds renders of another size or another split: training, validation and test never share a
    person.
    """
    renders = "" if split in (None, "train") else f" split={split}"
    renders += f" size={size}" * (size is not None)
    if limit is not None:
        renders += f" identities={first + limit}"
    if least:
        renders += f" views={least} photo_views={least}"
    source = open_source(str(path), renders)
    _require(path, source.rendered, split, size, renders)
    mine = np.flatnonzero(np.ones(len(source.seed), dtype=np.bool_) if split is None else source.split == split)
    rows = mine[_Choice(first, limit, least, photos).rows(source.seed[mine], source.photo[mine])]
    if len(rows) == 0:
        of = f" of people with {least} photos" if least else ""
        of += f" from person {first} on" if first else ""
        raise UserError(f"{path} holds no images of the split {split!r}{of}")
    labels = {name: torch.from_numpy(value[rows]) for name, value in source.labels.items()}
    captions = [source.captions[row] for row in rows.tolist()]
    pictures = Pictures(source.reader, rows, size, source.digest)
    return People(pictures, torch.from_numpy(source.seed[rows]), captions, labels, source.names, source.digest)


def _require(path: str | Path, made: Mapping[str, Any], split: str | None, size: int | None, renders: str) -> None:
    """Raise `UserError` for a folder of renders that was made for something else; `renders` are words for another."""
    if size not in (None, there := made.get("size", size)):
        raise UserError(
            f"{path} holds renders of {there} px, and {size} px are needed here; "
            f"make some with `hyperdb render_heads{renders} out=FOLDER`"
        )
    if split not in (None, here := made.get("split", split)):
        raise UserError(
            f"{path} holds people of the {here} split, and {split} people are needed here; "
            f"make some with `hyperdb render_heads{renders or ' split=train'} out=FOLDER`"
        )


def latent_moments(
    base: Base, people: People, folder: Path | None = None, rows: Tensor | None = None, mirrored: bool = False
) -> Tensor:
    """Return the latents' mean and standard deviation `[n, 2, c, h, w]` float16, computed once for a VAE.

    `rows [n]` are those of some pictures, None of all; `mirrored` turns each left to right first. They stay on the
    disk, in the cache or in `folder`, under the digests of data and encoder: every base around an autoencoder of the
    same encoder and every stage shares them, and only those that are looked at are read.
    """
    rows = torch.arange(len(people)) if rows is None else rows
    images = people.images
    key = f"{digest_latents(base.vae)} {images.key(rows)}{' mirrored' if mirrored else ''}"

    def encoded(first: int) -> Iterator[Tensor]:
        for part in _parts(rows, first, "encoding images"):
            yield base.moments(images[part].flip(-1) if mirrored else images[part]).half()

    return kept(folder, "moments", key, len(rows), encoded)
