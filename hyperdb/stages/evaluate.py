"""Measure on unseen people: likeness, the person in a style, obedience, copying; one row a way to personalise."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.personalizer import PersonalizerConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from hyperdb.adapters.base import Factors
    from hyperdb.data.people import People
    from hyperdb.metrics.feature import Feature
    from hyperdb.tuning.memory import Sketch
    from hyperdb.tuning.personalizer import Personalizer

    Scores = dict[str, dict[str, NDArray[Any]]]  # row: figure: [I, S]

ROWS = (
    "floor", "shuffled", "mean", "hyper_only", "shuffled_40", "mean_40", "hyper_40", "no_hyper_40", "lidb_fit", "copy",
    "ceiling",
)  # fmt: skip
TRAINED = ("shuffled_40", "mean_40", "hyper_40", "no_hyper_40", "lidb_fit")
PICTURES = ("copy", "ceiling")  # not drawn: no seed changes them
PAIRS = (
    ("hyper_only", "floor"),
    ("hyper_only", "shuffled"),
    ("hyper_only", "mean"),
    ("hyper_40", "hyper_only"),
    ("hyper_40", "shuffled_40"),
    ("hyper_40", "mean_40"),
    ("mean_40", "no_hyper_40"),
    ("hyper_40", "no_hyper_40"),
    ("hyper_40", "lidb_fit"),
    ("hyper_40", "copy"),
)
FURTHER = ("cosine_dlib", "rank1", "rank1_styled", "style_accuracy")  # figures compared in pairs, beside the cosine


WRITES = ("rows/*.safetensors", "prior.safetensors")
KEPT = "the pictures of finished rows are kept"


@dataclass(kw_only=True)
class Config(PersonalizerConfig):
    """`data`: rendered people; `photos` of a person from number `reference` on are given, the next `views` judge.
    The iterations of a fine-tuning are those told, however many photos.

    `split`: whose people these must be; settings are chosen on those of validation.

    The photos after those (round to the first), through the autoencoder, are the ceiling; the given photo through it is
    the row copy, the likeness that copying gives. Every other row draws `images` pictures of "a [V] face" a person and
    one of each of `styled` (a style, or style/place), at the same seeds. The rows that end in 40 are fine-tuned on the
    given photo, begun at the own prediction, everybody's average, another person's or nothing. Fine-tuning and drawing
    are repeated with `seeds` seeds, and the intervals are over people and seeds.
    `recognisers` judge the likeness; the first one's figures have no suffix.
    """

    image: FilePath = "none"
    out: FilePath = "runs/evaluate/default"
    data: FilePath
    split: str = "test"
    people: int = 25
    images: int = 8  # at the same seeds for everyone; of few, the base's own are by luck like the people
    reference: int = 0
    photos: int = 1
    views: int = 4
    styled: list[str] = field(default_factory=list)
    recognisers: list[str] = field(default_factory=lambda: ["sface"])
    rows: list[str]
    seeds: int = 1
    no_hyper_rate: float | None = None  # of the row no_hyper_40; null: the fine-tuning's own
    converged: FitConfig  # of the row lidb_fit
    results: FilePath = "results.json"
    batch: int = 5  # people fine-tuned in one pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            raise UserError("start belongs to personalize; the rows of an evaluation say where each begins")
        if self.split not in ("test", "validation"):
            raise UserError(f"split={self.split!r}: expected test or validation")
        for row in self.rows:
            if row not in ROWS:
                raise UserError(f"rows={row!r}: expected of {', '.join(ROWS)}")
        if self.reference < 0 or self.photos < 1 or self.views < 1:
            raise UserError(
                f"reference={self.reference}, photos={self.photos}, views={self.views}: expected at least 0, 1, 1"
            )
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds}: expected at least 1")
        if not self.recognisers:
            raise UserError("recognisers=[]: name at least one")
        for name in self.recognisers:
            if name not in ("sface", "dlib"):
                raise UserError(f"recognisers={name!r}: expected sface or dlib")


def passes(config: Config, sketch: Sketch) -> None:
    """Measure prediction and fine-tuning of a batch of people, and the drawing of a row."""
    from hyperdb.tuning.draw import together

    sketch.personalize(config, config.batch)
    with sketch.measure("drawing"):
        sketch.draw(together(config.diffusion.size))


def run(config: Config) -> Path:
    """Write `results` with means and 95 % intervals over people and seeds, and a picture sheet beside it.

    Every figure is computed from `values`, a number a row, figure, seed and person, which are written too. The
    pictures of a row and seed are kept in `out/rows`: a run that was stopped goes on where it was.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from hyperdb.data.people import load_people
    from hyperdb.faces.image import grid, save_png
    from hyperdb.heads import PLACE_PHRASES
    from hyperdb.runtime.files import hash_files, load_tensors, save_json, save_tensors
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.tuning.personalizer import Personalizer
    from hyperdb.tuning.prior import load_prior

    # --- people: one reference, `views` judges, the rest for the ceiling
    given, used = config.photos, config.photos + config.views
    needed = max(used + 1, config.reference + 1)
    people = load_people(config.data, config.people, config.split, config.diffusion.size, least=needed)
    rows = [r.roll(-config.reference) for r in people.photos if len(r) >= needed]
    if len(rows) < 2:
        raise UserError(f"{config.data} needs at least two people with {needed} photos each")
    shown = people.images[torch.stack([r[:given] for r in rows])]  #                [I, V, 3, H, W]
    reference = shown[:, 0]
    judges = people.images[torch.stack([r[given:used] for r in rows])]  #           [I, K, 3, H, W]
    cycled = [[r[used + k % (len(r) - used)] for k in range(config.images)] for r in rows]
    others = people.images[torch.tensor(cycled)]  #                                 [I, images, 3, H, W]
    words = [word.partition("/")[0] for word in config.styled]
    if odd := [w for w in config.styled if "/" in w and w.partition("/")[2] not in PLACE_PHRASES]:
        raise UserError(f"styled={odd[0]!r}: the place is one of {', '.join(PLACE_PHRASES)}")
    styled = styled_views(people, rows, words)
    best = torch.cat([others, *(styled[word][:, :1] for word in words)], 1)  #      [I, images + styled, 3, H, W]
    model = Personalizer(config)
    if model.hypernet is None:
        raise UserError("evaluate needs a hypernetwork; set hypernet=FOLDER")

    whole = _made_from(config, model, people)
    made_from = json.dumps(whole, sort_keys=True, default=str)
    out = claim(config.out, WRITES, whole)
    target = results_file(config, made_from)
    judges_of = Judges(config)  # before the long part: what is missing is said now
    fits = {"finetune": config.finetune, "no_hyper_40": config.finetune, "lidb_fit": config.converged}
    if config.no_hyper_rate is not None:
        fits["no_hyper_40"] = replace(config.finetune, rate=config.no_hyper_rate)
    if model.prior is None and any(f.prior_weight > 0 for f in fits.values()):
        model.prior = load_prior(model.base, config.prior, out / "prior.safetensors")

    # --- pictures of every row
    drawn: dict[str, list[Tensor]] = {}
    costs: dict[str, dict[str, float]] = {}
    repeats = {row: 1 if row in PICTURES else config.seeds for row in config.rows}
    total = len(rows) * sum(count * (2 if row in TRAINED else 1) for row, count in repeats.items())
    with tqdm(total=total, desc="evaluate", unit="person", dynamic_ncols=True) as bar:
        for row, count in repeats.items():
            for seed in range(count):
                path = out / "rows" / (f"{row}-{seed}.safetensors" if seed else f"{row}.safetensors")
                tensors, metadata = load_tensors(path) if path.is_file() else ({}, {})
                if metadata.get("made_from") != made_from:
                    images, cost = _pictures(row, seed, model, config, fits, shown, best, bar.update)
                    text = {"made_from": made_from, **{k: str(v) for k, v in cost.items()}}
                    save_tensors(path, {"images": images}, text)
                    tensors = {"images": images}
                else:
                    cost = {k: float(metadata[k]) for k in ("seconds", "bytes")}
                    bar.update(len(rows) * (2 if row in TRAINED else 1))
                drawn.setdefault(row, []).append(tensors["images"])
                costs.setdefault(row, cost)

    # --- scores: a value a person and seed
    further = {k: v[:, 1:] for k, v in styled.items()}
    found: dict[str, dict[str, list[Any]]] = {row: {} for row in config.rows}
    for seed in range(config.seeds):
        pictures = {row: images[seed] for row, images in drawn.items() if seed < len(images)}
        for row, score in measure(config, judges_of, reference, judges, further, pictures).items():
            for name, values in score.items():
                found[row].setdefault(name, []).append(values.double().numpy().round(6))
    scores = {row: {name: np.stack(v, 1) for name, v in score.items()} for row, score in found.items()}  # [I, S] each
    any_row = next(iter(scores.values()))
    result: dict[str, Any] = {
        "rows": {row: {**summary(score, config.seed), **costs[row]} for row, score in scores.items()},
        "paired": _pairs(scores, "cosine", config.seed),
        "paired_further": {name: _pairs(scores, name, config.seed) for name in FURTHER if name in any_row},
        "closed": _closed(scores),
        "slices": slices(people, rows, scores),
        "people": len(rows),
        "seeds": config.seeds,
        "split": config.split,
        "images_a_person": config.images,
        "styled": config.styled,
        "base": model.base.digest,
        "hypernet": {
            "digest": _hypernet_digest(model),
            **{k: model.hypernet.metadata.get(k) for k in ("base", "data", "steps")},
        },
        "data": people.digest,
        "recognisers": config.recognisers,
        "fits": {name: asdict(fit) for name, fit in fits.items()},
        "made_from": _short(made_from),
        **provenance(),
        "persons": people.seed[torch.stack([r[0] for r in rows])].tolist(),
        "values": {row: {name: v.T.tolist() for name, v in score.items()} for row, score in scores.items()},  # [S, I]
    }
    save_json(target, result)
    few = min(len(rows), 12)
    pixels = list(reference[:few]) + [x for row in config.rows for x in drawn[row][0][:few, 0]]
    sheet = grid([x.permute(1, 2, 0).numpy() for x in pixels], few, rows=["reference", *config.rows])
    save_png(sheet_file(target), sheet, {"software": "hyperdb", "results": hash_files([target])})
    for row, score in result["rows"].items():
        c = score["cosine"]
        print(f"{row:12s} face cosine {c['mean']:.3f} [{c['lo']:.3f}, {c['hi']:.3f}]  rank-1 {score['rank1']:.2f}  "
              f"face found {score['detected']:.2f}")  # fmt: skip
    for name, c in result["paired"].items():
        print(f"{name:24s} {c['mean']:+.3f} [{c['lo']:+.3f}, {c['hi']:+.3f}]")
    print(f"results in {target}, pictures beside it")
    return target


