"""Fit LiDB weights to many photos or people: the hypernetwork's targets in weight space (paper section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.adapters import AdapterConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import NonFiniteError, UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.share import Share
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.prior import PriorConfig
from hyperdb.tuning.start import PARTS, check_start, hypernet_file

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.lidb import LiDB
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.tuning.memory import Sketch
    from hyperdb.tuning.start import Start


WRITES = ("fits-*.safetensors", "start.safetensors", "statistics.safetensors", "index.json", "prior.safetensors")
KEPT = "finished files are kept"
KEYS = 1024  # pictures whose keys are made at once


@dataclass(kw_only=True)
class StoreFitConfig(FitConfig):
    """How an adapter is fitted: a person's on `views` photos, an image's on that image alone.

    `first_view` leaves out so many of a person's photos. Fits on other photos of the same people show how much of a fit
    is the person. `trained` names what of LiDB is a person's own. With `B`, everybody has the A that the fits begin
    with: half the numbers, and a problem that is linear in them. `all` is the paper's.
    """

    views: int
    first_view: int = 0
    trained: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 1 or self.first_view < 0:
            raise UserError(
                f"fit.views={self.views}, fit.first_view={self.first_view}: expected at least 1 photo, and at least 0"
            )
        if self.trained not in PARTS:
            raise UserError(f"fit.trained={self.trained!r}: expected all or B")


@dataclass(kw_only=True)
class Config(Share):
    """Fit every photo of `identities` people from number `first` on, `batch` of them in one pass of the UNet.

    `by`: image fits every photo alone, the theta of image x of eq. 2, and `photos` bounds how many; person fits every
    person once, over `fit.views` photos: more of the person, less of one photo's pose and light. `split`: whose people
    (of an aligned folder; null: all). The hypernetwork is taught an image's fit from that image, a person's fit from
    any photo of that person.

    `start` says where the fits begin. `template` is the paper's: random numbers in A, zeros in B. `average` first fits
    one adapter to everybody's photos, with the settings `average`, and begins there. The folder of a hypernetwork
    begins each fit at its prediction for that person, the mean over the photos of the fit, so that what it has learned
    is refined.

    With `num_shards` each job fits its `shard`: of the store's files, `batch` fits in each, every so many-th. The store
    is the same as that of one job. The job that finds all files there writes the index; the same command without
    `shard` does too, after it has made what is missing.
    """

    diffusion: DiffusionConfig
    adapter: AdapterConfig
    fit: StoreFitConfig
    start: FilePath
    average: FitConfig
    average_people: int = 500  # whose photos the average is fitted to, of `data` from `first` on
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
        super().__post_init__()
        self.adapter.require_predictable()
        if self.by not in ("image", "person"):
            raise UserError(f"by={self.by!r}: expected image or person")
        if self.by == "image" and self.fit.views != 1:
            raise UserError(f"fit.views={self.fit.views} needs by=person: an image is fitted alone")
        if self.fit.first_view and self.by == "image":
            raise UserError(f"fit.first_view={self.fit.first_view} needs by=person")
        check_start(self.start)
        if self.start == "template" and (self.fit.optimizer == "sgd" or self.fit.trained != "all"):
            raise UserError(
                "fit.optimizer=sgd and fit.trained=B need start=average or a hypernetwork: where B is zero, "
                "nothing says how far each layer should move"
            )
        if self.by == "person" and self.photos is not None:
            raise UserError(f"photos={self.photos} needs by=image; with by=person set identities and fit.views")
        if self.split not in (None, "train", "validation", "test"):
            raise UserError(f"split={self.split!r}: expected train, validation, test or null")
        for name in ("identities", "photos", "batch", "average_people"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected at least 1")
        if self.first < 0:
            raise UserError(f"first={self.first}: expected at least 0")


def reference_rows(people: People, views: int, first: int = 0) -> list[list[int]]:
    """Return `views` photo rows of each person from number `first` on, repeating where there are fewer.

    Whoever has no such photo gets an empty list.
    """
    rows = [photos[first:].tolist() for photos in people.photos]
    return [[r[k % len(r)] for k in range(views)] if r else [] for r in rows]


def passes(config: Config, sketch: Sketch) -> None:
    """Count the people; measure what encodes the photos and a batch of fits."""
    from hyperdb.tuning.memory import rows
    from hyperdb.tuning.start import LEVELS, people_a_pass

    rank = config.adapter.tokens(sketch.layout).rank

    sketch.read(config.data, config.identities, config.split, first=config.first, photos=config.photos)
    with sketch.measure("encoding photos"):
        sketch.encode()
    with sketch.measure("fits"):
        sketch.denoise(config.batch * rows(config.fit), sketch.factors(config.batch, rank, trained=True))
    if config.start != "template":
        people = people_a_pass(config.fit, config.batch)
        with sketch.measure("where the fits begin"):
            sketch.denoise(people * LEVELS, sketch.factors(people, rank, trained=True))
            if config.start == "average":
                sketch.denoise(rows(config.average), sketch.factors(1, rank, trained=True))


def _kept(config: Config) -> list[float]:
    """Return how strongly the trainings of this store keep the prior."""
    return [config.fit.prior_weight] + [config.average.prior_weight] * (config.start == "average")


def _begun(config: Config) -> dict[str, Any]:
    """Return what the fits depend on beyond their own settings, by where they begin."""
    from hyperdb.runtime.files import hash_files

    if config.start == "template":
        return {}
    if config.start == "average":
        return {"start": "average", "people": config.average_people, "average": config.average.told()}
    return {"start": hash_files([hypernet_file(config.start)]), "people": config.average_people}


def _photos(config: Config, people: People, first: int) -> Tensor:
    """Return the rows `[I, K]` of the photos of each fit: one image, or some of a person from number `first` on."""
    import torch

    if config.by == "image":
        rows = torch.nonzero(people.is_style("photo"))
    else:
        chosen = reference_rows(people, config.fit.views, first)
        rows = torch.tensor([r for r in chosen if r], dtype=torch.long)
    if len(rows) == 0:
        raise UserError(f"{config.data} holds no photos of these people")
    return rows


def file_keys(people: People, by: str, files: tuple[Tensor, ...], batch: int) -> Callable[[int], Tensor]:
    """Return a function that gives whose fits a file holds, `[B]`, by its number among `files`.

    A file is the rows `[B, K]` of the photos of its fits, `batch` of them, or fewer in the last. The keys of many files
    are made at once, when one of them is asked for: those of images need their pixels.
    """
    import torch

    together = max(1, KEYS // batch)

    @cache
    def some(k: int) -> tuple[Tensor, ...]:
        return people.keys(by, torch.cat(files[k * together : (k + 1) * together])[:, 0]).split(batch)

    return lambda number: some(number // together)[number % together]


def _hypernet(config: Config, lidb: LiDB) -> Hypernet:
    """Load the hypernetwork that `start` names. Raises `UserError` for one of another layout or LiDB."""
    from hyperdb.hypernet.model import Hypernet

    model = Hypernet.load(hypernet_file(config.start))
    model.require(lidb, config.start)
    return model


def _predictions(model: Hypernet, base: Base, people: People, rows: Tensor) -> Tensor:
    """Return a hypernetwork's predictions `[I, N, D]`, each the mean over the photos `rows [I, K]` of a person."""
    import torch
    from tqdm import tqdm

    found, parts = [], rows.split(16)
    with torch.no_grad(), base.autocast():
        for part in tqdm(parts, desc="predictions", unit="batch", dynamic_ncols=True, disable=len(parts) < 4):
            tokens = model(people.images[part.flatten()])
            found.append(tokens.unflatten(0, part.shape).mean(1).float().cpu())
    return torch.cat(found)


