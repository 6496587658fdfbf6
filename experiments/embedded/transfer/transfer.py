"""What of an adapter is left on another version of its base: as it is, transferred, steering it, or fitted there.

    python experiments/embedded/transfer/transfer.py --to FOLDER [--xadapter FOLDER] [--subspace N] [--out FOLDER]

Each of the methods personalises people on the base `diffusion`. Rows: METHOD, its pictures there; and on the base in
--to METHOD_untouched, the same changes; METHOD_transferred, what `hyperdb transfer` makes of them; METHOD_steered, the
old base with them in it steers the new one (`hyperdb train_xadapter`); METHOD_fitted, fitted on the new one. The
hypernetwork is of the old base: beside its rows stand those fitted without it. `old` and `new` are the bases alone.
Further words are settings of `hyperdb evaluate experiment=methods`, whose people, prompts, judges and columns these
are. Pictures are kept in --out, so that the same command goes on where it was stopped. Writes results.json there, which
`hyperdb report` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hyperdb import config
from hyperdb.adapters import TokenConfig
from hyperdb.adapters.base import Changes, both, identities_of, select
from hyperdb.adapters.inject import Injection, settled
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.adapters.svdiff import narrowest
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.quantise import stored
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.diffusion.xadapter import Mapper, XAdapter, find
from hyperdb.metrics.figures import differences, summary
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import hash_files, load_made, save_json, save_tensors
from hyperdb.runtime.output import claim
from hyperdb.runtime.provenance import provenance
from hyperdb.runtime.recipe import recipe
from hyperdb.stages import transfer
from hyperdb.stages.evaluate import FACES, FURTHER, Config, Panel
from hyperdb.tuning.draw import draw, together
from hyperdb.tuning.methods import Cohort, seconds_now
from hyperdb.tuning.personalizer import Personalizer
from hyperdb.tuning.prior import load_prior
from hyperdb.tuning.trainable import numbers

ROWS = "rows=[hyper_only,hyper_40,lidb_fit,lora,lorax]"
WORDS = ["experiment=methods", "people=10", "seeds=1", ROWS]
FITTED = {"hyper_40": "no_hyper_40", "hyper_only": "lidb_fit"}  # what stands for a row without the hypernetwork
HOW = {
    "": "on its own base",
    "untouched": "as it is on the new base",
    "transferred": "transferred",
    "steered": "its base steers the new one",
    "fitted": "fitted on the new base",
}


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
    noise, most, found = start_noise(new, seeds), together(new.config.size), []
    passes = [slice(first, first + most) for first in range(0, len(prompts), most)]
    try:
        for person in range(identities_of(changes)):
            one = settled(select(changes, [person]), injection.sites)
            injection.set(one, repeat=guide.adapted, plain=guide.plain)
            drawn = [sample(new, prompts[some], noise[some], subject_guidance=guide.subject) for some in passes]
            found.append(torch.cat([new.decode(latents) for latents in drawn]))
    finally:
        injection.remove()
        steering.remove()
    return torch.stack(found)


WRITES = ("rows/*.safetensors", "prior-*.safetensors", FACES, "results.json")


class Study:
    """Two bases, the same people on both, and the pictures of each row, kept in a folder."""

    def __init__(self, settings: Config, given: argparse.Namespace) -> None:
        self.settings = settings
        for row in settings.rows:
            method = settings.methods.get(row)
            if method is None or not (method.trains or method.start) or method.photos or method.strength != 1:
                raise UserError(f"rows={row}: expected ways to personalise by one photo, each at its own strength")
            if isinstance(method.adapter, TokenConfig):
                raise UserError(f"rows={row} trains a word, and nothing of a word is projected; leave it out")
        there = replace(settings, diffusion=replace(settings.diffusion, path=given.to), hypernet=None, rows=["floor"])
        subspace = "null" if given.subspace is None else given.subspace
        self.how = config.load("transfer", [f"to={given.to}", "adapter=none", f"subspace={subspace}"])
        self.panel = Panel.gather(settings)
        self.photos = self.panel.shown[:, 0]
        self.here, self.away = Personalizer(settings), Personalizer(there)
        self.old, self.new = self.here.base, self.away.base
        self.mapper = Mapper.load(find(given.xadapter), self.old, self.new) if given.xadapter else None
        narrow = narrowest(Layout.of(self.old.targets()))
        self.subspace = narrow if self.how.subspace is None else self.how.subspace
        self.prompts = self.panel.prompts(self.old.config.instance_prompt)
        self.noises = list(range(len(self.prompts)))
        own = ("out", "rows", "methods", "judges", "recognisers")
        told = {key: value for key, value in recipe(settings).items() if key not in own}
        told |= {"bases": [self.old.digest, self.new.digest], "data": self.panel.people.digest}
        self.out, self.shared = claim(given.out, WRITES, told), told
        self.alone = {
            "transferred": str(self.subspace),
            "steered": hash_files([find(given.xadapter)]) if given.xadapter else "",
        }
        self.pictures: dict[str, Tensor] = {}
        self.told: dict[str, dict[str, Any]] = {}

    def prior(self, model: Personalizer, row: str) -> None:
        """Make the class pictures of a base, if a row learns from them."""
        fit = self.settings.fit(row)
        if model.prior is None and fit is not None and fit.prior_weight > 0:
            file = self.out / f"prior-{model.base.digest}.safetensors"
            model.prior = load_prior(model.base, self.settings.prior, file)

    def made_from(self, row: str) -> str:
        """Return 16 hex digits over all that decides a row's pictures."""
        method, way = self.parts(row)
        model = self.away if way == "fitted" else self.here
        how = self.panel.described(model, method) if method in self.settings.methods else None
        told = json.dumps([self.shared, row, how, self.alone.get(way)], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def parts(self, row: str) -> tuple[str, str]:
        """Return the method of a row and what became of it."""
        method, _, way = row.rpartition("_")
        return (method, way) if way in HOW and method else (row, "")

    def fitted(self, row: str) -> str:
        """Return the row that is fitted on the new base, to compare with what became of a row."""
        return f"{FITTED.get(row, row)}_fitted"

    def has(self, row: str) -> bool:
        """Take a row's pictures from the folder, if they are there."""
        made = load_made(self.out / "rows" / f"{row}.safetensors")
        if made is None or made[1].get("made_from") != self.made_from(row):
            return False
        self.pictures[row], self.told[row] = made[0]["images"], json.loads(made[1]["told"])
        return True

    def keep(self, row: str, make: Callable[[], Tensor], **told: Any) -> None:
        """Draw a row's pictures, unless they are there, and keep them with what is told of it."""
        if self.has(row):
            return
        began = seconds_now(self.new)
        images = make()
        told["drawing_seconds"] = round((seconds_now(self.new) - began) / len(images), 3)
        file = self.out / "rows" / f"{row}.safetensors"
        save_tensors(file, {"images": images}, {"made_from": self.made_from(row), "told": json.dumps(told)})
        self.pictures[row], self.told[row] = images, told

    def costs(self, model: Personalizer, row: str) -> dict[str, float]:
        """Return how many numbers of one person a method trains, and their bytes in fp32 with those of its start."""
        cohort, method = Cohort(model, self.photos[:, None], self.settings.batch), self.settings.methods[row]
        trained = 0 if (adapter := cohort.adapter(method)) is None else numbers(adapter)
        begun = 0 if method.start is None else numbers(model.lidb)
        return {"trained": float(trained), "bytes": 4.0 * (trained + begun)}

    def show(self, row: str, base: Base, changes: Changes | None, **told: Any) -> None:
        """Keep the pictures that a base draws with changes."""
        people = len(self.photos)
        self.keep(row, lambda: draw(base, changes, people, self.prompts, self.noises), **told)

    def method(self, row: str) -> None:
        """Keep the pictures of a method on its own base, and of all that can become of it on the new one."""
        ways = ["untouched", "transferred", *(["steered"] if self.mapper is not None else [])]
        if not all(self.has(name) for name in (row, *(f"{row}_{way}" for way in ways))):
            self.prior(self.here, row)
            began = seconds_now(self.old)
            changes = personalised(self.settings, self.here, self.photos, row)
            seconds = round((seconds_now(self.old) - began) / len(self.photos), 3)
            costs = {"seconds": seconds, **self.costs(self.here, row)}
            self.show(row, self.old, changes, **costs)
            self.show(f"{row}_untouched", self.new, changes, **costs)
            sites = [{n: Site(n, m) for n, m in base.sites(changes).items()} for base in (self.old, self.new)]
            moved, layers = transferred(changes, *sites, self.subspace, self.how)
            size = 4.0 * sum(x.numel() for change in moved.values() for x in change) / len(self.photos)
            self.show(f"{row}_transferred", self.new, moved, layers=layers, **{**costs, "bytes": size})
            if self.mapper is not None:
                everything = (self.old, self.new, self.mapper, changes, self.prompts, self.noises)
                self.keep(f"{row}_steered", lambda: steered(*everything), **costs)
        name = self.fitted(row)
        instead, _ = self.parts(name)
        if self.settings.methods[instead].start is None and not self.has(name):
            self.prior(self.away, instead)
            began = seconds_now(self.new)
            changes = personalised(self.settings, self.away, self.photos, instead)
            seconds = round((seconds_now(self.new) - began) / len(self.photos), 3)
            self.show(name, self.new, changes, seconds=seconds, **self.costs(self.away, instead))

    def in_memory(self, row: str) -> int:
        """Return the bytes of the networks that draw a row, without the autoencoder."""
        old, new = (stored(base.unet) + stored(base.text_encoder) for base in (self.old, self.new))
        if self.parts(row)[1] == "steered" and self.mapper is not None:
            return old + new + stored(self.mapper)
        return old if row == "old" or row in self.settings.rows else new

    def results(self) -> dict[str, Any]:
        """Return what is measured of all rows, as `hyperdb evaluate` writes it."""
        standard, judges = self.panel.standard(self.new, self.out, dict.fromkeys(self.pictures, 1))
        scores = {
            row: {name: values.double().numpy().round(6)[:, None] for name, values in score.items()}
            for row, score in standard.measure(self.pictures).items()
        }
        against = {
            f"{row}_transferred": [
                other for other in (row, f"{row}_untouched", f"{row}_steered", self.fitted(row)) if other in scores
            ]
            for row in self.settings.rows
        }
        figures = ["cosine", *(name for name in FURTHER if any(name in score for score in scores.values()))]
        paired = {figure: differences(scores, against, figure, 0) for figure in figures}
        rows, layers = {}, {}
        for row, score in scores.items():
            told = dict(self.told[row])
            layers[row] = told.pop("layers", None)
            told["base_bytes"] = self.in_memory(row)
            rows[row] = {"label": self.label(row), "people": len(self.photos), **summary(score, 0), **told}
        return {
            "rows": rows,
            "paired": paired.pop("cosine"),
            "paired_further": paired,
            "layers": {row: found for row, found in layers.items() if found is not None},
            "subspace": self.subspace,
            "people": len(self.photos),
            "seeds": 1,
            "split": self.settings.split,
            "images_a_person": self.settings.images,
            "styled": self.settings.styled,
            "changed": self.settings.changed,
            "persons": self.panel.persons,
            "base": self.old.digest,
            "to": self.new.digest,
            "data": self.panel.people.digest,
            "recognisers": self.settings.recognisers,
            "judges": judges,
            **provenance(),
            "values": {row: {name: v.T.tolist() for name, v in score.items()} for row, score in scores.items()},
        }

    def label(self, row: str) -> str:
        """Return what people read of a row."""
        if row in ("old", "new"):
            return f"the {row} base without adapter"
        method, way = self.parts(row)
        fit = self.settings.fit(method)
        return f"{self.settings.methods[method].text(fit.steps if fit is not None else 0)}, {HOW[way]}"


def main(arguments: list[str]) -> None:
    """Personalise, move, draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True)
    parser.add_argument("--xadapter")
    parser.add_argument("--subspace", type=int, help="singular vectors of a weight that a change may lie in")
    parser.add_argument("--out", default="runs/transfer_study")
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    study = Study(config.load("evaluate", [*WORDS, *given.words]), given)
    study.show("old", study.old, None)
    study.show("new", study.new, None)
    for row in study.settings.rows:
        print(f"{row}, {len(study.photos)} people", flush=True)
        study.method(row)
    found = study.results()
    file = save_json(study.out / "results.json", found)
    for row, score in found["rows"].items():
        changed = score["cosine_changed"]["mean"]
        print(f"{row:24s} face cosine {score['cosine']['mean']:.3f}, changed prompts {changed:.3f}")
    print(f"results in {file}")


if __name__ == "__main__":
    run_script(main)
