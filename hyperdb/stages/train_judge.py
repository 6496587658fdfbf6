"""Train a judge of pictures on rendered people, and measure it on people it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.diffusion import DiffusionConfig
from hyperdb.metrics.objectives import ObjectiveConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.track import Track, check_tracker, tracked

if TYPE_CHECKING:
    from torch import Tensor

WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "judge.safetensors", "judge/*")
KEPT = "its last checkpoint is kept"


@dataclass(kw_only=True)
class Config:
    """What the judge learns, what from, and how it is trained.

    `judge` says what: `prompts` (the default) to name the style and the place of a picture, `clip` which caption
    belongs to it, `vicreg` without labels what two views of it have in common, `verifier` whether pictures in any
    styles are of one person. `hyperdb evaluate judges.clip=FOLDER`, and so on, asks what was trained.

    Half of the pictures go through the autoencoder of the base in `diffusion` first, because every generated picture,
    which a judge is to judge, has come through that too.
    """

    judge: ObjectiveConfig
    diffusion: DiffusionConfig
    data: FilePath = "data/heads"  # rendered people: a folder of `hyperdb render_heads`
    held_out: int = 200  # people kept aside to measure on
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_judge/default"  # folder that is written
    steps: int  # of the optimiser, in all
    batch: int  # pictures in each step
    rate: float  # AdamW's learning rate, after a warm-up of 50 steps and before its decay
    save_every: int = 200  # steps from one checkpoint to the next
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    seed: int = 0  # of the first weights, the batches and the changes of the pictures

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        if self.held_out < self.judge.least:
            raise UserError(f"held_out={self.held_out}: this judge is measured on at least {self.judge.least} people")


@tracked
def run(config: Config, track: Track) -> Path:
    """Write `out/judge.safetensors` or the folder `out/judge`, and `out/report.json` with the held-out figures."""
    import tempfile

    import numpy as np
    import torch

    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.metrics.obedience import SIDE
    from hyperdb.metrics.objectives.objective import reduced
    from hyperdb.metrics.objectives.unseen import measured, split
    from hyperdb.runtime.files import save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.precision import autocast
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import derive, generator

    # --- data
    base = config.diffusion.load()
    people = load_people(config.data, size=config.diffusion.size)
    if "style" not in people.labels or people.identities <= config.held_out:
        raise UserError(f"{config.data} must hold rendered people, more than held_out={config.held_out}")
    moments = latent_moments(base, people)
    seen, held = split(people, config.held_out)

    side = min(SIDE, people.images.shape[-1])
    with tempfile.TemporaryFile() as file:  # which stays as long as it is mapped; there is one of every picture
        through = torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(len(people), 3, side, side)))
    known = torch.zeros(len(people), dtype=torch.bool)

    def rebuilt(rows: Tensor) -> Tensor:
        # a picture is decoded when it is first drawn, and alone: beside others, which change with a resume, it would be
        # rounded otherwise
        for row in rows[~known[rows]].unique().tolist():
            through[row] = reduced(base.decode(moments[row, None, 0].float()))[0].round().byte()
            known[row] = True
        return through[rows].float()

    # --- train
    torch.manual_seed(derive(config.seed, "judge weights"))  # the only way to seed timm's initialisation
    objective = config.judge.objective(people, seen, base).to(base.device).train()

    def backward(step: int) -> dict[str, torch.Tensor]:
        g = generator(config.seed, "judge", step)
        rows = objective.draw(config.batch, g)
        half = len(rows) // 2
        images = torch.cat([rebuilt(rows[:half]), reduced(people.images[rows[half:]])])
        gain = 1 + 0.05 * torch.randn(len(images), 3, 1, 1, generator=g)
        grain = 4 * torch.randn(images.shape, generator=g) * torch.rand(len(images), 1, 1, 1, generator=g)
        with autocast(base.device, torch.float32 if base.device.type == "cpu" else torch.bfloat16):
            found = objective((images * gain + grain).clamp(0, 255).to(base.device), rows, g)
        terms = objective.loss(found, rows)
        torch.stack(list(terms.values())).sum().backward()
        return terms

    out = Path(config.out)
    params = list(objective.parameters())
    optimizer, ema = adamw(params, config.rate, 0.02), EMA(params, 0.99)
    schedule = Schedule(config.steps, warmup=50)
    whole = {**recipe(config), "learned": config.judge.kind, "made_from": [people.digest, base.digest]}
    claim(out, WRITES, whole)
    train("judge", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every, track=track)

    # --- write, read as it will be used, measure on unseen people
    made_from = {"data": people.digest, "base": base.digest}
    judge = objective.save(out, {**made_from, "steps": str(config.steps)})
    found = measured(objective, judge, base, moments, held)
    for what, values in found.items():
        track.log(config.steps, {f"{what}/{name}": value for name, value in values.items()})
    report = {"people_held_out": config.held_out, "pictures_held_out": len(held), **found}
    save_json(out / "report.json", {**report, "steps": config.steps, **made_from, **provenance()})
    print(f"judge in {out}")
    return out
