"""Generate images with classifier-free guidance; the same pictures as StableDiffusionPipeline at the same noise."""

from __future__ import annotations

import warnings

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from hyperdb.diffusion.base import Base
from hyperdb.diffusion.guidance import Guidance
from hyperdb.runtime.errors import NonFiniteError, UserError

TOO_LARGE = 1e6  # latents have a deviation of about 1
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}


def start_noise(base: Base, seeds: list[int]) -> Tensor:
    """Return noise `[B, c, h, w]`, one generator a sample: a picture does not depend on its batch.

    It is what a diffusers pipeline draws from `generator=torch.Generator().manual_seed(seed)`.
    """
    if odd := [s for s in seeds if not -(2**63) <= s < 2**64]:
        raise UserError(f"seed={odd[0]}: expected -2**63 to 2**64 - 1, for the last picture too")
    return torch.stack([torch.randn(base.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def sample(
    base: Base,
    prompts: list[str],
    noise: Tensor,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    scheduler: str = "ddim",
    gradient: bool = False,
    subject_guidance: float | None = None,
) -> Tensor:
    """Denoise `noise [B, c, h, w]` under `prompts` (B of them) and return latents `[B, c, h, w]`.

    The network sees the blocks of rows of `Guidance(guidance, subject_guidance)`, unconditional ones first: an
    injection is set with its `adapted` as `repeat` and its `plain`. With `gradient` the last step can be
    differentiated, as in Xu et al. 2023 (ReFL). Raises `NonFiniteError` rather than return what is no picture.
    """
    if scheduler not in SCHEDULERS:
        raise UserError(f"scheduler={scheduler!r}: expected one of {', '.join(sorted(SCHEDULERS))}")
    steps = base.config.steps if steps is None else steps
    guide = Guidance(base.config.guidance if guidance is None else guidance, subject_guidance)
    solver = SCHEDULERS[scheduler].from_config(base.schedule.config)
    try:
        solver.set_timesteps(steps, device=base.device)
    except ValueError as error:  # pndm begins with Runge-Kutta steps and needs 4
        levels = base.schedule.config.num_train_timesteps
        other = "more, or ddim" if steps <= levels else f"{levels} at most"
        raise UserError(f"scheduler={scheduler} cannot draw in {steps} steps; take {other}") from error
    if solver.timesteps.max() >= base.schedule.config.num_train_timesteps:  # `steps_offset` puts it beyond the last
        raise UserError(f"scheduler={scheduler} cannot draw in {steps} steps on this base; take fewer")
    if guide.text <= 0:
        ignores = "ignores the prompt" if guide.text == 0 else "draws away from the prompt"
        warnings.warn(f"guidance={guide.text} {ignores}; 1 is without guidance", stacklevel=2)
    words = {"u": [negative] * len(prompts), "b": [base.config.plain_prompt(p) for p in prompts], "p": prompts}
    ids = base.tokenize([prompt for block in guide.blocks for prompt in words[block]])
    z = noise.to(base.device) * solver.init_noise_sigma
    with torch.no_grad(), base.autocast():
        context = base.text_encoder(ids)[0]
    for i, t in enumerate(solver.timesteps):
        x = solver.scale_model_input(z.repeat(len(guide.blocks), 1, 1, 1), t)
        last = gradient and i == len(solver.timesteps) - 1
        with torch.set_grad_enabled(last), base.autocast():
            out = base.unet(x, t, base.text_encoder(ids)[0] if last else context).sample.float()
        z = solver.step(guide.combine(out), t, z, return_dict=False)[0]
    if not (z.abs() < TOO_LARGE).all():
        raise NonFiniteError(
            f"what was drawn is NaN, infinite or larger than any picture after {steps} steps at "
            f"guidance={guide.text}: lower the adapter's strength or the guidance, or use diffusion.dtype=fp32; if "
            f"nothing helps, {base.config.path} is damaged"
        )
    return z