def run(config: Config) -> Path:
    """Write files of `batch` fits and the store's index to `out`; finished files are kept."""
    import torch
    from tqdm import tqdm

    from hyperdb.adapters.layout import Layout
    from hyperdb.data import fits
    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.runtime.files import hash_files, load_json, whole
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.tuning.fit import Begin, fit
    from hyperdb.tuning.prior import load_prior
    from hyperdb.tuning.start import load_start, own_starts

    base = config.diffusion.load()
    lidb = config.adapter.tokens(Layout.of(base.targets()))
    people = load_people(
        config.data, config.identities, config.split, config.diffusion.size, first=config.first, photos=config.photos
    )
    rows = _photos(config, people, config.fit.first_view)
    origin = {
        **fits.made_from(base, people, config.fit.instance_prompt),
        "by": config.by,
        "fit": config.fit.told(),
        "prior": asdict(config.prior) if max(_kept(config)) > 0 else None,
        "lidb": asdict(config.adapter),
        **_begun(config),
    }
    settings = recipe(config)
    for name in ("identities", "photos"):  # more of them go on where fewer were
        del settings[name]
    fits.refuse_fewer(config.out, len(rows))
    out = claim(config.out, WRITES, {**settings, "made_from": origin}, -(-len(rows) // config.batch))
    prior = load_prior(base, config.prior, out / "prior.safetensors") if max(_kept(config)) > 0 else None
    start: Start | None = None
    model: Hypernet | None = None
    if config.start != "template":
        model = _hypernet(config, lidb).to(base.device) if config.start != "average" else None

        def crowd() -> tuple[Tensor, Tensor | None]:
            # of so many people, however many are fitted: more fits can be added to a store; of their first photos and
            # one noise, whatever is fitted: fits repeated on others are of one A, and can be compared
            some = load_people(
                config.data, config.average_people, config.split, config.diffusion.size, first=config.first
            )
            shown = _photos(config, some, 0)
            flat = shown.flatten()
            moments = latent_moments(base, some, rows=flat).unflatten(0, shown.shape)
            if config.average.flips:
                turned = latent_moments(base, some, rows=flat, mirrored=True).unflatten(0, shown.shape)
                moments = torch.cat([moments, turned], 1)
            return moments, _predictions(model, base, some, shown) if model is not None else None

        begun, key = out / "start.safetensors", fits.store_key(**origin)
        noise = replace(config.fit, seed=config.average.seed)
        start = load_start(base, lidb, crowd, config.average, noise, prior, begun, key, config.batch)
        origin["start_sha256"] = hash_files([begun])

    def begin(photos: Tensor) -> Begin | None:
        if start is None:
            return None
        predicted = _predictions(model, base, people, photos) if model is not None else None
        tokens = own_starts(start, lidb, predicted, len(photos), config.fit.trained)
        return Begin({"tokens": tokens}, {"tokens": start.gain(lidb, config.fit.trained)})

    files = rows.split(config.batch)
    number, of = config.share()
    mine = files[number::of]
    keys_of = file_keys(people, config.by, mine, config.batch)
    losses: list[float] = []

    def one(photos: Tensor) -> Tensor:
        seen = config.fit.sides(people.images[photos.flatten()].unflatten(0, photos.shape))
        moments = base.moments(seen.flatten(0, 1)).half().unflatten(0, seen.shape[:2])
        params = fit(base, lidb, moments, config.fit, None, prior, lambda _, x: losses.append(x), begin(photos))
        return params["tokens"].cpu()

    def fitted(photos: Tensor) -> tuple[list[int], Tensor]:
        """Return which of some fits succeeded, and these; if one of them diverges, the others are made one by one."""
        try:
            return list(range(len(photos))), one(photos)
        except NonFiniteError as error:
            bad, alone = error, {}
        for k in range(len(photos)):
            try:
                if len(photos) == 1:
                    raise bad
                alone[k] = one(photos[k : k + 1])
            except NonFiniteError as error:
                print(f"no fit of {people.images.name(int(photos[k, 0]))}, which is left out: {error}")
        return list(alone), torch.cat([lidb.template[None].cpu()[:0], *alone.values()])

    with tqdm(total=sum(map(len, mine)), desc="fits", unit=config.by, dynamic_ncols=True) as bar:
        for k, photos in enumerate(mine):
            i, keys = number + k * of, keys_of(k)
            if not (whole(fits.shard_path(out, i)) and fits.shard_is_done(out, i, origin, len(photos), keys)):
                losses.clear()
                good, tokens = fitted(photos)
                fits.save_shard(out, i, tokens, keys[good], fits.store_key(**origin, keys=keys.tolist()))
                if losses:
                    bar.set_postfix_str(f"loss {sum(losses[-10:]) / len(losses[-10:]):.4f}")
            bar.update(len(photos))
    there = all(fits.shard_path(out, i).is_file() for i in range(len(files)))
    if not (there and all(fits.shard_is_done(out, i, origin, len(photos)) for i, photos in enumerate(files))):
        print(f"shard {number} of {of} is done, others are not: {out} is no store yet")
        return out
    if not len(fits.Fits([fits.shard_path(out, i) for i in range(len(files))])):
        raise UserError(f"no fit in {out} has succeeded: lower fit.rate, in another name")
    fits.finish(out, len(files), lidb, {**origin, **provenance()})
    count = load_json(out / "index.json")["fits"]
    print(f"{count} fits of {lidb.numbers} numbers each, one a{'n' * (config.by == 'image')} {config.by}, in {out}")
    return out
