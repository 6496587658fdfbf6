"""Measure on unseen people: likeness, the person in a style, obedience, copying; one row a way to personalise."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import check_subject
from hyperdb.metrics import ENCODERS, RECOGNISERS, JudgesConfig, judge
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.runtime.share import Share
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.methods import MethodConfig
from hyperdb.tuning.personalizer import PersonalizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.metrics.figures import Standard
    from hyperdb.tuning.memory import Sketch
    from hyperdb.tuning.personalizer import Personalizer

PHOTOS = {  # rows of photos through the autoencoder, which no method makes and no seed changes; what people read
    "copy": "the given photo through the autoencoder",
    "ceiling": "the person's renders through the autoencoder",
}
UNASKED = {  # they obey no prompt, but that the ceiling's renders have styles and a photo is a plain picture
    "copy": ("style_accuracy", "place_accuracy", "clip_t", "clip_t_changed", "clip_t_styled", "clip_r"),
    "ceiling": ("place_accuracy", "clip_t", "clip_t_changed", "clip_r"),
}
# figures compared in pairs, beside the cosine
FURTHER = (
    *("cosine_dlib", "rank1", "rank1_dlib", "cosine_changed", "cosine_changed_dlib", "rank1_changed", "rank1_styled"),
    *("cosine_facenet", "cosine_changed_facenet"),
    *("cosine_verifier", "rank1_verifier", "rank1_styled_verifier"),
    *("cosine_changed_verifier", "rank1_changed_verifier"),
    *("style_accuracy", "place_accuracy", "copy_pose", "copy_background", "diversity"),
    *("dino", "dino_changed", "vicreg", "vicreg_changed", "clip_i", "clip_i_changed", "clip_t", "clip_t_changed"),
)
MADE = {  # the weights of recognisers that bring none
    "facenet": "docs/stable_diffusion.md says how it is made",
    "verifier": "package:embedded/judges/verifier knows renders, `hyperdb train_judge judge=verifier` trains one",
}
COSTS = ("seconds", "trained", "bytes")  # of a person's adapter, kept with a row's pictures
FACES = "faces-*.safetensors"  # what a recogniser made of each picture, of any run
WRITES = ("rows/*.safetensors", "prior.safetensors", FACES)
KEPT = "the pictures of finished rows are kept"


@dataclass(kw_only=True)
class Config(PersonalizerConfig, Share):
    """`data`: rendered people, or photos. A person's `photos`, from number `reference` on, are learned from. `given`
    are kept from the judges; null is as many, and more are for rows that learn from more (`methods.NAME.photos`).
    `views` others judge: of rendered people those in other poses and places than the given ones, without an accessory
    of theirs (`People.unlike`), else the next. The iterations of a fine-tuning are those told, however many photos.

    `split`: whose people these must be; settings are chosen on those of validation.

    `rows` names `methods`, each a yaml of conf/methods, which draw `images` pictures of "a [V] face" a person and one
    of each of `styled` (a style, or style/place), at the same seeds. With `changed`, each a prompt of any kind, they
    draw one of each too, and its likeness is judged as that of the plain ones: whoever has learned the photo and not
    the person falls behind there. Fine-tuning and drawing are repeated with `seeds` seeds, each of which trains
    everybody anew on other noise and draws other pictures, and the intervals are over people and seeds. A slow method
    may be run on the first `methods.NAME.people` alone, who are told from all: rows are compared on the people whom
    both have. Two further rows are photos through the autoencoder: `ceiling` shows those after the ones that judge
    (round to the first), `copy` the given one, the likeness that copying gives.

    `recognisers` judge the likeness; the first one's figures have no suffix. `judges` give the figures of whole
    pictures, DINO, VICReg, CLIP-I and CLIP-T; `hyperdb.metrics.figures.Standard` says which pictures count. There the
    recognisers `facenet` and `verifier` have their weights from too.

    With `num_shards` each job draws its `shard` of the people, in whole batches of `batch`, and measures nothing. The
    same command without both puts the pictures together, draws what is missing and measures.
    """

    image: FilePath = "none"
    out: FilePath = "runs/evaluate/default"
    data: FilePath
    split: str = "test"
    people: int = 25
    images: int = 8  # at the same seeds for everyone; of few, the base's own are by luck like the people
    reference: int = 0
    photos: int = 1
    given: int | None = None  # photos that no judge sees; null: `photos`
    views: int = 4
    styled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # such as 'a photo of a [V] face, on the beach'
    recognisers: list[str] = field(default_factory=lambda: ["sface"])
    judges: JudgesConfig
    rows: list[str]
    methods: dict[str, MethodConfig]
    seeds: int = 1
    results: FilePath = "results.json"
    batch: int = 5  # people fine-tuned in one pass

    def __post_init__(self) -> None:
        super().__post_init__()
        Share.__post_init__(self)
        if self.start is not None:
            raise UserError("start belongs to personalize; the rows of an evaluation say where each begins")
        if self.split not in ("test", "validation"):
            raise UserError(f"split={self.split!r}: expected test or validation")
        if not self.adapter.predictable:
            raise UserError("adapter belongs to personalize; the rows of an evaluation say what each trains")
        if self.images < 1:
            raise UserError(f"images={self.images}: expected at least 1, a plain picture of the person")
        known = [*self.methods, *PHOTOS]
        if odd := [name for name in self.methods if not name.isidentifier() or name in PHOTOS]:
            raise UserError(f"methods.{odd[0]}: a method is called by letters, digits and _, not {' or '.join(PHOTOS)}")
        if not self.rows:
            raise UserError(f"rows=[]: expected of {', '.join(known)}")
        for row in self.rows:
            if row not in known:
                raise UserError(f"rows={row!r}: expected of {', '.join(known)}")
            self.fit(row)
            if unknown := [name for name in self.against(row) if name not in known]:
                raise UserError(f"methods.{row}.against={unknown[0]!r}: expected of {', '.join(known)}")
        if self.hypernet == "default" and self.default_hypernet is None and not self.begun():
            self.hypernet = None  # none is known for the base, and none is needed
        if self.reference < 0 or self.photos < 1 or self.views < 1:
            raise UserError(
                f"reference={self.reference}, photos={self.photos}, views={self.views}: expected at least 0, 1, 1"
            )
        most = max([self.photos, *(self.methods[row].photos or 1 for row in self.rows if row in self.methods)])
        if self.kept_apart() < most:
            raise UserError(f"given={self.kept_apart()}: {most} photos are learned from; expected at least as many")
        check_subject("changed", self.changed)
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds}: expected at least 1")
        if not self.recognisers:
            raise UserError("recognisers=[]: name at least one")
        for name in self.recognisers:
            if name not in RECOGNISERS:
                raise UserError(f"recognisers={name!r}: expected {' or '.join(RECOGNISERS)}")
            if name in MADE and getattr(self.judges, name) is None:
                raise UserError(f"recognisers={name!r} needs judges.{name}=FOLDER; {MADE[name]}")

    def begun(self) -> list[str]:
        """Return the rows that begin at a prediction."""
        return [row for row in self.rows if row in self.methods and self.methods[row].start is not None]

    def kept_apart(self) -> int:
        """Return how many photos of a person no judge sees."""
        return self.photos if self.given is None else self.given

    def needed(self) -> int:
        """Return how many photos a person must have: those kept apart, those that judge, one for the ceiling."""
        return max(self.kept_apart() + self.views, self.reference) + 1

    def fit(self, row: str) -> FitConfig | None:
        """Return the fine-tuning of a row; None where nothing is trained. Raises `UserError`."""
        try:
            return self.methods[row].fit(self.finetune) if row in self.methods else None
        except UserError as error:
            raise UserError(f"methods.{row}: {error}") from error

    def against(self, row: str) -> list[str]:
        """Return the rows that a row is compared with."""
        return self.methods[row].against if row in self.methods else []


def passes(config: Config, sketch: Sketch) -> None:
    """Measure the prediction of a batch of people, each training that a row asks for, and the drawing of a row."""
    from hyperdb.tuning.draw import together
    from hyperdb.tuning.memory import rows

    sketch.read(config.data, config.people, config.split, least=config.needed())
    sketch.begin(config, config.batch)
    rank = config.adapter.rank  # type: ignore[attr-defined]
    known = []
    for row in config.rows:
        if (fit := config.fit(row)) is None:
            continue
        method = config.methods[row]
        trained = method.adapter or {"relaxed": rank + config.relaxed.rank, "lidb": rank}[str(method.train)]
        if (training := (trained, rows(fit))) not in known:  # rows that differ in their beginnings need the same
            known.append(training)
            sketch.train(f"row {row}", trained, config.batch, rows(fit))
    with sketch.measure("drawing"):
        sketch.draw(together(config.diffusion.size))


def styled_views(people: People, rows: list[Tensor], words: list[str]) -> dict[str, Tensor]:
    """Return each person's renders in each style, `[I, K, 3, H, W]`, K >= 2. Raises `UserError` if there are none."""
    import torch

    found = {}
    for style in dict.fromkeys(words):
        if style not in people.names.get("style", []):
            raise UserError(f"styled={style!r}: the people have no renders of that style")
        mask = people.is_style(style)
        mine = [people.rows[int(people.identity[r[0]])] for r in rows]
        each = [r[mask[r]] for r in mine]
        count = min(map(len, each))
        if count < 2:
            raise UserError(f"styled={style!r}: every person needs two renders of it; render more views")
        found[style] = people.images[torch.stack([r[:count] for r in each])]
    return found


