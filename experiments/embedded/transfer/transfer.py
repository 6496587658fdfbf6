"""What of an adapter is left on another version of its base: as it is, transferred, steering it, or fitted there.

    python experiments/embedded/transfer/transfer.py --to FOLDER [--xadapter FOLDER] [data=FOLDER people=12]

Each of the methods personalises validation people on the base `diffusion`. Rows: `METHOD`, its pictures there; and on
the base in --to `METHOD-untouched`, the same changes; `METHOD-transferred`, what `hyperdb transfer` makes of them;
`METHOD-steered`, the old base with them in it steers the new one (`hyperdb train_xadapter`); `METHOD-fitted`, the
method without the hypernetwork, which is of the old base, on the new one. `base` and `to` are the bases alone.
The words are settings of `hyperdb evaluate experiment=sweep/hyper_40`. Writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdb import config
from hyperdb.adapters.base import Changes, both, identities_of, select
from hyperdb.adapters.inject import Injection, settled
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.adapters.svdiff import narrowest
from hyperdb.data.people import load_people
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.diffusion.xadapter import Mapper, XAdapter, find
from hyperdb.metrics.face import SFace
from hyperdb.metrics.figures import Standard, differences, summary
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages import transfer
from hyperdb.stages.evaluate import Config
from hyperdb.tuning.draw import draw
from hyperdb.tuning.methods import Cohort
from hyperdb.tuning.personalizer import Personalizer

ROWS = "rows=[hyper_only,hyper_40,lora,lorax]"
WORDS = ["experiment=sweep/hyper_40", "people=12", "styled=[]", ROWS]
FITTED = {"hyper_40": "no_hyper_40"}  # what stands for a method on a base without hypernetwork


def personalised(settings: Config, model: Personalizer, photos: Tensor, row: str) -> Changes:
    """Return a row's changes of all people `[I, ...]`, who are given by one photo each."""
    method, fit = settings.methods[row], settings.fit(row)
    cohort = Cohort(model, photos[:, None], settings.batch)
    start, adapter, everybody = cohort.start(method), cohort.adapter(method), slice(0, len(photos))
    changes = None if start is None else select(start, everybody)
    if adapter is not None and fit is not None:
        changes = both(changes, cohort.train(adapter, fit, everybody, start, lambda _: None, method.adapter))
    assert changes is not None
    return changes


def transferred(
    changes: Changes, old: dict[str, Site], new: dict[str, Site], subspace: int, how: transfer.Config
) -> tuple[Changes, Any]:
    """Return the changes on the new base, and what `hyperdb transfer` tells of their layers."""
    found, told = {}, {}
    for name, change in changes.items():
        pair, told[name] = transfer.move(change, old[name], new.get(name), subspace, how)
        if pair is not None:
            found[name] = pair
    return found, told


@torch.no_grad()
def steered(old: Base, new: Base, mapper: Mapper, changes: Changes, prompts: list[str], seeds: list[int]) -> Tensor:
    """Return the new base's pictures `[I, K, 3, H, W]`, steered by the old one with each person's changes in it."""
    steering, injection, guide = XAdapter(old, new, mapper), Injection(old.sites(changes)), new.config.guide(True)
    noise, found = start_noise(new, seeds), []
    try:
        for person in range(identities_of(changes)):
            one = settled(select(changes, [person]), injection.sites)
            injection.set(one, repeat=guide.adapted, plain=guide.plain)
            found.append(new.decode(sample(new, prompts, noise, subject_guidance=guide.subject)))
    finally:
        injection.remove()
        steering.remove()
    return torch.stack(found)


def main(arguments: list[str]) -> None:
    """Personalise, move, draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True)
    parser.add_argument("--xadapter")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    settings = config.load("evaluate", [*WORDS, *given.words])
    there = replace(settings, diffusion=replace(settings.diffusion, path=given.to), hypernet=None, rows=["floor"])
    how = config.load("transfer", [f"to={given.to}", "adapter=none"])
    least = 1 + settings.views
    people = load_people(settings.data, settings.people, settings.split, settings.diffusion.size, least=least)
    rows = [r[:least] for r in people.given_first(settings.data, 1, least)]
    images = people.images[torch.stack(rows)]  #                                     [I, 1 + views, 3, H, W]
    shown, views, count = images[:, 0], images[:, 1:], len(images)
    here, away = Personalizer(settings), Personalizer(there)
    old, new = here.base, away.base
    mapper = Mapper.load(find(given.xadapter), old, new) if given.xadapter else None
    prompts = [old.config.instance_prompt] * settings.images + settings.changed
    noises = list(range(len(prompts)))

    pictures = {"base": draw(old, None, count, prompts, noises), "to": draw(new, None, count, prompts, noises)}
    subspace = how.subspace or narrowest(Layout.of(old.targets()))
    layers, seconds = {}, {}

    def show(row: str, base: Base, changes: Changes) -> None:
        began = time.perf_counter()
        pictures[row] = draw(base, changes, count, prompts, noises)
        seconds[row] = round((time.perf_counter() - began) / count, 3)

    for row in settings.rows:
        print(f"{row}, {count} people", flush=True)
        changes = personalised(settings, here, shown, row)
        show(row, old, changes)
        show(f"{row}-untouched", new, changes)
        sites = [{n: Site(n, m) for n, m in base.sites(changes).items()} for base in (old, new)]
        moved, layers[row] = transferred(changes, *sites, subspace, how)
        show(f"{row}-transferred", new, moved)
        if mapper is not None:
            began = time.perf_counter()
            pictures[f"{row}-steered"] = steered(old, new, mapper, changes, prompts, noises)
            seconds[f"{row}-steered"] = round((time.perf_counter() - began) / count, 3)
        instead = FITTED.get(row, row)
        if settings.methods[instead].start is None:
            show(f"{row}-fitted", new, personalised(settings, away, shown, instead))

    standard = Standard([SFace()], None, shown[:, None], views, [], {}, [None] * len(settings.changed))
    scores = {
        row: {name: values.double().numpy().round(6)[:, None] for name, values in score.items()}
        for row, score in standard.measure(pictures).items()
    }
    pairs = {
        f"{row}-transferred": [f"{row}-untouched", f"{row}-fitted", f"{row}-steered", row] for row in settings.rows
    }
    against = {row: [other for other in others if other in scores] for row, others in pairs.items()}
    result = {
        "rows": {row: summary(score, 0) | {"seconds": seconds.get(row, 0.0)} for row, score in scores.items()},
        "paired": {
            figure: {
                f"{row} − {other}": differences({"a": scores[row], "b": scores[other]}, {"a": ["b"]}, figure, 0)["a-b"]
                for row, others in against.items()
                for other in others
            }
            for figure in ("cosine", "cosine_changed")
        },
        "layers": layers,
        "people": count,
        "split": settings.split,
        "images_a_person": settings.images,
        "changed": settings.changed,
        "bases": {"old": old.digest, "new": new.digest},
        "data": people.digest,
        **provenance(),
        "values": {row: {name: v.T.tolist() for name, v in score.items()} for row, score in scores.items()},  # [1, I]
    }
    save_json(given.out, result)
    for row, score in result["rows"].items():
        changed = score["cosine_changed"]["mean"]
        print(f"{row:26s} face cosine {score['cosine']['mean']:.3f}, changed prompt {changed:.3f}")
    print(f"results in {given.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
