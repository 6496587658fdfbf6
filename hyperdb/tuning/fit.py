"""The one trainer of adapters on images: per-identity fits and the fast fine-tuning (paper sections 4.2, 4.3)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import PLACEHOLDER, check_logit_normal
from hyperdb.runtime.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.base import Adapter, Changes
    from hyperdb.diffusion.base import Base
    from hyperdb.tuning.cutmix import Scenes
    from hyperdb.tuning.prior import Prior


TOO_LARGE = 1e4  # an adapter's numbers are of the size of weights and of their norms
MOMENTUM = 0.7  # of gradient descent: fits of few steps with many rows need little smoothing


@dataclass(kw_only=True)
class FitConfig:
    """How an adapter is trained on a person's images.

    Each step denoises the images at `levels` noise levels under the `instance_prompt` and takes one step of the
    `optimizer`. The levels are spread evenly over the range `noise`, which is given in fractions of the base's
    schedule: 0 is the clean image and 1 pure noise. With `logit_normal` there are more of them in the middle of that
    range. The highest levels decide pose and backdrop. Whoever learns from them copies those of the photo.

    AdamW moves every number equally far, whether its gradient says something of the person or is noise. With
    `optimizer=sgd` a step goes along the gradient, which is only scaled to one length a layer. What is fitted so can
    be predicted from another photo of the person, and what AdamW fits cannot.

    A `prior_weight` above 0 keeps what the base knows, as DreamBooth's class pictures do. Each step then holds
    `prior_rows` class pictures more, at noise levels from the whole range. For them the adapted network is asked to
    predict what the base predicts without the adapter.

    `signal_weight` decides how much each noise level counts. A number p weights the squared error of v by alpha_bar^p,
    whatever the base predicts. With 0.5 all noise levels have a gradient of about the same length, and 1 is the error
    of epsilon. null leaves the base's own loss as it is.

    With `flips` the photos' mirror images are learned from too. A mirrored person is that person still, but turned the
    other way: where the person looks is learned less.

    A `masked_prior` above 0 keeps the backdrop the base's (masked prior preservation): outside of a circle of that
    radius in the middle of the frame, whose half side is 1, the target is what the base predicts without the adapter.
    So the adapter learns the face of the photo and not what is behind it. Each step has a pass of the base more.

    With `merge`, what one person alone trains is added to the weights of the network, not to what its layers make. That
    is the same change, quicker where the layers are small and slower where they are large.
    """

    steps: int
    levels: int  # noise levels in each step
    instance_prompt: str | None = None  # that the images are denoised under, with [V]; null: "a [V] face"
    noise: list[float] = field(default_factory=lambda: [0.0, 1.0])  # lowest and highest level to learn from
    logit_normal: list[float] | None = None  # mean and standard deviation of the logit of the level; null: uniform
    optimizer: str = "adamw"
    rate: float  # learning rate
    # Adam's first steps are as long for noise as for a face. A slow rise of the rate makes them shorter.
    warmup: int = 0  # steps over which the rate rises from 0
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls as a cosine
    signal_weight: float | None = None
    face_weight: float = 0.0  # extra weight of the middle of the frame, where the aligned crop has the face
    prior_weight: float = 0.0
    prior_rows: int = 2  # class pictures in each step
    flips: bool = False
    masked_prior: float = 0.0  # radius of what is learned from; 0: the whole frame
    merge: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.levels < 1 or self.rate <= 0:
            raise UserError("steps and levels must be at least 1 and rate above 0")
        if self.prior_weight > 0 and self.prior_rows < 1:
            raise UserError(f"prior_weight={self.prior_weight:g} needs prior_rows of at least 1")
        if self.warmup < 0:
            raise UserError(f"warmup={self.warmup}: expected at least 0 steps")
        if len(self.noise) != 2 or not 0 <= self.noise[0] < self.noise[1] <= 1:
            raise UserError(f"noise={self.noise}: expected [low, high] with 0 <= low < high <= 1")
        if self.masked_prior < 0:
            raise UserError(f"masked_prior={self.masked_prior:g}: expected a radius, at least 0")
        check_logit_normal(self.logit_normal)
        if self.instance_prompt is not None and PLACEHOLDER not in self.instance_prompt:
            raise UserError(f"instance_prompt={self.instance_prompt!r}: expected a prompt with {PLACEHOLDER}")
        if self.optimizer not in ("adamw", "sgd"):
            raise UserError(f"optimizer={self.optimizer!r}: expected adamw or sgd")

    def told(self) -> dict[str, Any]:
        """Return the settings as records of runs have them: one that came later is left out where it is not set."""
        found = asdict(self)
        return {key: value for key, value in found.items() if key != "instance_prompt" or value is not None}

    def sides(self, photos: Tensor) -> Tensor:
        """Return what photos `[..., V, 3, H, W]` teach: themselves, or with `flips` `[..., 2 V, 3, H, W]`."""
        import torch

        return torch.cat([photos, photos.flip(-1)], -4) if self.flips else photos


@dataclass
class Begin:
    """Where each person's training begins instead of at the adapter's own start, and how far its numbers move.

    `params` holds parameters `[I, ...]`. `gain` holds, in the shape of one person's parameters, what their gradients
    are multiplied by before the optimizer sees them; 0 leaves a number where it begins.
    """

    params: dict[str, Tensor]
    gain: dict[str, Tensor]


def fit(
    base: Base,
    adapter: Adapter,
    moments: Tensor,
    config: FitConfig,
    frozen: Changes | None = None,
    prior: Prior | None = None,
    progress: Callable[[int, float], None] | None = None,
    begin: Begin | None = None,
    scenes: Scenes | None = None,
) -> dict[str, Tensor]:
    """Train one adapter for each of I people in the same passes; return its parameters `[I, ...]`.

    `moments [I, K, 2, c, h, w]` are the latents of K views of each. Everyone sees the same stream of (noise level,
    noise, view) and, unless `begin` says otherwise, starts from the same parameters: the result is a function of the
    images. `frozen` changes are added to the trained ones. Errors are summed over people, so nobody's result depends
    on the others. `scenes` says of a single one's views what each shows, where that is not the person alone.
    """
    import torch

    from hyperdb.adapters.base import both
    from hyperdb.adapters.inject import Injection, Merging
    from hyperdb.diffusion.base import DTYPES
    from hyperdb.diffusion.loss import (
        bad_levels,
        face_focus,
        face_mask,
        predict,
        signal_weight,
        stratified_timesteps,
        target,
    )
    from hyperdb.runtime.optim import Schedule, adamw, set_rate
    from hyperdb.runtime.seed import generator

    people, views = moments.shape[:2]
    if scenes is not None and people > 1:
        raise ValueError("scenes are of one adapter alone")
    guarded = config.prior_weight > 0
    if guarded and prior is None:
        raise ValueError("prior_weight > 0 needs a prior")
    words = config.instance_prompt or base.config.instance_prompt
    if not base.says_person(words):
        raise UserError(f"instance_prompt={words!r}: [V] is cut off, for the base reads fewer words; shorten it")
    if adapter.places > 1 and (cut := base.unseen(words, adapter.places)):
        raise UserError(
            f"adapter.vectors={adapter.places}: the base reads {base.tokenizer.model_max_length} tokens, and {words!r} "
            f"has no room for {cut!r} beside so many; set fewer"
        )
    instance = base.tokenize([base.config.prompt(words)])
    moments = moments.float().to(base.device)
    adapter = adapter.to(base.device)
    injection = Injection(base.sites({*(frozen or ()), *adapter.layout.names}))
    merging = Merging(injection, frozen, DTYPES[base.config.dtype]) if config.merge and people == 1 else None
    first = adapter.init(people, injection.sites) if begin is None else begin.params
    leaves = {k: torch.nn.Parameter(v.to(base.device).clone()) for k, v in first.items()}
    gain = {k: v.to(base.device) for k, v in begin.gain.items()} if begin is not None else {}
    params: dict[str, Tensor] = dict(leaves)
    by_rate: dict[float, list[torch.nn.Parameter]] = {}
    for name, leaf in leaves.items():
        by_rate.setdefault(config.rate * adapter.rate(name), []).append(leaf)
    (rate, some), *others = by_rate.items()
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(some, rate, MOMENTUM, dampening=MOMENTUM)
    else:
        optimizer = adamw(some, rate)
    for rate, some in others:
        optimizer.add_param_group({"params": some, "lr": rate})
    schedule = Schedule(config.steps, config.warmup, config.decay)
    # gradients of a float16 network would fall under its smallest number: they are scaled up, and back before the step
    scaler = torch.amp.GradScaler(base.device.type, init_scale=2.0**10, enabled=base.config.dtype == "fp16")
    levels, extra = config.levels, config.prior_rows if guarded else 0
    focus = face_focus(config.face_weight, *moments.shape[4:]).to(base.device)
    mask = face_mask(config.masked_prior, *moments.shape[4:]).to(base.device) if config.masked_prior else None
    try:
        for step in range(config.steps):
            # one stream for everyone                                               shapes without the identity axis
            g = generator(config.seed, "fit", step)
            length = base.schedule.config.num_train_timesteps
            t = stratified_timesteps(1, levels, length, g, config.logit_normal, config.noise)[0]
            t = t.to(base.device)
            if scenes is None:
                view = torch.randint(0, views, (levels,), generator=g)
            else:
                view = torch.multinomial(scenes.odds, levels, replacement=True, generator=g)
            jitter, noise = (torch.randn((levels, *moments.shape[3:]), generator=g).to(base.device) for _ in "zn")
            z = moments[:, view, 0] + moments[:, view, 1] * jitter  #               [I, S, c, h, w]
            wanted = target(base.schedule, z.flatten(0, 1), *_tile(people, noise, t)).unflatten(0, (people, levels))
            ids = instance.expand(levels, -1) if scenes is None else scenes.ids[view]
            if mask is not None:
                with torch.no_grad():
                    bare = predict(base, z.flatten(0, 1), *_tile(people, noise, t, ids)).unflatten(0, (people, levels))
                wanted = torch.lerp(bare, wanted, mask)
            if prior is not None and guarded:
                pz, pnoise, pt, pids, own = prior.rows(extra, config.seed, step)
                z = torch.cat([z, pz.expand(people, *pz.shape)], 1)
                wanted = torch.cat([wanted, own.expand(people, *own.shape)], 1)
                noise, t, ids = torch.cat([noise, pnoise]), torch.cat([t, pt]), torch.cat([ids, pids])
            optimizer.zero_grad()  # before the pass, whose memory they would add to
            changes = adapter.changes(params)
            # in use until the backward pass has ended: checkpointing computes with it again
            using = injection.using(both(frozen, changes)) if merging is None else merging.using(changes)
            with using, nullcontext() if scenes is None else scenes.watching():
                out = predict(base, z.flatten(0, 1), *_tile(people, noise, t, ids))
                square = (out.unflatten(0, (people, levels + extra)) - wanted).square()  #  [I, S + P, c, h, w]
                square = torch.cat([square[:, :levels] * focus, square[:, levels:]], 1)
                error = square.flatten(2).mean(2)  #                                      [I, S + P]
                weighted = signal_weight(base.schedule, t, config.signal_weight) * error
                loss = weighted[:, :levels].mean(1).sum()
                if guarded:
                    loss = loss + config.prior_weight * weighted[:, levels:].mean(1).sum()
                if scenes is not None:
                    loss = loss + scenes.penalty(view)
                if not torch.isfinite(loss):
                    at = bad_levels(base.schedule, error, t)
                    raise NonFiniteError(
                        f"adapters of {people}{at}: the loss is {loss.item()} at step {step}; "
                        f"lower the rate ({config.rate})"
                    )
                set_rate(optimizer, schedule(step))
                scaler.scale(loss).backward()
            for name, factor in gain.items():
                leaves[name].grad.mul_(factor)  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
            if progress is not None:
                progress(step + 1, error[:, :levels].mean().item())
    finally:
        injection.remove()
    found = {k: v.detach() for k, v in params.items()}
    largest = torch.stack([x.abs().max() for x in found.values()]).max().item()  # NaN if there is one
    if not largest < TOO_LARGE:
        raise NonFiniteError(f"what was trained holds numbers of {largest:.3g}: lower the rate ({config.rate})")
    return found


def _tile(people: int, *rows: Tensor) -> list[Tensor]:
    """Repeat rows `[S, ...]` for each of the people, identity-major, `[I * S, ...]`."""
    return [r.expand(people, *r.shape).flatten(0, 1) for r in rows]