@dataclass
class Panel:
    """Whom an evaluation shows, and by what pictures of them a row is judged.

    Of I people: the photos that could be learned from, `shown [I, V, 3, H, W]`, those that judge, `views [I, K, 3, H,
    W]`, and two or more renders in each style, `styled`.
    """

    config: Config
    people: People
    rows: list[Tensor]  # of each person's pictures: first those shown, then those that judge
    shown: Tensor
    views: Tensor
    styled: dict[str, Tensor]

    @classmethod
    def gather(cls, config: Config) -> Panel:
        """Read the people that `config` names. Raises `UserError` for people without what it asks of them."""
        import torch

        from hyperdb.data.people import load_people
        from hyperdb.heads import PLACE_PHRASES

        given, needed = config.kept_apart(), config.needed()
        used = given + config.views
        people = load_people(config.data, config.people, config.split, config.diffusion.size, least=needed)
        rows = people.given_first(config.data, given, needed, config.reference)
        shown = people.images[torch.stack([r[:given] for r in rows])]
        views = people.images[torch.stack([r[given:used] for r in rows])]
        if odd := [w for w in config.styled if "/" in w and w.partition("/")[2] not in PLACE_PHRASES]:
            raise UserError(f"styled={odd[0]!r}: the place is one of {', '.join(PLACE_PHRASES)}")
        styles = [word.partition("/")[0] for word in config.styled]
        return cls(config, people, rows, shown, views, styled_views(people, rows, styles))

    @property
    def persons(self) -> list[int]:
        """Return the number of each person."""
        import torch

        found: list[int] = self.people.seed[torch.stack([r[0] for r in self.rows])].tolist()
        return found

    @property
    def styles(self) -> list[str]:
        """Return the style of each of `styled`."""
        return [word.partition("/")[0] for word in self.config.styled]

    @property
    def unseen(self) -> list[Tensor]:
        """Return the rows of each person's pictures that are neither shown nor judge."""
        return [r[self.config.kept_apart() + self.config.views :] for r in self.rows]

    @property
    def places(self) -> list[str | None]:
        """Return the place that each of `changed` names; None for none, and of photos, whose places no judge knows."""
        from hyperdb.heads import PLACE_PHRASES

        phrases = PLACE_PHRASES if "place" in self.people.labels else {}
        return [next((p for p, phrase in phrases.items() if phrase in text), None) for text in self.config.changed]

    def described(self, model: Personalizer, row: str) -> dict[str, Any]:
        """Return all of a row's method that decides its pictures: its start, adapter and training, and whom."""
        return _described(self.config, model, row, len(self.rows), _network_digest(model.hypernet))

    def prompts(self, instance_prompt: str) -> list[str]:
        """Return what is drawn of each person: plain pictures, those under changed prompts, those in styles."""
        from hyperdb.heads import prompt

        pairs = [word.partition("/")[::2] for word in self.config.styled]
        plain = [instance_prompt] * self.config.images
        return [*plain, *self.config.changed, *(prompt(style, "[V]", place or None) for style, place in pairs)]

    def best(self, some: slice) -> Iterator[tuple[Tensor, list[int]]]:
        """Go through some people: own pictures `[M, 3, H, W]`, and which of them stands in each prompt's place."""
        import torch

        count = self.config.images + len(self.config.changed)
        for person, rows in zip(range(len(self.rows))[some], self.unseen[some], strict=True):
            used = min(len(rows), count)
            photos = self.people.images[torch.as_tensor(rows[:used])]
            styled = [self.styled[style][person, :1] for style in self.styles]
            yield torch.cat([photos, *styled]), [*(k % used for k in range(count)), *range(used, used + len(styled))]

    def standard(self, base: Base, out: Path, photos: dict[str, int]) -> tuple[Standard, dict[str, str]]:
        """Return what judges the pictures, and the digest of each of its networks.

        What a recogniser makes of a picture is kept in `out`. `photos` says how many a row has learned from. Raises
        `UserError` for a judge that is missing.
        """
        from hyperdb.metrics.feature import Remembered
        from hyperdb.metrics.figures import Standard
        from hyperdb.metrics.obedience import Judge

        config, styles, places = self.config, self.styles, self.places

        def asked(name: str) -> Any:
            path = getattr(config.judges, name, None)
            return judge(name) if path is None else judge(name, path, base.device)

        recognisers, encoders = ([asked(name) for name in some] for some in (config.recognisers, config.judges.asked()))
        standard = Standard(
            [Remembered(one, out / FACES.replace("*", one.name)) for one in recognisers],
            Judge.load(resolve("package:embedded/judge.safetensors")) if styles or any(places) else None,
            self.shown, self.views, styles, {style: renders[:, 1:] for style, renders in self.styled.items()}, places,
            encoders, [base.config.plain_prompt(text) for text in self.prompts(base.config.instance_prompt)], photos,
        )  # fmt: skip
        return standard, {one.name: one.digest for one in [*recognisers, *encoders] if hasattr(one, "digest")}


