"""G2 and G2s: what can an adapter of one person hold, and does the person survive in the styles?

    hyperdb render_heads split=validation identities=50 views=30 photo_views=9 out=data/heads_capacity
    python experiments/embedded/gates/g2_capacity.py                     (the rows that the gates ask for)
    python experiments/embedded/gates/g2_capacity.py lidb,prior_weight=1 lora,rank=4,steps=40,rate=0.003

A row is an adapter (lidb, lora, or base for none) and its settings: a, b, rank, views (photos fitted), strength, those
of `FitConfig`, and guidance. Ten people are fitted; ranks are among fifty. New rows are added to g2.json.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path

import torch

from hyperdb import config
from hyperdb.adapters import LiDBConfig, LoRAConfig
from hyperdb.adapters.layout import Layout
from hyperdb.data.people import load_people
from hyperdb.heads import STYLES, prompt
from hyperdb.metrics.face import SFace
from hyperdb.metrics.figures import Standard, summary
from hyperdb.metrics.likeness import galleries
from hyperdb.metrics.obedience import Judge
from hyperdb.metrics.score import rank1
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.evaluate import Config, styled_views
from hyperdb.tuning.draw import draw
from hyperdb.tuning.fit import FitConfig, fit
from hyperdb.tuning.prior import load_prior

PEOPLE, PHOTOS, JUDGES, MANY = 10, 8, 4, 4
GATE = ["base", "lidb", f"lidb,views={MANY}", f"lora,rank=16,views={MANY},rate=0.003"]
STYLED = [style for style in STYLES if style != "photo"]


def parse(spec: str) -> tuple[str, dict[str, float]]:
    """Split `adapter,key=value,...`."""
    kind, *words = spec.split(",")
    return kind, {k: float(v) for k, _, v in (w.partition("=") for w in words)}


def main(specs: list[str]) -> None:
    """Fit, draw, measure, write."""
    whole = config.load("evaluate", [f"styled=[{','.join(STYLED)}]", f"images={PHOTOS}", f"views={JUDGES}"])
    assert isinstance(whole, Config)
    converged = whole.fit("lidb_fit")
    assert converged is not None
    base = whole.diffusion.load()
    layout, here = Layout.of(base.targets()), Path(__file__)
    people = load_people("data/heads_capacity", split="validation")
    rows = people.photos
    reference = people.images[torch.stack([r[0] for r in rows])]
    views = people.images[torch.stack([r[1 : 1 + JUDGES] for r in rows])]
    more = people.images[torch.stack([r[1 + JUDGES : 1 + JUDGES + MANY] for r in rows[:PEOPLE]])]
    styled = {k: v[:, 1:] for k, v in styled_views(people, rows, STYLED).items()}
    shown = torch.cat([reference[:PEOPLE, None], more], 1)  #                     [I, 1 + MANY, 3, H, W]
    moments = base.moments(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
    prior = load_prior(base, whole.prior, Path("runs/gates/prior.safetensors"))
    feature, judge = SFace(), Judge.load(resolve("package:embedded/judge.safetensors"))
    some = {style: renders[:PEOPLE] for style, renders in styled.items()}
    standard = Standard([feature], judge, reference[:PEOPLE, None], views[:PEOPLE], STYLED, some)
    gallery = galleries(feature, views)
    prompts = [base.config.instance_prompt] * PHOTOS + [prompt(style, "[V]") for style in STYLED]
    path = here.with_name("g2.json")
    result = load_json(path) if path.is_file() else {}
    if result.get("base") != base.digest:
        result = {"base": base.digest, "rows": {}}
    for spec in specs or GATE:
        kind, words = parse(spec)
        kinds = {name: typ for name, typ in typing.get_type_hints(FitConfig).items() if typ in (int, float)}
        settings = {k: kinds[k](v) for k, v in words.items() if k in kinds}
        settings = dataclasses.replace(converged, **settings)
        given, factors = int(words.get("views", 1)), None
        base.config.guidance = words.get("guidance", whole.diffusion.guidance)
        if kind == "lidb":
            sizes = (int(words.get(side, getattr(whole.adapter, side))) for side in "ab")
            adapter = LiDBConfig(*sizes).build(layout)
            factors = adapter.changes(fit(base, adapter, moments[:, :given], settings, None, prior))
        elif kind == "lora":
            adapter = LoRAConfig(int(words.get("rank", 4))).build(layout)
            factors = adapter.changes(fit(base, adapter, moments[:, :given], settings, None, prior))
        strength = words.get("strength", 1.0)
        images = draw(base, factors, PEOPLE, prompts, list(range(len(prompts))), strength=strength)
        row = summary(standard.measure({spec: images})[spec], 0)
        photos = feature(images[:, :PHOTOS].flatten(0, 1)).view(PEOPLE, PHOTOS, -1)
        row["rank1"] = float(hits(photos, gallery).mean())
        found = [feature(images[:, PHOTOS + i])[:, None] for i in range(len(STYLED))]
        row["rank1_styled"] = sum(
            float(hits(q, galleries(feature, styled[s])).mean()) for q, s in zip(found, STYLED, strict=True)
        ) / len(STYLED)
        result["rows"][spec] = {**row, "settings": dataclasses.asdict(settings)}
        save_json(path, {**result, **provenance()})
        print(spec, {k: v["mean"] if isinstance(v, dict) else v for k, v in row.items()}, flush=True)


def hits(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Return each of the first people's share of pictures nearest to their own row of the whole gallery."""
    padded = torch.full((len(gallery), *queries.shape[1:]), float("nan"))
    padded[: len(queries)] = queries
    return torch.as_tensor(rank1(padded, gallery))[: len(queries)]


if __name__ == "__main__":
    main(sys.argv[1:])
