"""What the method costs over the bare model: one iteration of the fast fine-tuning against the same networks alone.

    python benchmarks/iteration.py [diffusion=sd15 diffusion.path=FOLDER] [repeats=9]

The iteration is `hyperdb.tuning.fit.fit`'s own: text encoder and UNet forward and backward with the predicted LiDB
factors, the relaxed ones trained, optimiser step included. The bare pass: the same rows through the same frozen
networks, forward, and backward to the latents and the token embeddings, no adapter. They take turns in one process, and
what counts is the ratio of the medians.

It is measured twice. `adapter alone` is without the masked prior, whose target is one more forward pass of the base in
each iteration: this is what the adapter costs, and what the aim concerns. `as_shipped` is the recipe of the base with
the words given here. Where the recipe has no masked prior, both are one measurement. Both go to iteration_NAME.json
beside this file, NAME the base's configuration.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import torch

from hyperdb import config
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.loss import predict
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import save_json
from hyperdb.runtime.precision import cpu_has_bf16
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.fit import fit
from hyperdb.tuning.methods import seconds_now

AIMS = {"embedded": 1.15, "sd15": 1.04}  # at most, of the bare networks' time
WARM = 3  # turns before the first that counts: until then the C library's heap still grows


def against_bare(base: Base, words: list[str], repeats: int) -> dict[str, Any]:
    """Take turns, print each, and return medians and ratios."""
    settings = config.load("personalize", ["image=none", *words])
    tuning = settings.finetune
    if tuning.prior_weight > 0:
        raise UserError(f"finetune.prior_weight={tuning.prior_weight:g}: class pictures are not measured here; set 0")
    tuning.steps = repeats + WARM
    layout = Layout.of(base.targets())
    lidb = settings.adapter.build(layout).to(base.device)
    frozen = lidb.factors({"tokens": lidb.template[None] + 0.02})
    rows = tuning.levels
    ids = base.tokenize([base.config.instance_prompt] * rows)
    t = torch.linspace(100, 900, rows, device=base.device).long()
    latents, noise = torch.randn(2, rows, *base.latent_shape).to(base.device)
    seconds: dict[str, list[float]] = {"iteration": [], "bare": []}
    embedding = base.text_encoder.get_input_embeddings()

    clock = seconds_now(base)

    def bare(step: int, _: float) -> None:
        nonlocal clock
        seconds["iteration"].append(seconds_now(base) - clock)
        began = seconds_now(base)
        reach = embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        z = latents.clone().requires_grad_()
        predict(base, z, noise, t, ids).square().mean().backward()
        reach.remove()
        seconds["bare"].append(seconds_now(base) - began)
        print(f"{step:3d}  iteration {seconds['iteration'][-1]:.3f} s  bare {seconds['bare'][-1]:.3f} s", flush=True)
        clock = seconds_now(base)

    first = latents[None, :1]
    moments = torch.stack([first, torch.zeros_like(first)], 2)  #                   [1, 1, 2, c, h, w]
    fit(base, settings.relaxed.build(layout), moments, tuning, frozen, None, bare)
    medians = {key: statistics.median(times[WARM:]) for key, times in seconds.items()}
    pairs = [a / b for a, b in zip(*(times[WARM:] for times in seconds.values()), strict=True)]
    return {
        "words": words, "rows": rows, "masked_prior": tuning.masked_prior, "merge": tuning.merge,
        "median_seconds": {k: round(v, 4) for k, v in medians.items()},
        "ratio_of_medians": round(medians["iteration"] / medians["bare"], 3),
        "ratios": [round(r, 3) for r in sorted(pairs)],
    }  # fmt: skip


def measure(words: list[str]) -> dict[str, Any]:
    """Measure the adapter alone, which has the names at the top, and what is shipped."""
    repeats = int(next((w.partition("=")[2] for w in words if w.startswith("repeats=")), "9"))
    words = [w for w in words if not w.startswith("repeats=")]
    name = next((w.partition("=")[2] for w in words if w.startswith("diffusion=")), "embedded")
    settings = config.load("personalize", ["image=none", *words])
    base = settings.diffusion.load()
    result = {"base": name, "measured": "adapter alone", "size": base.config.size, "dtype": base.config.dtype}
    result |= {"cpu_has_bf16": cpu_has_bf16(), "cores": os.cpu_count(), "repeats": repeats}
    result |= against_bare(base, [*words, "finetune.masked_prior=0"], repeats)
    ratio = result["ratio_of_medians"]
    result |= {"aim": AIMS.get(name), "within": ratio <= AIMS.get(name, ratio)}
    if settings.finetune.masked_prior > 0:
        result["as_shipped"] = against_bare(base, words, repeats)
    else:
        result["as_shipped"] = {"words": words, "masked_prior": 0.0, "ratio_of_medians": ratio}
    return result | provenance()


def main(words: list[str]) -> None:
    """Measure, print, write."""
    result = measure(words)
    out = save_json(Path(__file__).with_name(f"iteration_{result['base']}.json"), result)
    print(
        f"an iteration takes {result['ratio_of_medians']} of the bare networks' time with the adapter alone, "
        f"{result['as_shipped']['ratio_of_medians']} as shipped; {out}"
    )


if __name__ == "__main__":
    run_script(main)
