"""Train an X-Adapter: an old base, with its adapters, steers a new one (Ran et al. 2024, arXiv 2312.02238).

    hyperdb train_base init=hyperdb/embedded/base name=newer
    hyperdb train_xadapter to=runs/train_base/newer/base name=newer
    hyperdb generate diffusion.path=runs/train_base/newer/base xadapter=runs/train_xadapter/newer adapter=FOLDER

`hyperdb transfer` moves an adapter into the new base's weights at once, where the two are alike. This is for where they
are not: it has to be trained once for the two bases, knows no adapter, and serves all of the old base. It costs both
bases in memory and in time, at every picture; `report.json` has the figures. What is left out of the paper's method is
said in `hyperdb.diffusion.xadapter`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.track import Track, check_tracker, tracked
from hyperdb.words import chosen

if TYPE_CHECKING:
    from torch import Tensor

WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "xadapter.safetensors")
KEPT = "its last checkpoint is kept"
HELD = 32  # pictures of the last people, of whom none is trained on, that are measured; of few a quarter


@dataclass(kw_only=True)
class Config:
    """Which bases, on what pictures, and how the mapper between them is trained.

    `diffusion` is the old base, whose adapters are to go on, and `to` the new one: a folder, a hub id or a checkpoint,
    as `diffusion.path`. Each step denoises pictures with the new base, steered by the old one, which reads their
    captions. The new one reads the empty prompt in a share `empty` of the rows, so that what the picture shows has to
    come from the old one; the paper always does that.
    """

    diffusion: DiffusionConfig
    to: FilePath = "???"
    to_variant: str | None = None  # of the new base's files, such as fp16
    to_revision: str | None = None  # of the new base's repository
    data: FilePath = "data/heads"  # people with captions: a folder of `hyperdb render_heads`, or any other of people
    width: int = 128  # channels between the two convolutions of each block's network
    empty: float = 1.0  # share of the rows in which the new base reads the empty prompt, the old one the caption
    prompt_dropout: float = 0.1  # share of the captions that neither reads, for classifier-free guidance
    steps: int = 1000  # of the optimiser, in all
    batch: int = 16  # pictures in each step
    rate: float = 1e-3  # AdamW's learning rate, after the warm-up and before the decay
    warmup: int = 50  # steps over which the rate rises from 0
    decay: float = 0.6  # share of the steps, at the end, over which the rate falls as a cosine
    ema: float = 0.99  # decay of the running average of the weights, which is what is written
    save_every: int = 250  # steps from one checkpoint to the next
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    seed: int = 0  # of the first weights, the batches and the noise
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_xadapter/default"  # folder that is written

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        if not 1 <= self.width <= 4096:
            raise UserError(f"width={self.width}: expected 1 to 4096")
        if self.steps < 1 or self.batch < 1 or self.rate <= 0:
            raise UserError("steps and batch must be at least 1 and rate above 0")
        for name in ("empty", "prompt_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: expected a share, 0 to 1")
        if self.diffusion.dtype == "fp16":
            raise UserError("diffusion.dtype=fp16 loses small gradients; train with bf16")


@tracked
def run(config: Config, track: Track) -> Path:
    """Train from `config.data`; write `xadapter.safetensors` and `report.json` to `out` and return it."""
    import torch

    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.loss import bad_levels, diffusion_loss
    from hyperdb.diffusion.xadapter import FILE, Mapper, XAdapter
    from hyperdb.metrics.objectives.unseen import split
    from hyperdb.runtime.files import save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import generator

    # --- bases, data
    people = load_people(config.data, size=config.diffusion.size)
    to = replace(config.diffusion, path=config.to, variant=config.to_variant, revision=config.to_revision)
    old, new = Base.load(config.diffusion), Base.load(to)
    mapper = Mapper.between(old, new, config.width, config.seed)
    ending = people.identity[-min(HELD, -(-len(people) // 4)) :]
    seen, unseen = split(people, len(ending.unique()))
    unseen = unseen[:HELD]
    if not len(seen):
        raise UserError(f"{config.data} holds one person; a mapper is trained on some people and measured on others")
    whole = {**recipe(config), "held": len(unseen), "made_from": [people.digest, old.digest, new.digest]}
    out = claim(config.out, WRITES, whole)
    latents = latent_moments(new, people)
    ids, empty = new.tokenize(people.captions), new.tokenize([""])
    levels, device = new.schedule.config.num_train_timesteps, new.device

    def rows(g: torch.Generator, index: Tensor) -> tuple[Tensor, ...]:
        """Draw noisy latents of pictures: z, noise, timesteps, what the new base reads, what the old one does."""
        mean, std = latents[index].float().unbind(1)
        jitter, noise = (torch.randn(mean.shape, generator=g) for _ in "zn")
        t = torch.randint(0, levels, (len(index),), generator=g)
        shares = (config.empty, config.prompt_dropout)
        quiet, told = (torch.rand(len(index), 1, generator=g) < share for share in shares)
        said = torch.where(told.to(device), empty, ids[index.to(device)])
        mine = torch.where(quiet.to(device), empty, said)
        return *(x.to(device) for x in (mean + std * jitter, noise, t)), mine, said

    # --- train
    xadapter = XAdapter(old, new, mapper)
    last: list[Tensor] = []  # the error of each row of the last step, and its noise level

    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "xadapter", step)
        z, noise, t, mine, said = rows(g, seen[torch.randint(0, len(seen), (config.batch,), generator=g)])
        with xadapter.saying(said):
            errors = diffusion_loss(new, z, noise, t, mine)
        loss = errors.mean()
        loss.backward()
        last[:] = errors.detach(), t
        return {"diffusion": loss.detach()}

    params = list(mapper.parameters())
    optimizer, ema = adamw(params, config.rate, 1e-2), EMA(params, config.ema)
    schedule = Schedule(config.steps, config.warmup, config.decay)
    train(
        "xadapter", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every, track=track,
        where=lambda: bad_levels(new.schedule, *last),
    )  # fmt: skip

    # --- write; of people not trained on, the new base's loss steered, alone, and alone with the old one's captions
    file = mapper.save(out / FILE, old, new)
    z, noise, t, mine, said = rows(generator(config.seed, "held"), unseen)
    loss, seconds = {}, {}
    for name, reads in (("steered", mine), ("alone", mine), ("told", said)):
        for _ in range(2):  # the first pass of its size takes longer
            began = time.perf_counter()
            with torch.no_grad(), xadapter.saying(said):
                loss[name] = round(diffusion_loss(new, z, noise, t, reads).mean().item(), 5)
            seconds[name] = round(time.perf_counter() - began, 4)
        xadapter.remove()
    track.log(config.steps, {f"held_out/{name}": value for name, value in loss.items()})
    numbers = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("mapper", mapper), ("old_unet", old.unet), ("new_unet", new.unet))
    }
    report = {"old": old.digest, "to": new.digest, "data": people.digest, "steps": config.steps, "numbers": numbers}
    save_json(out / "report.json", {**report, "loss": loss, "seconds_a_pass": seconds, "provenance": provenance()})
    print(
        f"{file}: on people that were not trained on the new base's loss is {loss['steered']:.4f} steered, "
        f"{loss['alone']:.4f} alone and {loss['told']:.4f} alone where it reads what the old one does"
    )
    print(f"both UNets run, in {seconds['steered']:.2f} s a pass; the new one alone in {seconds['alone']:.2f} s")
    print(f"next: hyperdb generate{chosen('diffusion', new.config)} xadapter={config.out} adapter=FOLDER")
    return out
