"""The relaxed factors act only at the noise levels that they were trained on (see README.md).

    python experiments/embedded/base64/guidance/gate.py data/heads_validation recognisers=[sface]

Above `limit`, a fraction of the noise levels, the picture is drawn by the own prediction alone or by the base alone.
Below it by all of the adapter, as ever. Hybrid guidance (3, 3). Writes gate.json; settings that are done are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch

from hyperdb.adapters.base import select
from hyperdb.adapters.inject import Injection
from hyperdb.diffusion.sample import SCHEDULERS, start_noise
from hyperdb.metrics.score import bootstrap, paired
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.draw import together

WAYS = (
    measure.Way("40 of 0-0.65", tuning={"noise": [0.0, 0.65]}),
    measure.Way(
        "60 of 0-0.65, 3 levels and 1 of the prior",
        tuning={"noise": [0.0, 0.65], "steps": 60, "levels": 3, "prior_rows": 1},
    ),
)
ABOVE = ((1.0, "base"), (0.65, "prediction"), (0.65, "base"), (0.8, "prediction"), (0.8, "base"))


@torch.no_grad()
def draw(base: Any, low: Any, high: Any, limit: float, people: int, prompts: list[str], seeds: list[int]) -> Any:
    """Return images `[I, K, 3, H, W]`, drawn with the changes `low` up to a noise level of `limit`, `high` above it."""
    injection, guide = Injection(base.sites(low)), base.config.guide(True)
    group, found = max(1, together(base.config.size) // len(prompts)), []
    for first in range(0, people, group):
        count = min(group, people - first)
        part = slice(first, first + count)
        own = {"low": select(low, part), "high": select(high, part) if high else {}}
        texts = prompts * count
        words = {"u": [""] * len(texts), "b": [base.config.plain_prompt(p) for p in texts], "p": texts}
        ids = {k: base.tokenize(v) for k, v in words.items()}

        def text(block: str, changes: Any, ids: Any = ids) -> Any:
            with base.autocast(), injection.using(changes):
                return base.text_encoder(ids[block])[0]

        u, b = text("u", {}), text("b", {})
        persons = {k: (changes, text("p", changes)) for k, changes in own.items()}
        solver = SCHEDULERS["ddim"].from_config(base.schedule.config)
        solver.set_timesteps(base.config.steps)
        z = start_noise(base, seeds).repeat(count, 1, 1, 1) * solver.init_noise_sigma
        for t in solver.timesteps:
            changes, context = persons["high" if (t + 1) / base.schedule.config.num_train_timesteps > limit else "low"]

            def predict(context: Any, changes: Any, z: Any = z, t: Any = t) -> Any:
                with base.autocast(), injection.using(changes):
                    return base.unet(z, t, context).sample.float()

            plain = predict(b, {})
            e = predict(u, {})
            e = e + guide.text * (plain - e)
            if changes:
                e = e + guide.subject * (predict(context, changes) - plain)
            z = solver.step(e, t, z, return_dict=False)[0]
        found.append(base.decode(z).unflatten(0, (count, len(prompts))))
    injection.remove()
    return torch.cat(found)


@contextmanager
def gated(limit: float, high: Any) -> Iterator[None]:
    """Have the study draw by `draw` above."""
    before = measure.draw
    measure.draw = lambda base, low, people, prompts, seeds: draw(base, low, high, limit, people, prompts, seeds)
    try:
        yield
    finally:
        measure.draw = before


def main() -> None:
    """Draw and judge every way, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("words", nargs="*", help="key=value of `hyperdb evaluate`")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--runs", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--only", default="", help="only ways whose name has this in it")
    given = parser.parse_intermixed_args()
    studio = measure.Studio(given.data, given.people, given.runs, given.people, 1, given.words)
    prediction, found = studio.start("own"), {}
    for way in WAYS:
        for limit, above in ABOVE:
            name = f"{way.name}, {'everywhere' if limit == 1 else f'{above} above {limit:g}'}"
            path = given.runs / "gate" / f"{name.replace(' ', '_')}_{studio.key}.json"
            if given.only in name and not path.is_file():
                setting = measure.Setting("gate", way, (3.0, 3.0))
                done = studio.path(setting)
                done.unlink(missing_ok=True)
                with gated(limit, prediction if above == "prediction" else None):
                    studio.run(setting)
                path.parent.mkdir(parents=True, exist_ok=True)
                done.rename(path)
            if path.is_file():
                found[name] = load_json(path)["values"]
    rows = {}
    for name, values in found.items():
        rows[name] = {k: bootstrap(v, seed=0) for k, v in values.items()}
        if (whole := found.get(f"{name.rpartition(', ')[0]}, everywhere")) is not None and whole is not values:
            rows[name]["against_everywhere"] = {k: paired(values[k], whole[k], seed=0) for k in values}
    save_json(Path(__file__).with_name("gate.json"), {"rows": rows, **studio.digests, **provenance()})


if __name__ == "__main__":
    main()