def _digest(text: bytes) -> str:
    """Return 16 hex digits."""
    return hashlib.sha256(text).hexdigest()[:16]


def _network_digest(network: Hypernet | None) -> str | None:
    """Return 16 hex digits over the weights of a hypernetwork or of E4T's encoder, None without one."""
    if network is None:
        return None
    from hyperdb.runtime.files import hash_tensors

    return hash_tensors(network.used().values())


def _made_from(config: Config, model: Personalizer, people: People) -> dict[str, Any]:
    """Return all that decides every row; `_described` has what decides one of them."""
    from hyperdb.runtime.recipe import recipe

    own = ("rows", "methods", "adapter", "relaxed", "finetune", "seeds", "recognisers", "judges", "hypernet", "batch")
    what = {key: value for key, value in recipe(config).items() if key not in own}
    return {**what, "base": model.base.digest, "data": people.digest}


def _described(config: Config, model: Personalizer, row: str, people: int, hypernet: str | None) -> dict[str, Any]:
    """Return all of a row's method that decides its pictures of `people`: its start, adapter and training, and whom.

    The hypernetwork, of the digest `hypernet`, decides those that begin at a prediction alone: with another one, the
    others stay.
    """
    from hyperdb.adapters import kind_of
    from hyperdb.runtime.recipe import recipe

    if row in PHOTOS:
        return {"start": None, "adapter": None, "finetune": None}
    method, fit = config.methods[row], config.fit(row)
    settings = {"relaxed": model.learned, "lidb": model.lidb.config, None: method.adapter}[method.train]
    adapter = None if settings is None else {"kind": kind_of(settings), **recipe(settings)}
    found = {"start": method.start, "adapter": adapter, "finetune": None if fit is None else fit.told()}
    count = method.among(people)
    seldom: dict[str, Any] = {"refinements": method.refinements, "people": None if count == people else count}
    seldom["strength"] = None if method.strength == 1 else method.strength
    seldom |= {"photos": method.photos, "hybrid": None if method.hybrid else False}
    if method.start is not None:
        seldom["hypernet"] = hypernet
    if method.adapter is not None and method.adapter.begins() is not None:
        seldom["encoder"] = _network_digest(model.encoder(method.adapter))
    return {**found, **{key: value for key, value in seldom.items() if value is not None}}


