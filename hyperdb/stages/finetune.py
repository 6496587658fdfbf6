"""The one trainer of adapters on images: per-identity fits and the fast fine-tuning (paper sections 4.2, 4.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.base import Adapter, Factors
    from hyperdb.diffusion.base import Base


@dataclass
class FitConfig:
    """How an adapter is trained on a person's images.

    `levels` noise levels a step, one from each stratum. With `prior_weight` > 0, `prior_rows` further rows a step ask
    that on class prompts the network predict what it predicts without the adapter.
    """

    steps: int = 40
    levels: int = 4
    rate: float = 1e-3
    decay: float = 0.3  # the last fraction of the steps, over which the rate falls
    prior_weight: float = 0.0
    prior_rows: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.levels < 1 or self.rate <= 0:
            raise UserError("steps and levels must be at least 1 and rate above 0")


@dataclass
class PriorConfig:
    """The base's own pictures of class prompts, DreamBooth's class images: what an adapter should leave as it is."""

    prompts: list[str]
    images: int = 64
    seed: int = 0


@dataclass
class Prior:
    """Latents `[M, c, h, w]` and the token ids `[M, L]` of their prompts."""

    latents: Tensor
    ids: Tensor


def load_prior(base: Base, config: PriorConfig, cache: Path, shipped: Path | None = None) -> Prior:
    """Sample the class pictures once and keep them in `cache`; `shipped` ones of the same base and prompts are used."""
    from hyperdb.diffusion.sample import sample, start_noise
    from hyperdb.runtime.files import load_tensors, save_tensors

    key = f"{base.digest} {config.prompts} {config.images} {config.seed}"
    prompts = [config.prompts[i % len(config.prompts)] for i in range(config.images)]
    for path in filter(None, (shipped, cache)):
        if path.is_file():
            tensors, metadata = load_tensors(path)
            if metadata.get("key") == key:
                break
    else:
        noise = start_noise(base, [config.seed + i for i in range(config.images)])
        parts = [
            sample(base, prompts[k : k + 16], noise[k : k + 16]).cpu().half() for k in range(0, config.images, 16)
        ]
        import torch

        tensors = {"latents": torch.cat(parts)}
        save_tensors(cache, tensors, {"key": key})
    return Prior(tensors["latents"].float(), base.tokenize(prompts))


def prior_rows(
    base: Base, prior: Prior, rows: int, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw one step's prior rows: latents, noise, timesteps, ids and the base's own prediction, each `[P, ...]`.

    Call it while no adapter is active.
    """
    import torch

    from hyperdb.diffusion.loss import predict, stratified_timesteps
    from hyperdb.runtime.seed import generator

    g = generator(seed, "prior", step)
    index = torch.randint(0, len(prior.latents), (rows,), generator=g)
    z = prior.latents[index].to(base.device)
    t = stratified_timesteps(1, rows, base.schedule.config.num_train_timesteps, g)[0].to(base.device)
    noise = torch.randn(z.shape, generator=g).to(base.device)
    ids = prior.ids[index]
    with torch.no_grad():
        own = predict(base, z, noise, t, ids)
    return z, noise, t, ids, own


def fit(
    base: Base,
    adapter: Adapter,
    moments: Tensor,
    config: FitConfig,
    frozen: Factors | None = None,
    prior: Prior | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Train one adapter for each of I people in the same passes; return its parameters `[I, ...]`.

    `moments [I, K, 2, c, h, w]` are the latents of K views of each. Everyone starts from the same parameters and sees
    the same stream of (noise level, noise, view): the result is a function of the images. `frozen` factors are added
    under the trained ones. Errors are summed over people, so nobody's result depends on the others.
    """
    import torch

    from hyperdb.adapters.base import concatenate
    from hyperdb.adapters.inject import Injection
    from hyperdb.diffusion.loss import predict, stratified_timesteps, target
    from hyperdb.runtime.journal import NonFiniteError
    from hyperdb.runtime.optim import Schedule, adamw, set_rate
    from hyperdb.runtime.seed import generator

    people, views = moments.shape[:2]
    moments = moments.float().to(base.device)
    adapter = adapter.to(base.device)
    leaves = {k: torch.nn.Parameter(v.clone()) for k, v in adapter.init(people).items()}
    params: dict[str, Tensor] = dict(leaves)
    optimizer = adamw(leaves.values(), config.rate)
    schedule = Schedule(config.steps, decay=config.decay)
    injection = Injection(base.targets())
    instance = base.tokenize([base.config.instance_prompt])
    guarded = prior is not None and config.prior_weight > 0
    levels, extra = config.levels, config.prior_rows if guarded else 0
    try:
        for step in range(config.steps):
            # one stream for everyone                                               shapes without the identity axis
            g = generator(config.seed, "fit", step)
            t = stratified_timesteps(1, levels, base.schedule.config.num_train_timesteps, g)[0].to(base.device)
            view = torch.randint(0, views, (levels,), generator=g)
            jitter, noise = (torch.randn((levels, *moments.shape[3:]), generator=g).to(base.device) for _ in "zn")
            z = moments[:, view, 0] + moments[:, view, 1] * jitter  #               [I, S, c, h, w]
            wanted = target(base.schedule, z.flatten(0, 1), *_tile(people, noise, t)).unflatten(0, (people, levels))
            ids = instance.expand(levels, -1)
            if prior is not None and guarded:
                pz, pnoise, pt, pids, own = prior_rows(base, prior, extra, config.seed, step)
                z = torch.cat([z, pz.expand(people, *pz.shape)], 1)
                wanted = torch.cat([wanted, own.expand(people, *own.shape)], 1)
                noise, t, ids = torch.cat([noise, pnoise]), torch.cat([t, pt]), torch.cat([ids, pids])
            factors = adapter.factors(params)
            with injection.using(concatenate(frozen, factors) if frozen else factors):
                out = predict(base, z.flatten(0, 1), *_tile(people, noise, t, ids))
            error = (out.unflatten(0, (people, levels + extra)) - wanted).square().flatten(2).mean(2)  # [I, S + P]
            loss = error[:, :levels].mean(1).sum()
            if guarded:
                loss = loss + config.prior_weight * error[:, levels:].mean(1).sum()
            if not torch.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss.item()} at step {step}; lower the rate ({config.rate})")
            set_rate(optimizer, schedule(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, error[:, :levels].mean().item())
    finally:
        injection.remove()
    return {k: v.detach() for k, v in params.items()}


def _tile(people: int, *rows: Tensor) -> list[Tensor]:
    """Repeat rows `[S, ...]` for each of the people, identity-major, `[I * S, ...]`."""
    return [r.expand(people, *r.shape).flatten(0, 1) for r in rows]
