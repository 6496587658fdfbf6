"""A set of face images with captions and identities, from rendered shards or from an aligned folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hyperdb.data import NOT_CONTENT
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.digest import digest_vae
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_files, load_json, load_tensors, save_tensors


@dataclass
class People:
    """`n` images `[n, 3, H, W]` uint8; `identity [n]` numbers the person, 0 .. I-1 by first appearance.

    `seed [n]` is the person's own number (a render's seed, a dataset's id); `labels` holds further columns
    `[n, ...]`, `names` the words behind label columns that are indices.
    """

    images: Tensor
    seed: Tensor
    captions: list[str]
    labels: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        _, first, inverse = np.unique(self.seed.numpy(), return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))
        self.identity = torch.from_numpy(order[inverse])
        self.identities = len(first)
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

    def subset(self, keep: Tensor) -> People:
        """Return the images selected by a mask or by indices `keep`."""
        index = torch.arange(len(self))[keep]
        return People(
            self.images[index],
            self.seed[index],
            [self.captions[i] for i in index.tolist()],
            {k: v[index] for k, v in self.labels.items()},
            self.names,
            self.digest,
        )


def load_people(
    path: str | Path, limit: int | None = None, split: str | None = "train", size: int | None = None
) -> People:
    """Read rendered shards (`hyperdb render_heads`) or an aligned folder (`hyperdb preprocess`).

    `limit` keeps the first so many identities; `split` None takes people of any split; `size` is the side wanted, None
    the side there is. Raises `UserError` if the folder is not complete, is damaged, or holds renders of another size or
    another split: training, validation and test never share a person.
    """
    path = Path(path)
    try:
        if (path / "index.json").is_file():
            people = _rendered(path, limit, split, size)
        elif (path / "manifest.jsonl").is_file():
            people = _aligned(path, split, size)
        else:
            raise UserError(
                f"{path} holds no faces; make it with `hyperdb render_heads out={path}` or `hyperdb preprocess`"
            )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and make it again") from error
    if limit is not None and people.identities > limit:
        people = people.subset(people.identity < limit)
    if len(people) == 0:
        raise UserError(f"{path} holds no images of the split {split!r}")
    return people


def _rendered(path: Path, limit: int | None, split: str | None, size: int | None) -> People:
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
    if limit is not None:
        shards = shards[: -(-limit // max(1, index["config"]["shard"]))]
    columns: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    names: dict[str, list[str]] = {}
    for shard in shards:
        tensors, metadata = load_tensors(shard)
        captions += json.loads(metadata["captions"])
        names = json.loads(metadata["columns"])
        for name, value in tensors.items():
            columns.setdefault(name, []).append(value)
    merged = {name: torch.cat(values) for name, values in columns.items()}
    images = merged.pop("image").permute(0, 3, 1, 2).contiguous()
    whole = {k: v for k, v in index["config"].items() if k not in NOT_CONTENT}
    digest = hashlib.sha256(hash_files(shards[:1]).encode() + json.dumps(whole, sort_keys=True).encode())
    return People(images, merged.pop("seed"), captions, merged, names, digest.hexdigest()[:16])


def _aligned(path: Path, split: str | None, size: int | None) -> People:
    from PIL import Image

    records = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    records = [r for r in records if split in (None, r["split"])]
    pixels = []
    for record in records:
        with Image.open(path / record["file"]) as image:
            side = (size, size) if size is not None else image.size
            pixels.append(np.asarray(image.convert("RGB").resize(side, Image.Resampling.LANCZOS)))
    people = {name: i for i, name in enumerate(dict.fromkeys(r["identity"] for r in records))}
    stacked = np.stack(pixels) if pixels else np.empty((0, 1, 1, 3), np.uint8)
    return People(
        torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([people[r["identity"]] for r in records], dtype=torch.long),
        ["a photo of a face"] * len(records),
        digest=hash_files([path / "manifest.jsonl"]),
    )


def latent_moments(base: Base, people: People, folder: Path) -> Tensor:
    """Return the latents' mean and standard deviation `[n, 2, c, h, w]` float16, computed once for a VAE.

    They are kept in `folder`, beside the images, under the hashes of VAE and pixels: every base around the same
    autoencoder and every stage shares them.
    """
    pixels = hashlib.sha256(people.images.numpy().tobytes())
    key = f"{digest_vae(base.vae)} {pixels.hexdigest()[:16]}"
    cache = folder / f"moments-{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"
    if cache.is_file():
        tensors, metadata = load_tensors(cache)
        if metadata.get("key") == key:
            return tensors["moments"]
    parts = people.images.split(256)
    bar = tqdm(parts, desc="encoding images", dynamic_ncols=True, disable=len(parts) < 4)
    moments = torch.cat([base.moments(part).half() for part in bar])
    save_tensors(cache, {"moments": moments}, {"key": key})
    return moments