def _settings(config: Config, hypernet: dict[str, str]) -> dict[str, Any]:
    """Return what decides the pictures beside the rows' methods; of the hypernetwork's training what its file says."""
    from hyperdb.runtime.recipe import plain, recipe

    elsewhere = ("rows", "methods", "recognisers", "judges")
    found = {key: value for key, value in recipe(config).items() if key not in elsewhere}
    return plain(found) | {"hypernet": json.loads(hypernet.get("settings", "{}"))}


def _read(config: Config, row: str, described: dict[str, Any]) -> dict[str, Any]:
    """Return what tables say of a row: its label, where it begins, the kind of adapter and for how many iterations."""
    steps = described["finetune"]["steps"] if described["finetune"] else 0
    label = PHOTOS[row] if row in PHOTOS else config.methods[row].text(steps)
    kind = described["adapter"]["kind"] if described["adapter"] else None
    return {"label": label, "start": described["start"], "adapter": kind, "steps": steps}


def shares(people: int, batch: int, of: int) -> list[slice]:
    """Divide people `of` times, such that those who are trained in one pass stay together; some parts may be empty."""
    batches = -(-people // batch)
    ends = [min(people, k * batches // of * batch) for k in range(of + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@dataclass
class Pictures:
    """The pictures of each row and seed, a file each in `folder`; until all shares are there, a file each share.

    A row has `people`, of whom `batch` are trained in one pass, and `made_from` says all that decides its pictures.
    `draw` makes those of some people, with what one person's adapter costs. `kept` is told of how many people of a row
    they were there. A file's header says whom its pictures `[J, K, 3, H, W]` show, by the numbers of `persons`, and
    under which `prompts`.
    """

    folder: Path
    batch: int
    people: dict[str, int]
    made_from: dict[str, str]
    persons: list[int]
    prompts: list[str]
    draw: Callable[[str, int, slice], tuple[Tensor, dict[str, float]]]
    kept: Callable[[str, int], object]

    def _path(self, row: str, seed: int) -> Path:
        return self.folder / (f"{row}-{seed}.safetensors" if seed else f"{row}.safetensors")

    def _parts(self, row: str, seed: int) -> dict[Path, int]:
        """Return the files of shares, and how many shares there are by their names."""
        named = re.compile(rf"{row}-{seed}-\d+of(\d+)\.safetensors")
        return {path: int(found[1]) for path in self.folder.glob("*") if (found := named.fullmatch(path.name))}

    def _there(self, path: Path, row: str, some: slice) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return what a file holds, None if it is not there, of another recipe or of others than `some` people."""
        from hyperdb.runtime.files import load_made

        made = load_made(path)
        wanted = {"made_from": self.made_from[row], "persons": json.dumps(self.persons[some])}
        return made if made is not None and wanted.items() <= made[1].items() else None

    def _save(self, path: Path, row: str, some: slice, images: Tensor, cost: dict[str, float]) -> None:
        from hyperdb.runtime.files import save_tensors

        told = {name: str(value) for name, value in cost.items()}
        told |= {"persons": json.dumps(self.persons[some]), "prompts": json.dumps(self.prompts)}
        save_tensors(path, {"images": images}, {"made_from": self.made_from[row], **told})

    def _saved(self, path: Path, row: str, some: slice, images: Tensor, cost: dict[str, float]) -> Tensor:
        """Write pictures and return them as they lie on the disk: all rows of a table can be more than the memory."""
        self._save(path, row, some, images, cost)
        there = self._there(path, row, some)
        return there[0]["images"] if there is not None else images

    def _load(self, path: Path, row: str, seed: int, some: slice) -> tuple[Tensor, dict[str, float]]:
        """Return what a file holds of some people, which is drawn if it is not there."""
        if (there := self._there(path, row, some)) is not None:
            tensors, metadata = there
            self.kept(row, len(tensors["images"]))
            return tensors["images"], {name: float(metadata[name]) for name in COSTS if name in metadata}
        images, cost = self.draw(row, seed, some)
        return self._saved(path, row, some, images, cost), cost

    def make(self, row: str, seed: int, some: slice, number: int, of: int) -> None:
        """Draw the share `number` of a row, unless it is there or the whole row is."""
        whole, part = self._path(row, seed), self.folder / f"{row}-{seed}-{number}of{of}.safetensors"
        if self._there(whole, row, slice(0, self.people[row])) or self._there(part, row, some):
            self.kept(row, some.stop - some.start)
        elif some.start < some.stop:
            self._save(part, row, some, *self.draw(row, seed, some))

    def whole(self, row: str, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return all pictures of a row, put together from shares if some are there, and what an adapter costs."""
        import torch

        path, parts = self._path(row, seed), self._parts(row, seed)
        everybody = slice(0, self.people[row])
        if not parts or self._there(path, row, everybody):
            return self._load(path, row, seed, everybody)
        ((of, _),) = Counter(parts.values()).most_common(1)
        found = [
            self._load(self.folder / f"{row}-{seed}-{k}of{of}.safetensors", row, seed, some)
            for k, some in enumerate(shares(self.people[row], self.batch, of))
            if some.start < some.stop
        ]
        images = torch.cat([each for each, _ in found])
        seconds = sum(len(each) * cost["seconds"] for each, cost in found) / len(images)
        cost = {**found[0][1], "seconds": round(seconds, 3)}
        images = self._saved(path, row, everybody, images, cost)
        for part in self._parts(row, seed):
            part.unlink()
        return images, cost


def sheet_file(results: Path) -> Path:
    """Return where the pictures to results stand: `people.png` beside `results.json`, `NAME.png` beside `NAME.json`."""
    return results.with_name("people.png" if results.stem == "results" else f"{results.stem}.png")


def results_file(config: Config, made_from: str, described: dict[str, Any]) -> Path:
    """Return where the results go. Raises `UserError` if others stand there, or some that this run would drop."""
    from hyperdb.faces.image import read_text
    from hyperdb.runtime.files import load_json
    from hyperdb.runtime.output import check
    from hyperdb.runtime.recipe import plain

    file = Path(config.out) / config.results
    check(file.parent)
    sheet = sheet_file(file)
    then = load_json(file) if file.exists() else {}
    known = isinstance(then, dict) and (not then or then.get("made_from") == made_from)
    known = known and all(then.get("methods", {}).get(row, how) == plain(how) for row, how in described.items())
    # some recognisers have their weights among the judges'
    asked = [*config.recognisers, *config.judges.asked()]
    kept = {"rows": config.rows, "recognisers": asked, "judges": asked}
    lost = [x for key, now in kept.items() for x in then.get(key, []) if x not in now] if known else []
    lost = list(dict.fromkeys(lost))
    lost += [f"{then['seeds']} seeds"] if known and then.get("seeds", 0) > config.seeds else []
    if not known or lost or (sheet.exists() and read_text(sheet).get("software") != "hyperdb"):
        what = f"figures that would be lost ({', '.join(lost)})" if lost else "something else"
        raise UserError(
            f"{file}, or {sheet.name} beside it, is there and holds {what}; "
            "choose another file with results=FILE, another name=NAME, or delete it"
        )
    return file


def run(config: Config) -> Path:
    """Write `results` with means and 95 % intervals over people and seeds, and a picture sheet beside it.

    Every figure is computed from `values`, a number a row, figure, seed and person, which are written too. The
    pictures of a row and seed are kept in `out/rows`: a run that was stopped goes on where it was.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from hyperdb.diffusion.quantise import stored
    from hyperdb.faces.image import grid, save_png
    from hyperdb.heads import Identity
    from hyperdb.metrics.figures import closed, differences, sliced, slices, summary
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import only_set
    from hyperdb.tuning.methods import Cohort
    from hyperdb.tuning.personalizer import Personalizer
    from hyperdb.tuning.prior import load_prior

    methods = {row: config.methods[row] for row in config.rows if row not in PHOTOS}
    if config.hypernet is None and (begun := config.begun()):
        raise UserError(f"rows={begun[0]!r} begins at a prediction, which needs a hypernetwork; set hypernet=FOLDER")

    panel = Panel.gather(config)
    people, rows, shown = panel.people, panel.rows, panel.shown
    model = Personalizer(config)
    base = model.base
    seen = {row: method.photos or config.photos for row, method in methods.items()}
    cohorts = {count: Cohort(model, shown[:, :count], config.batch) for count in set(seen.values())}
    trained = model.hypernet.config.iterations if model.hypernet is not None else 0
    if odd := [row for row, method in methods.items() if (method.refinements or 0) > trained]:
        count = methods[odd[0]].refinements
        raise UserError(f"methods.{odd[0]}.refinements={count}: the hypernetwork was trained with {trained}")
    prompts = panel.prompts(base.config.instance_prompt)

    whole, digest = _made_from(config, model, people), _network_digest(model.hypernet)
    described = {row: _described(config, model, row, len(rows), digest) for row in config.rows}
    made_from = _digest(json.dumps(only_set(whole), sort_keys=True, default=str).encode())
    repeats = {row: config.seeds if row in methods else 1 for row in config.rows}
    # told of few rows; of a row without it, it was not set
    seldom = dict.fromkeys(("refinements", "strength", "photos", "hybrid", "encoder"))
    for row, count in repeats.items():
        names = (f"rows/{row}.safetensors", f"rows/{row}-*.safetensors")
        out = claim(config.out, names, {**seldom, **whole, **described[row]}, count)
    claim(config.out, ("prior.safetensors",), whole)
    claim(config.out, (FACES,), {})
    file = results_file(config, made_from, described)
    standard, judges = panel.standard(base, out, seen)  # before the long part: what is missing is said now
    fits = {row: config.fit(row) for row in config.rows}
    if model.prior is None and any(fit is not None and fit.prior_weight > 0 for fit in fits.values()):
        model.prior = load_prior(base, config.prior, out / "prior.safetensors")

    # --- pictures of every row
    def draw(row: str, seed: int, some: slice) -> tuple[Tensor, dict[str, float]]:
        if row in methods:
            return cohorts[seen[row]].draw(methods[row], fits[row], config.seed + seed, prompts, bar.update, some)
        # the given photo stands for every picture
        sent = panel.best(some) if row == "ceiling" else [(x[:1], [0] * len(prompts)) for x in shown[some]]
        through = []
        for photos, order in sent:  # each once
            through.append(base.decode(base.moments(photos)[:, 0])[torch.tensor(order)])
            bar.update(1)
        return torch.stack(through), dict.fromkeys(COSTS, 0.0)

    persons = panel.persons
    counts = {row: methods[row].among(len(rows)) if row in methods else len(rows) for row in config.rows}
    work = {row: 2 if fit is not None else 1 for row, fit in fits.items()}  # of a person: fine-tuned, drawn
    pictures = Pictures(
        out / "rows", config.batch, counts,
        {row: json.dumps({"made_from": made_from, **told}, sort_keys=True) for row, told in described.items()},
        persons, prompts, draw, lambda row, people: bar.update(work[row] * people),
    )  # fmt: skip
    number, of = config.share()
    mine = {row: shares(count, config.batch, of)[number] for row, count in counts.items()}
    drawn: dict[str, list[Tensor]] = {}
    costs: dict[str, dict[str, float]] = {}
    total = sum(work[row] * (some.stop - some.start) * repeats[row] for row, some in mine.items())
    with tqdm(total=total, desc="evaluate", unit="person", dynamic_ncols=True) as bar:
        for row, count in repeats.items():
            for seed in range(count):
                if of > 1:
                    pictures.make(row, seed, mine[row], number, of)
                    continue
                images, cost = pictures.whole(row, seed)
                drawn.setdefault(row, []).append(images)
                costs.setdefault(row, cost)
    if of > 1:
        print(f"the pictures of shard {number} of {of} are in {out / 'rows'}; then the same without both")
        return out

    # --- scores: a value a person and seed
    repeated = any(len(r) < config.images for r in panel.unseen)  # photos that tell nothing of how varied they are
    varied = ("diversity", *(f"{name}_diversity" for name in ENCODERS))
    unasked = {**UNASKED, "ceiling": (*UNASKED["ceiling"], *varied)} if repeated else UNASKED
    found: dict[str, dict[str, list[Any]]] = {row: {} for row in config.rows}
    for seed in range(config.seeds):
        of_seed = {row: images[seed] for row, images in drawn.items() if seed < len(images)}
        for row, score in standard.measure(of_seed).items():
            for name, values in score.items():
                if name not in unasked.get(row, ()):
                    found[row].setdefault(name, []).append(values.double().numpy().round(6))
    scores = {row: {name: np.stack(v, 1) for name, v in score.items()} for row, score in found.items()}  # [I, S] each
    figures = ["cosine", *(name for name in FURTHER if any(name in score for score in scores.values()))]
    against = {row: config.against(row) for row in config.rows}
    paired = {name: differences(scores, against, name, config.seed) for name in figures}
    known = []
    if "sex" in people.labels:  # rendered people; of photos of real ones nothing is known
        everybody = [Identity(seed).attributes for seed in persons]
        known = [{name: person[name] for name in ("sex", "age", "skin")} for person in everybody]
        for person, (first, *_) in zip(known, rows, strict=True):
            person["reference_wears"] = people.names["accessory"][int(people.labels["accessory"][first])]
    hypernet = {} if model.hypernet is None else model.hypernet.metadata
    shared = {"base_bytes": stored(base.unet) + stored(base.text_encoder)}
    result: dict[str, Any] = {
        "rows": {
            row: _read(config, row, described[row]) | shared | {"people": counts[row]}
            | summary(score, config.seed) | costs[row]
            for row, score in scores.items()
        },
        "paired": paired.pop("cosine"),
        "paired_further": paired,
        "closed": closed(scores, "floor", "ceiling"),
        "slices": slices(known, scores),
        "slices_of": sliced(scores),
        "judging_photos": {"each": standard.views.shape[1], "without_face": standard.faceless},
        "people": len(rows),
        "seeds": config.seeds,
        "split": config.split,
        "images_a_person": config.images,
        "styled": config.styled,
        "changed": config.changed,
        "base": base.digest,
        "hypernet": {"digest": digest, **{key: hypernet.get(key) for key in ("base", "data", "steps")}},
        "data": people.digest,
        "recognisers": config.recognisers,
        "judges": judges,
        "methods": described,
        "settings": _settings(config, hypernet),
        "made_from": made_from,
        **provenance(),
        "persons": persons,
        "values": {row: {name: v.T.tolist() for name, v in score.items()} for row, score in scores.items()},  # [S, I]
    }
    save_json(file, result)
    few = min(*counts.values(), 12)
    pixels = list(shown[:few, 0]) + [x for row in config.rows for x in drawn[row][0][:few, 0]]
    sheet = grid([x.permute(1, 2, 0).numpy() for x in pixels], few, rows=["reference", *config.rows])
    save_png(sheet_file(file), sheet, {"software": "hyperdb", "results": hash_files([file])})
    for row, score in result["rows"].items():
        c = score["cosine"]
        print(f"{row:12s} face cosine {c['mean']:.3f} [{c['lo']:.3f}, {c['hi']:.3f}]  rank-1 {score['rank1']:.2f}  "
              f"face found {score['detected']:.2f}")  # fmt: skip
    for name, c in result["paired"].items():
        print(f"{name:24s} {c['mean']:+.3f} [{c['lo']:+.3f}, {c['hi']:+.3f}]")
    print(f"results in {file}, pictures beside it")
    return file
