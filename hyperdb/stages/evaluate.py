"""Measure the likeness on unseen people: base, prediction, another person's prediction, fine-tuned, ceiling."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.runtime.errors import UserError
from hyperdb.stages.personalize import Config as PersonalizeConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config(PersonalizeConfig):
    """`data`: rendered people of the test split; one photo of each is the reference, the others judge.

    Every row draws `images` pictures of "a [V] face" a person, with the same seeds.
    """

    image: str = "none"
    data: str = "data/heads_test"
    people: int = 25
    images: int = 4
    views: int = 4  # other photos of the person that the pictures are compared with
    results: str = "results.json"
    batch: int = 5  # people fine-tuned in one pass
    rows: list[str] = field(default_factory=lambda: ["floor", "shuffled", "hyper_only", "hyper_40", "ceiling"])


def run(config: Config) -> Path:
    """Write `results` with means and 95 % intervals over people and a picture sheet beside it."""
    import torch
    from tqdm import tqdm

    from hyperdb.adapters.base import concatenate, select
    from hyperdb.data.people import load_people
    from hyperdb.faces.image import grid, save_png
    from hyperdb.metrics.face import SFace
    from hyperdb.metrics.feature import detection_rate
    from hyperdb.metrics.score import bootstrap, cosine, paired, rank1
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.provenance import provenance
    from hyperdb.stages.finetune import fit
    from hyperdb.stages.likeness import draw, galleries
    from hyperdb.stages.personalize import Personalizer

    # --- people: one reference, `views` judges
    people = load_people(config.data, limit=config.people, size=config.diffusion.size)
    rows = [r for r in people.photos if len(r) > config.views]
    if len(rows) < 2:
        raise UserError(f"{config.data} needs at least two people with {config.views + 1} photos each")
    count = len(rows)
    reference = people.images[torch.stack([r[0] for r in rows])]  #                 [I, 3, H, W]
    judges = people.images[torch.stack([r[1 : config.views + 1] for r in rows])]  # [I, K, 3, H, W]
    model = Personalizer(config)
    if model.hypernet is None:
        raise UserError("evaluate needs a hypernetwork; set hypernet=FOLDER")
    base, feature = model.base, SFace()
    gallery = galleries(feature, judges)

    # --- rows
    with torch.no_grad(), base.autocast():
        tokens = model.hypernet(reference)
    own = model.lidb.factors({"tokens": tokens})
    seeds, instance = list(range(config.images)), [base.config.instance_prompt] * config.images
    images: dict[str, Tensor] = {}
    with tqdm(total=len(config.rows) * count, desc="evaluate", unit="person", dynamic_ncols=True) as bar:
        for row in config.rows:
            if row == "ceiling":
                decoded = [base.decode(base.moments(j)[:, 0]) for j in judges]
                images[row] = torch.stack(decoded)[:, : config.images]
                bar.update(count)
            elif row == "hyper_40":
                parts = []
                lora = config.relaxed.build(model.layout)
                for first in range(0, count, config.batch):
                    chosen = slice(first, min(count, first + config.batch))
                    frozen = {k: (d.detach(), u.detach()) for k, (d, u) in select(own, chosen).items()}
                    moments = base.moments(reference[chosen])[:, None]
                    relaxed = lora.factors(fit(base, lora, moments, config.finetune, frozen, model.prior))
                    number = chosen.stop - first
                    parts.append(draw(base, concatenate(frozen, relaxed), number, instance, seeds, progress=bar.update))
                images[row] = torch.cat(parts)
            else:
                factors = {
                    "floor": None,
                    "hyper_only": own,
                    "shuffled": select(own, [(i + 1) % count for i in range(count)]),
                }
                if row not in factors:
                    raise UserError(f"no row {row!r}; there is: {', '.join([*factors, 'hyper_40', 'ceiling'])}")
                images[row] = draw(base, factors[row], count, instance, seeds, progress=bar.update)

    # --- scores: the person is the unit
    embedded = {row: feature(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for row, x in images.items()}
    per_person = {row: cosine(x, gallery[:, None]).mean(1) for row, x in embedded.items()}
    result: dict[str, Any] = {
        "rows": {
            row: {
                "cosine": bootstrap(values, config.seed),
                "detected": round(detection_rate(embedded[row].flatten(0, 1)), 4),
                "rank1": round(rank1(embedded[row], gallery).mean(), 4),
            }
            for row, values in per_person.items()
        },
        "paired": {
            f"{a}-{b}": paired(per_person[a], per_person[b], config.seed)
            for a, b in (("hyper_only", "floor"), ("hyper_only", "shuffled"), ("hyper_40", "hyper_only"))
            if a in per_person and b in per_person
        },
        "people": count,
        "images_a_person": config.images,
        "base": base.digest,
        "hypernet": model.hypernet.metadata,
        "data": people.digest,
        "recogniser": feature.name,
        **provenance(),
    }
    result["hypernet"] = {k: v for k, v in result["hypernet"].items() if k in ("base", "data", "steps")}
    target = Path(config.results)
    target = target if target.is_absolute() else Path(config.out) / target
    save_json(target, result)
    few = min(count, 12)
    pixels = list(reference[:few]) + [x for row in images for x in images[row][:few, 0]]
    sheet = grid([x.permute(1, 2, 0).numpy() for x in pixels], few, rows=["reference", *images])
    save_png(target.with_name("people.png"), sheet, {"software": "hyperdb", "results": hash_files([target])})
    for row, score in result["rows"].items():
        c = score["cosine"]
        print(f"{row:12s} face cosine {c['mean']:.3f} [{c['lo']:.3f}, {c['hi']:.3f}]  rank-1 {score['rank1']:.2f}  "
              f"face found {score['detected']:.2f}")  # fmt: skip
    for name, c in result["paired"].items():
        print(f"{name:24s} {c['mean']:+.3f} [{c['lo']:+.3f}, {c['hi']:+.3f}]")
    print(f"results in {target}, pictures beside it")
    return target