class Judges:
    """The recognisers and, if anything is drawn in a style, the judge of styles."""

    def __init__(self, config: Config) -> None:
        from hyperdb.metrics.face import Dlib, SFace
        from hyperdb.metrics.obedience import Judge

        self.features: list[Feature] = [SFace() if name == "sface" else Dlib() for name in config.recognisers]
        self.judge = Judge.load(resolve("package:embedded/judge.safetensors")) if config.styled else None


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


def _hypernet_digest(model: Personalizer) -> str:
    """Return 16 hex digits over the hypernetwork's weights."""
    assert model.hypernet is not None
    weights = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in model.hypernet.state_dict().values()))
    return weights.hexdigest()[:16]


def _made_from(config: Config, model: Personalizer, people: People) -> dict[str, Any]:
    """Return all that decides a row."""
    from hyperdb.runtime.recipe import recipe

    what = {k: v for k, v in recipe(config).items() if k not in ("rows", "seeds", "recognisers")}
    return {**what, "base": model.base.digest, "hypernet": _hypernet_digest(model), "data": people.digest}


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sheet_file(results: Path) -> Path:
    """Return where the pictures to results stand: `people.png` beside `results.json`, `NAME.png` beside `NAME.json`."""
    return results.with_name("people.png" if results.stem == "results" else f"{results.stem}.png")


