"""What many people's adapters have in common: principal components, attributes, new people, ways from one to another.

Everybody's LiDB numbers lie in the same frozen bases, so that they can be added, averaged and sampled like vectors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import DiffusionConfig
from hyperdb.formats.directions import ATTRIBUTES, save_directions
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.lidb import LiDB
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.runtime.lazy import Lazy
    from hyperdb.tuning.space import Space

SMILES = ("smiling", "laughing")

READER = 100.0  # penalty of the reader of attributes
WAYS = 7  # adapters on the way from one person to another
KNOWN = 8  # people that each new one is compared with


WRITES = (
    *("results.json", "directions.safetensors", "attributes.png", "sampled.png", "between.png"),
    "sampled/*/lidb.safetensors",
)


@dataclass(kw_only=True)
class Config:
    """Whose adapters are studied, and what is made of them.

    The hypernetwork predicts an adapter for each of `people` in the folder `data`. The principal components of these
    adapters are the space of people. With `weights`, a store of `hyperdb precompute`, the space is made of the fits in
    it instead.

    Three things are then measured in the space. Attributes such as age are shifted in the adapters of `edited` people
    of the folder `unseen`, by each of `shifts`; a shift of 1 is one standard deviation of the attribute over people.
    `sampled` new people are drawn from a Gaussian. And pictures are drawn on the way from one person to another.
    """

    diffusion: DiffusionConfig
    hypernet: FilePath = "default"  # folder of a trained one; `default`: the base's own
    default_hypernet: FilePath | None  # folder that `hypernet=default` means; null: the base has no hypernetwork
    data: FilePath = "data/heads"
    unseen: FilePath = "data/heads_validation"
    weights: FilePath | None = None
    people: int = 1000
    components: int = 100  # principal components that are kept
    edited: int = 12
    shifts: list[float] = field(default_factory=lambda: [-4.0, -2.0, 0.0, 2.0, 4.0])
    sampled: int = 24
    images: int = 4  # pictures drawn with each adapter
    name: str = "default"
    out: FilePath = "runs/weights/default"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.people < 8 or not 1 <= self.components < self.people:
            raise UserError(f"people={self.people}, components={self.components}: expected at least 8, and fewer")
        if min(self.sampled, self.edited, self.images) < 2 or 0.0 not in self.shifts:
            raise UserError("expected sampled, edited and images of at least 2, and 0 among shifts")


def attributes(people: People) -> Tensor:
    """Return what is known of every picture, `[n, len(ATTRIBUTES)]`; of the bald, the hair they would have."""
    import torch

    from hyperdb.heads import Identity

    if "sex" not in people.labels:
        raise UserError("attributes are known of rendered people; set data and unseen to some (`hyperdb render_heads`)")
    persons = {seed: Identity(seed) for seed in people.seed.unique().tolist()}
    known = [persons[seed] for seed in people.seed.tolist()]
    expressions = people.names["expression"]
    smile = torch.isin(people.labels["expression"], torch.tensor([expressions.index(word) for word in SMILES]))
    rows = [[float(p.sex == "man"), float(p.age), float(p.melanin), float(p.hair.colour.mean())] for p in known]
    return torch.cat([torch.tensor(rows), smile[:, None].float()], 1)


def _looks(model: Hypernet, images: Tensor | Lazy) -> Tensor:
    """Return pictures `[n, 3, H, W]` uint8 as what their attributes are read from, `[n, F]`.

    The encoder's mean feature, which knows who it is, and the pixels, which show the smile that it leaves out.
    """
    import torch
    from torch.nn import functional as F

    found = []
    for part in images.split(256):
        with torch.no_grad():
            features = model.features(part)[0][:, 0].float().cpu()
        found.append(torch.cat([features, F.adaptive_avg_pool2d(part.float() / 127.5 - 1, 32).flatten(1)], 1))
    return torch.cat(found)


class _Studio:
    """Draws and recognises adapters given as numbers `[I, C]`."""

    def __init__(self, base: Base, lidb: LiDB, images: int, bar: Any) -> None:
        from hyperdb.metrics.face import SFace

        self.base, self.lidb, self.images, self.bar, self.feature = base, lidb, images, bar, SFace()

    def draw(self, numbers: Tensor, label: str) -> Tensor:
        """Return `[I, images, 3, H, W]`, the same seeds for everyone."""
        from hyperdb.tuning.draw import draw

        self.bar.set_description(label)
        factors = self.lidb.factors({"tokens": self.lidb.unpack(numbers).to(self.base.device)})
        prompts = [self.base.config.instance_prompt] * self.images
        return draw(self.base, factors, len(numbers), prompts, list(range(self.images)), progress=self.bar.update)

    def faces(self, drawn: Tensor) -> Tensor:
        """Return embeddings `[I, K, C]`, NaN without a face."""
        return self.feature(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])

    def sheet(self, path: Path, images: Tensor, columns: int, rows: list[str], heads: list[str] | None = None) -> None:
        """Write pictures `[n, 3, H, W]` with names left of the rows and above the columns."""
        from hyperdb.faces.image import grid, save_png

        labels = heads * len(rows) if heads is not None else None
        pixels = [x.permute(1, 2, 0).numpy() for x in images]
        text = {"software": "hyperdb", "synthetic": "all", "base": self.base.digest}
        save_png(path, grid(pixels, columns, rows=rows, labels=labels), text)


def run(config: Config) -> Path:
    """Write results, three pictures, the directions for `hyperdb edit` and the new people's adapters to `out`."""
    import torch
    from tqdm import tqdm

    from hyperdb.adapters.layout import Layout
    from hyperdb.data.fits import load_store, made_from
    from hyperdb.data.people import load_people
    from hyperdb.diffusion.targets import base_hash
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.tuning.personalizer import hypernet_folder, load_hypernet
    from hyperdb.tuning.space import Space, ridge

    # --- adapters of many people, and of unseen ones
    folder = hypernet_folder(config.hypernet, config.default_hypernet, config.diffusion.path)
    assert folder is not None  # only null means none
    base = config.diffusion.load()
    model = load_hypernet(folder, base, Layout.of(base.targets()))
    people = load_people(config.data, config.people, size=config.diffusion.size)
    unseen = load_people(config.unseen, config.edited, "validation", config.diffusion.size)

    fits = None
    if config.weights is not None:
        fits = load_store(config.weights, model.lidb.layout, **made_from(base, people))
    contents = {"base": base.digest, "hypernet": hash_files([folder / "hypernet.safetensors"])}
    contents |= {"data": people.digest, "unseen": unseen.digest, "weights": fits.digest if fits is not None else ""}
    out = claim(config.out, WRITES, {**recipe(config), **contents})

    @torch.no_grad()
    def predict(people: People) -> Tensor:
        images = people.images.part(torch.stack([r[0] for r in people.photos]))
        numbers = []
        for part in tqdm(images.split(64), desc="predicting", dynamic_ncols=True, disable=len(images) < 512):
            with base.autocast():
                numbers.append(model.lidb.pack(model(part)).float().cpu())
        return torch.cat(numbers)

    own = predict(unseen)
    first = torch.stack([r[0] for r in people.photos])  # the photo that each adapter is of
    if fits is None:
        numbers = predict(people)
    else:
        if asdict(fits.lidb.config) != asdict(model.lidb.config):
            raise UserError(f"{config.weights} has lidb {asdict(fits.lidb.config)}, the hypernetwork has other")
        rows = fits.rows_of(people.keys(fits.by, first))
        if (rows >= 0).sum() < 8:
            raise UserError(f"{config.weights} holds fits of {int((rows >= 0).sum())} of the people in {config.data}")
        numbers, first = model.lidb.pack(fits.tokens[rows[rows >= 0]]), first[rows >= 0]
    space = Space(numbers, config.components)
    adapters = len(own) * (2 + len(ATTRIBUTES) * len(config.shifts)) + WAYS * (len(own) // 2)
    adapters += config.sampled + min(KNOWN * config.sampled, len(numbers))
    bar = tqdm(total=adapters, unit="adapter", dynamic_ncols=True)
    studio = _Studio(base, model.lidb, config.images, bar)

    # --- a direction of each attribute in the space, and a reader of pictures that never saw an adapter
    known = attributes(people)
    scale = known.std(0).clamp_min(1e-6)
    directions = space.directions(numbers, known[first] / scale)  #                 [T, C]
    made_in = (model.lidb.fingerprint, base_hash(base.targets()))
    save_directions(out / "directions.safetensors", directions, *made_in)
    shown, judged = torch.cat(people.photos), torch.cat(unseen.photos)
    reader = ridge(_looks(model, people.images.part(shown)), known[shown] / scale, penalty=READER)

    def read(images: Tensor) -> Tensor:
        return _looks(model, images) @ reader[0] + reader[1]

    pairs = zip(read(unseen.images[judged]).mT, attributes(unseen)[judged].mT, strict=True)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    moved = _edit(config, studio, directions, own, read, out)
    for word, value in zip(ATTRIBUTES, correlation, strict=True):
        moved[word]["reader_correlation"] = _number(value)

    left = (own - space.decode(space.encode(own))).square().sum() / (own - space.mean).square().sum()
    kept = [k for k in (1, 5, 10, 20, 50, 100) if k <= len(space.std)]
    result = {
        "people": len(numbers),
        "components": len(space.std),
        "explained": {str(k): round(float(space.explained[k - 1]), 4) for k in kept},
        "explained_of_unseen": round(1 - float(left), 4),
        "attributes": moved,
        "sampled": _sample(config, studio, space, numbers, own, out),
        "between": _between(studio, own, out),
        "base": base.digest,
        "data": people.digest,
        **provenance(),
    }
    bar.close()
    save_json(out / "results.json", result)
    for word, found in moved.items():
        said = ", ".join(f"{point['attribute']:+.2f} at {point['shift']:+g}" for point in found["curve"])
        print(f"{word}, in standard deviations: {said}")
    print(f"pictures, results.json, directions.safetensors and {config.sampled} new people's adapters in {out}")
    return out


def _edit(
    config: Config, studio: _Studio, directions: Tensor, own: Tensor, read: Any, out: Path
) -> dict[str, Any]:
    """Shift every attribute of everyone: what pictures then show of it and of the others, and who is still seen."""
    import torch

    moved: dict[str, Any] = {}
    strips = []
    plain = studio.draw(own, "as they are")
    before, shown = studio.faces(plain), read(plain.flatten(0, 1))
    for t, word in enumerate(ATTRIBUTES):
        curve = []
        for shift in config.shifts:
            drawn = studio.draw(own + shift * directions[t], f"{word} {shift:+g}")
            found, change = studio.faces(drawn), (read(drawn.flatten(0, 1)) - shown).view(len(own), -1, len(ATTRIBUTES))
            others = [k for k in range(len(ATTRIBUTES)) if k != t]
            curve.append({
                "shift": shift,
                "attribute": _number(change[..., t].mean()),
                "others": round(float(change.mean((0, 1))[others].abs().mean()), 4),
                "face_cosine_to_unedited": _number((found * before).sum(-1).nanmean()),
                "face_found": round(float(found.isfinite().all(-1).float().mean()), 4),
            })  # fmt: skip
            strips.append(drawn[:2, 0])
        moved[word] = {"curve": curve}
    images = torch.stack(strips).unflatten(0, (len(ATTRIBUTES), -1)).transpose(1, 2)  # [T, 2, S, 3, H, W]
    rows = [f"{word}, person {i + 1}" for word in ATTRIBUTES for i in range(2)]
    heads = [f"{shift:+g}" for shift in config.shifts]
    studio.sheet(out / "attributes.png", images.flatten(0, 2), len(heads), rows, heads)
    return moved


def _sample(
    config: Config, studio: _Studio, space: Space, numbers: Tensor, own: Tensor, out: Path
) -> dict[str, dict[str, float]]:
    """Draw people from a Gaussian in the space: are they as varied and as new as unseen people are?"""
    import torch

    from hyperdb.diffusion.targets import base_hash
    from hyperdb.formats.native import Personalization
    from hyperdb.runtime.seed import generator

    new = space.sample(config.sampled, generator(config.seed, "weights"))
    drawn = studio.draw(new, "new people")
    known = studio.faces(studio.draw(numbers[: KNOWN * config.sampled], "known people"))
    gallery = torch.nn.functional.normalize(known.nanmean(1), dim=-1)
    words, lidb = studio.base.config, studio.lidb
    for i, tokens in enumerate(lidb.unpack(new)):
        person = Personalization(
            lidb.layout, tokens, lidb.config, base_hash(studio.base.targets()), words.rare_token, words.class_word, {}
        )
        person.save_lidb(out / "sampled" / f"{i:03d}" / "lidb.safetensors")
    few = drawn[:12]
    studio.sheet(out / "sampled.png", few.flatten(0, 1), config.images, [f"new {i:03d}" for i in range(len(few))])
    return {
        "new": _variety(studio.faces(drawn), gallery),
        "predicted_for_unseen": _variety(studio.faces(studio.draw(own, "unseen people")), gallery),
    }


def _between(studio: _Studio, own: Tensor, out: Path) -> list[dict[str, float]]:
    """Go from one person to another: how like both ends the pictures on the way are."""
    import torch

    pairs = len(own) // 2
    first, last = own[:pairs], own[pairs : 2 * pairs]
    ways = [k / (WAYS - 1) for k in range(WAYS)]
    steps = [studio.draw(first + x * (last - first), f"between {x:.2f}") for x in ways]
    drawn = torch.stack(steps, 1)  #                                                [P, W, K, 3, H, W]
    found = torch.stack([studio.faces(images) for images in drawn.unbind(1)], 1)
    to_ends = [(found * found[:, end, None]).sum(-1).nanmean((0, 2)) for end in (0, -1)]
    few = drawn[:4, :, 0]
    rows = [f"pair {i + 1}" for i in range(len(few))]
    studio.sheet(out / "between.png", few.flatten(0, 1), len(ways), rows, [f"{x:.2f}" for x in ways])
    return [
        {"way": round(x, 3), "to_first": round(float(to_ends[0][i]), 4), "to_last": round(float(to_ends[1][i]), 4)}
        for i, x in enumerate(ways)
    ]


def _number(value: Tensor) -> float | None:
    """Return a figure, none where there is nothing to measure: nobody differs, or no face is found."""
    return round(float(value), 4) if bool(value.isfinite()) else None


def _variety(found: Tensor, gallery: Tensor) -> dict[str, float]:
    """Return how like people `[I, K, C]` are to themselves, to each other, and to the nearest of a gallery `[G, C]`."""
    import torch

    mean = torch.nn.functional.normalize(found.nanmean(1), dim=-1)
    same = (found @ found.mT).masked_fill(torch.eye(found.shape[1], dtype=torch.bool), float("nan"))
    between = (mean @ mean.mT)[torch.ones(len(mean), len(mean)).triu(1) > 0]
    return {
        "with_themselves": round(float(same.nanmean()), 4),
        "with_each_other": round(float(between.nanmean()), 4),
        "with_the_nearest_known": round(float((mean @ gallery.mT).amax(1).nanmean()), 4),
        "face_found": round(float(found.isfinite().all(-1).float().mean()), 4),
    }
