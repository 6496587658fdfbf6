"""The diffusion loss of any prediction type, and how noise levels are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from hyperdb.diffusion.base import Base


def stratified_timesteps(
    rows: int, levels: int, steps: int, generator: torch.Generator, logit_normal: Sequence[float] | None = None,
    noise: Sequence[float] = (0.0, 1.0),
) -> Tensor:  # fmt: skip
    """Draw `[rows, levels]` timesteps in [0, steps), one from each of `levels` equally likely strata.

    Uniform over the noise levels, or with t / steps = sigmoid(mean + std * normal), (mean, std) = `logit_normal`: more
    of those in the middle (Esser et al. 2024, section 3.1). `noise` (low, high) are the fractions of the levels that
    they are squeezed into.
    """
    u = (torch.arange(levels) + torch.rand(rows, levels, generator=generator)) / levels
    if logit_normal is not None:
        mean, std = logit_normal
        u = torch.sigmoid(mean + std * torch.special.ndtri(u))
    low, high = noise
    u = low + (high - low) * u
    return (u * steps).long().clamp_(0, steps - 1)


def target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the base's network is trained to predict, by its scheduler's prediction type."""
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction type {kind!r} is not supported; expected epsilon or v_prediction")


def predict(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
    """Noise latents to `timesteps` and return the network's prediction, `[B, c, h, w]` float32."""
    noisy = base.schedule.add_noise(latents, noise, timesteps)
    with base.autocast():
        context = base.text_encoder(ids)[0]
        return base.unet(noisy, timesteps, context).sample.float()


def signal_weight(schedule: DDPMScheduler, timesteps: Tensor, power: float | None) -> Tensor:
    """Return what a row's loss is multiplied by, in the shape of `timesteps`: `alpha_bar_t ** power` on the error of v.

    The same `power` is the same loss whatever the base predicts. As
    epsilon = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t,

        alpha_bar^power |v_hat - v|^2 = alpha_bar^(power - 1) |epsilon_hat - epsilon|^2,

    and a base of epsilon gets the weight on the right. So 1 is the error of epsilon, the loss of Stable Diffusion 1.5,
    and 0 that of v; None is the error of what the base predicts, its own loss. A person's gradient at high noise is
    several times longer than at low noise and drowns what is learned there; 0.5 makes the lengths about equal.
    """
    alpha_bar = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    if power is None:
        return torch.ones_like(alpha_bar)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction type {kind!r} is not supported; expected epsilon or v_prediction")
    return alpha_bar ** (power - 1 if kind == "epsilon" else power)


def face_focus(weight: float, height: int, width: int) -> Tensor:
    """Return the weight of each latent position, `[h, w]` of mean 1: more in the middle, where crops have a face."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    focus = 1 + weight * torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 0.3)
    return focus / focus.mean()


def face_mask(radius: float, height: int, width: int) -> Tensor:
    """Return 1 in the middle of the frame and 0 outside of `radius`, `[h, w]`; 1 is half a side, with a soft edge."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.sigmoid((radius - torch.hypot(y[:, None], x[None, :])) / 0.08)


def bad_levels(schedule: DDPMScheduler, errors: Tensor, timesteps: Tensor) -> str:
    """Say at which noise levels the errors of rows are no numbers; "" if all are. The shapes are those of `errors`."""
    found = sorted(set(timesteps.expand_as(errors)[~errors.isfinite()].tolist()))
    if not found:
        return ""
    named = ", ".join(map(str, found[:3])) + (" …" if len(found) > 3 else "")
    return f", noise level{'s' * (len(found) > 1)} {named} of {schedule.config.num_train_timesteps}"


# eq. 2, first term
def diffusion_loss(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
    """Return the mean squared error of each row, `[B]`."""
    prediction = predict(base, latents, noise, timesteps, ids)
    return (prediction - target(base.schedule, latents, noise, timesteps)).square().flatten(1).mean(1)