def results_file(config: Config, made_from: str) -> Path:
    """Return where the results go. Raises `UserError` if others stand there, or some that this run would drop."""
    from hyperdb.faces.image import read_text
    from hyperdb.runtime.files import load_json
    from hyperdb.runtime.output import check

    target = Path(config.out) / config.results
    check(target.parent)
    sheet = sheet_file(target)
    then = load_json(target) if target.exists() else {}
    known = isinstance(then, dict) and (not then or then.get("made_from") == _short(made_from))
    lost = [x for key, now in (("rows", config.rows), ("recognisers", config.recognisers)) for x in then.get(key, [])
            if x not in now] if known else []  # fmt: skip
    lost += [f"{then['seeds']} seeds"] if known and then.get("seeds", 0) > config.seeds else []
    if not known or lost or (sheet.exists() and read_text(sheet).get("software") != "hyperdb"):
        what = f"figures that would be lost ({', '.join(lost)})" if lost else "something else"
        raise UserError(
            f"{target}, or {sheet.name} beside it, is there and holds {what}; "
            "choose another file with results=FILE, another name=NAME, or delete it"
        )
    return target


def _pictures(
    row: str, seed: int, model: Personalizer, config: Config, fits: dict[str, FitConfig], shown: Tensor, best: Tensor,
    progress: Any,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Draw one row, `[I, images + styled, 3, H, W]` uint8, with one seed; say what one person's adapter costs.

    The seconds are those of a batch of people, divided among them.
    """
    import torch

    from hyperdb.adapters.base import LowRank, concatenate, moved, select
    from hyperdb.heads import prompt
    from hyperdb.tuning.draw import draw
    from hyperdb.tuning.fit import fit

    assert model.hypernet is not None
    base, lidb, (count, given) = model.base, model.lidb, shown.shape[:2]
    if row in PICTURES:  # renders of the person, or the photo once for every picture, as the autoencoder lets through
        shape = best.shape[:2]
        sent = best if row == "ceiling" else shown[:, :1]
        images = torch.stack([base.decode(base.moments(x)[:, 0]) for x in sent]).expand(*shape, -1, -1, -1)
        progress(count)
        return images, {"seconds": 0.0, "bytes": 0.0}
    began = time.perf_counter()
    with torch.no_grad(), base.autocast():
        tokens = model.hypernet(shown.flatten(0, 1)).unflatten(0, (count, given)).mean(1)
    predicting = (time.perf_counter() - began) / count
    own: Factors = moved(lidb.factors({"tokens": tokens}))
    another = select(own, [(i + 1) % count for i in range(count)])
    average: Factors = moved(lidb.factors({"tokens": tokens.mean(0, keepdim=True).expand_as(tokens)}))
    lora = config.relaxed.build(model.layout)

    def trained(adapter: Any, settings: FitConfig, frozen: Factors | None) -> Factors:
        parts, settings = [], replace(settings, seed=settings.seed + seed)
        for first in range(0, count, config.batch):
            chosen = slice(first, min(count, first + config.batch))
            moments = base.moments(shown[chosen].flatten(0, 1)).unflatten(0, (-1, given))
            under = select(frozen, chosen) if frozen is not None else None
            parts.append(adapter.changes(fit(base, adapter, moments, settings, under, model.prior)))
            progress(chosen.stop - chosen.start)
        made: Factors = {
            name: LowRank(*(torch.cat([p[name][side] for p in parts]) for side in (0, 1))) for name in parts[0]
        }
        return made if frozen is None else concatenate(frozen, made)

    ways: dict[str, Any] = {
        "floor": lambda: None,
        "mean": lambda: average,
        "hyper_only": lambda: own,
        "shuffled": lambda: another,
        "shuffled_40": lambda: trained(lora, fits["finetune"], another),
        "mean_40": lambda: trained(lora, fits["finetune"], average),
        "hyper_40": lambda: trained(lora, fits["finetune"], own),
        "no_hyper_40": lambda: trained(lora, fits["no_hyper_40"], None),
        "lidb_fit": lambda: trained(lidb, fits["lidb_fit"], None),
    }
    began = time.perf_counter()
    factors = ways[row]()
    seconds = (time.perf_counter() - began) / count
    relaxed = 4 * config.relaxed.rank * sum(x.in_ + x.out for x in model.layout.layers)
    tiny = 4 * lidb.numbers
    bytes_ = {"floor": 0, "no_hyper_40": relaxed}.get(row, tiny + relaxed if row.endswith("_40") else tiny)
    if row in ("hyper_only", "shuffled", "shuffled_40", "hyper_40"):
        seconds += predicting
    instance = [base.config.instance_prompt] * config.images
    pairs = [word.partition("/")[::2] for word in config.styled]
    prompts = instance + [prompt(style, "[V]", place or None) for style, place in pairs]
    noises = [seed * len(prompts) + k for k in range(len(prompts))]
    images = draw(base, factors, count, prompts, noises, progress=progress)
    return images, {"seconds": round(seconds, 3), "bytes": float(bytes_)}


def measure(
    config: Config, by: Judges, reference: Tensor, judges: Tensor, styled: dict[str, Tensor],
    pictures: dict[str, Tensor],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return every figure of every row, of the pictures of one seed, a value a person, `[I]`."""
    import torch

    from hyperdb.metrics import copying
    from hyperdb.metrics.likeness import galleries
    from hyperdb.metrics.score import cosine, rank1

    def each(feature: Any, images: Tensor) -> Tensor:
        return feature(images.flatten(0, 1)).unflatten(0, images.shape[:2])  #      [I, K, C]

    scores: dict[str, dict[str, Any]] = {row: {} for row in pictures}
    words = [word.partition("/")[0] for word in config.styled]
    for number, feature in enumerate(by.features):
        suffix = f"_{feature.name}" if number else ""
        gallery = galleries(feature, judges)
        in_style = {style: galleries(feature, views) for style, views in styled.items()}
        for row, images in pictures.items():
            photo, rest = each(feature, images).split([config.images, len(words)], 1)
            score = scores[row]
            score[f"cosine{suffix}"] = torch.as_tensor(cosine(photo, gallery[:, None])).mean(1)
            score[f"detected{suffix}"] = photo.isfinite().all(-1).float().mean(1)
            score[f"rank1{suffix}"] = torch.as_tensor(rank1(photo, gallery))
            if words:
                hits = [torch.as_tensor(rank1(rest[:, i, None], in_style[word])) for i, word in enumerate(words)]
                score[f"rank1_styled{suffix}"] = torch.stack(hits).mean(0)
                score[f"detected_styled{suffix}"] = rest.isfinite().all(-1).float().mean(1)
    for row, images in pictures.items():
        photo, rest = images.split([config.images, len(words)], 1)
        for name, what in (("background", copying.background), ("pose", copying.pose)):
            scores[row][f"copy_{name}"] = copying.similarity(each(what, photo), what(reference), each(what, judges))
        scores[row]["diversity"] = copying.diversity(photo)
        if by.judge is not None:
            wanted = torch.tensor([by.judge.words["style"].index(word) for word in words])
            drawn = by.judge(rest.flatten(0, 1))["style"].view(-1, len(words))
            scores[row]["style_accuracy"] = (drawn == wanted).float().mean(1)
    return scores


def summary(score: dict[str, NDArray[Any]], seed: int) -> dict[str, Any]:
    """Return mean and interval of every figure `[I, S]` but the rates, which are means alone."""
    from hyperdb.metrics.score import bootstrap

    plain = ("rank1", "detected")
    return {
        name: round(float(values.mean()), 4) if name.startswith(plain) else bootstrap(values, seed)
        for name, values in score.items()
    }


def slices(people: People, rows: list[Tensor], scores: Scores) -> dict[str, Any]:
    """Return every row's mean face cosine by known attribute: `{attribute: {word: {people: n, row: cosine}}}`."""
    import numpy as np

    from hyperdb.heads import Identity

    if "sex" not in people.labels:  # photos of real people
        return {}
    known = [Identity(int(people.seed[r[0]])).attributes for r in rows]
    found: dict[str, Any] = {}
    for name in ("sex", "age", "skin"):
        for word in sorted({str(person[name]) for person in known}):
            mine = np.array([person[name] == word for person in known])
            means = {row: round(float(score["cosine"][mine].mean()), 4) for row, score in scores.items()}
            found.setdefault(name, {})[word] = {"people": int(mine.sum()), **means}
    return found


def _pairs(scores: Scores, name: str, seed: int) -> dict[str, Any]:
    from hyperdb.metrics.score import paired

    return {f"{a}-{b}": paired(scores[a][name], scores[b][name], seed) for a, b in PAIRS if a in scores and b in scores}


def _closed(scores: Scores) -> dict[str, float]:
    """Return which part of the way from the base to the person's own renders each row goes, by mean face cosine."""
    mean = {row: float(score["cosine"].mean()) for row, score in scores.items()}
    way = mean.get("ceiling", 0.0) - mean.get("floor", 0.0)
    if not {"floor", "ceiling"} <= scores.keys() or way <= 0:
        return {}
    return {row: round((x - mean["floor"]) / way, 4) for row, x in mean.items() if row not in ("floor", "ceiling")}
