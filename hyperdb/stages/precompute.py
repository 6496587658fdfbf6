"""Fit LiDB weights to many people: the hypernetwork's targets in weight space (paper section 4.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.adapters import LiDBConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.stages.finetune import FitConfig, PriorConfig

if TYPE_CHECKING:
    from hyperdb.data.people import People


@dataclass
class StoreFitConfig(FitConfig):
    """How each person is fitted: on `views` photos (the paper: 1)."""

    views: int = 1


@dataclass
class Config:
    """`identities` people, `batch` of them in one pass of the UNet."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lidb: LiDBConfig = field(default_factory=LiDBConfig)
    fit: StoreFitConfig = field(default_factory=StoreFitConfig)
    prior: PriorConfig = field(default_factory=lambda: PriorConfig(prompts=["a face"]))
    data: str = "data/heads"
    name: str = "default"
    out: str = "runs/precompute/default"
    identities: int = 256
    first: int = 0
    batch: int = 16
    dry_run: bool = False  # say which networks it would load, where, and how much memory it takes; load nothing


def reference_rows(people: People, views: int) -> list[list[int]]:
    """Return the first `views` photo rows of each person, repeating where there are fewer; none: an empty list."""
    rows = [photos.tolist() for photos in people.photos]
    return [[r[k % len(r)] for k in range(views)] if r else [] for r in rows]


def run(config: Config) -> Path:
    """Write shards of `batch` people and the store's index to `out`; finished shards are kept."""
    import torch
    from tqdm import tqdm

    from hyperdb.adapters.layout import Layout
    from hyperdb.data import weights
    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.runtime.provenance import provenance
    from hyperdb.stages.finetune import fit, load_prior

    base = config.diffusion.load()
    lidb = config.lidb.build(Layout.of(base.targets()))
    people = load_people(config.data, limit=config.first + config.identities, split=None, size=config.diffusion.size)
    rows = [(i, r) for i, r in enumerate(reference_rows(people, config.fit.views)) if r and i >= config.first]
    out = Path(config.out)
    made_from = {
        "base": base.digest,
        "data": people.digest,
        "fit": asdict(config.fit),
        "prior": asdict(config.prior) if config.fit.prior_weight > 0 else None,
        "lidb": asdict(config.lidb),
    }
    prior = load_prior(base, config.prior, out / "prior.safetensors") if config.fit.prior_weight > 0 else None
    shown = people.subset(torch.tensor([row for _, r in rows for row in r], dtype=torch.long))
    moments = latent_moments(base, shown, Path(config.data)).unflatten(0, (len(rows), config.fit.views))
    groups = [rows[k : k + config.batch] for k in range(0, len(rows), config.batch)]
    losses: list[float] = []
    with tqdm(total=len(rows), desc="fits", unit="person", dynamic_ncols=True) as bar:
        for number, group in enumerate(groups):
            index = [r for _, r in group]
            seeds = people.seed[[r[0] for r in index]]
            key = weights.store_key(**made_from, seeds=seeds.tolist())
            if not weights.shard_is_done(out, number, key):
                mine = moments[number * config.batch :][: len(group)]
                losses.clear()
                params = fit(base, lidb, mine, config.fit, None, prior, lambda _, x: losses.append(x))
                weights.save_shard(out, number, params["tokens"].cpu(), seeds, key)
                bar.set_postfix_str(f"loss {sum(losses[-10:]) / len(losses[-10:]):.4f}")
            bar.update(len(group))
    weights.finish(out, len(groups), lidb, {**made_from, **provenance()})
    print(f"{len(rows)} fits of {lidb.numbers} numbers each in {out}")
    return out
