"""Fit LiDB weights to many photos or people: the hypernetwork's targets in weight space (paper section 4.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.adapters import AdapterConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.prior import PriorConfig

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.tuning.memory import Sketch


WRITES = ("fits-*.safetensors", "statistics.safetensors", "index.json", "prior.safetensors")
KEPT = "finished shards are kept"


@dataclass(kw_only=True)
class StoreFitConfig(FitConfig):
    """How an adapter is fitted; that of a person on the first `views` photos, an image's on it alone."""

    views: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 1:
            raise UserError(f"fit.views={self.views}: expected at least 1")


@dataclass(kw_only=True)
class Config:
    """Fit every photo of `identities` people from number `first` on, `batch` of them in one pass of the UNet.

    `by`: image fits every photo alone, the theta of image x of eq. 2, and `photos` bounds how many; person fits every
    person once, over the first `fit.views` photos: more of the person, less of one photo's pose and light. `split`:
    whose people (of an aligned folder; null: all). The hypernetwork is taught an image's fit from that image, a
    person's fit from any photo of that person.
    """

    diffusion: DiffusionConfig
    adapter: AdapterConfig
    fit: StoreFitConfig
    prior: PriorConfig
    data: FilePath
    name: str = "default"
    out: FilePath = "runs/precompute/default"
    split: str | None
    by: str
    identities: int | None = 96  # null: all there are
    first: int = 0
    photos: int | None = None  # with by=image, the first so many of these people's; null: all
    batch: int
    dry_run: bool = False  # say which networks it would load, where, and how much memory it takes; load nothing

    def __post_init__(self) -> None:
        self.adapter.require_predictable()
        if self.by not in ("image", "person"):
            raise UserError(f"by={self.by!r}: expected image or person")
        if self.by == "image" and self.fit.views != 1:
            raise UserError(f"fit.views={self.fit.views} needs by=person: an image is fitted alone")
        if self.by == "person" and self.photos is not None:
            raise UserError(f"photos={self.photos} needs by=image; with by=person set identities and fit.views")
        if self.split not in (None, "train", "validation", "test"):
            raise UserError(f"split={self.split!r}: expected train, validation, test or null")
        for name in ("identities", "photos", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected at least 1")
        if self.first < 0:
            raise UserError(f"first={self.first}: expected at least 0")


def reference_rows(people: People, views: int) -> list[list[int]]:
    """Return the first `views` photo rows of each person, repeating where there are fewer; none: an empty list."""
    rows = [photos.tolist() for photos in people.photos]
    return [[r[k % len(r)] for k in range(views)] if r else [] for r in rows]


def passes(config: Config, sketch: Sketch) -> None:
    """Measure what encodes the photos and a batch of fits."""
    from hyperdb.tuning.memory import rows

    with sketch.measure("encoding photos"):
        sketch.encode()
    with sketch.measure("fits"):
        factors = sketch.factors(config.batch, config.adapter.tokens(sketch.layout).rank, trained=True)
        sketch.denoise(config.batch * rows(config.fit), factors)


def run(config: Config) -> Path:
    """Write shards of `batch` fits and the store's index to `out`; finished shards are kept."""
    import torch
    from tqdm import tqdm

    from hyperdb.adapters.layout import Layout
    from hyperdb.data import fits
    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.tuning.fit import fit
    from hyperdb.tuning.prior import load_prior

    base = config.diffusion.load()
    lidb = config.adapter.tokens(Layout.of(base.targets()))
    people = load_people(
        config.data, config.identities, config.split, config.diffusion.size, first=config.first, photos=config.photos
    )
    if config.by == "image":
        rows = torch.nonzero(people.is_style("photo"))  #                            [I, 1]
    else:
        rows = torch.tensor([r for r in reference_rows(people, config.fit.views) if r], dtype=torch.long)  # [I, K]
    if len(rows) == 0:
        raise UserError(f"{config.data} holds no photos of these people")
    origin = {
        **fits.made_from(base, people),
        "by": config.by,
        "fit": asdict(config.fit),
        "prior": asdict(config.prior) if config.fit.prior_weight > 0 else None,
        "lidb": asdict(config.adapter),
    }
    settings = recipe(config)
    del settings["identities"]  # more of them go on where fewer were
    out = claim(config.out, WRITES, {**settings, "made_from": origin})
    prior = load_prior(base, config.prior, out / "prior.safetensors") if config.fit.prior_weight > 0 else None
    keys = people.keys(config.by, rows[:, 0])
    moments = latent_moments(base, people, Path(config.data), rows.flatten()).unflatten(0, rows.shape)
    shards = list(zip(moments.split(config.batch), keys.split(config.batch), strict=True))
    losses: list[float] = []
    with tqdm(total=len(rows), desc="fits", unit=config.by, dynamic_ncols=True) as bar:
        for number, (mine, theirs) in enumerate(shards):
            key = fits.store_key(**origin, keys=theirs.tolist())
            if not fits.shard_is_done(out, number, key):
                losses.clear()
                params = fit(base, lidb, mine, config.fit, None, prior, lambda _, x: losses.append(x))
                fits.save_shard(out, number, params["tokens"].cpu(), theirs, key)
                bar.set_postfix_str(f"loss {sum(losses[-10:]) / len(losses[-10:]):.4f}")
            bar.update(len(theirs))
    fits.finish(out, len(shards), lidb, {**origin, **provenance()})
    print(f"{len(rows)} fits of {lidb.numbers} numbers each, one a{'n' * (config.by == 'image')} {config.by}, in {out}")
    return out
