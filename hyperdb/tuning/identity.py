"""The loss that sees the person: the encoder compares what is drawn with the person's photos. Not in the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperdb.diffusion.sample import sample
from hyperdb.runtime.seed import generator

if TYPE_CHECKING:
    from hyperdb.diffusion.base import Base
    from hyperdb.hypernet.model import Hypernet

CROP = 0.15  # share of a picture's side that is cut off at most before it is compared


def moved(images: Tensor, g: torch.Generator) -> Tensor:
    """Turn half of the images `[B, 3, H, W]` left to right, and cut up to `CROP` of the side off each; differentiable.

    What is left of a picture fills the frame.
    """
    zoom = 1 - CROP * torch.rand(len(images), generator=g)
    shift = (2 * torch.rand(len(images), 2, generator=g) - 1) * (1 - zoom)[:, None]
    turn = 1 - 2 * (torch.rand(len(images), generator=g) < 0.5).float()
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * turn, zoom, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def identity_loss(
    base: Base, model: Hypernet, noise: Tensor, photos: list[Tensor], steps: int, prompts: list[str], seed: int,
    part: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Return how much farther from a person a picture is than that person's photos are, `[I]`.

    The pictures are drawn from `noise [I, c, h, w]` under `prompts`, the photos are `[K, 3, H, W]` of each person. Both
    are `moved` at random, so that what is learned is not bound to single pixels. A distance is that of a summary of the
    hypernetwork's encoder from the mean of the photos' ones, squared, a mean over the components. Nothing is won by
    coming nearer than another photo of the person would be: what comes nearer has learned to please the encoder. What
    is injected is differentiated through the last of `steps` of sampling (Xu et al. 2023, ReFL).

    Where several processes draw people, `photos` are of all of them, and `noise` and `prompts` of this one's `part`.
    """
    g = generator(seed)
    with torch.no_grad():
        each = [model.features(x)[1] for x in [moved(images, g) for images in photos][part]]  # [K, C]
        known = torch.stack([x.mean(0) for x in each])
        # one photo's expected distance from the mean of K others
        apart = torch.stack([x.var(0).mean() * (1 + 1 / len(x)) if len(x) > 1 else x.sum() * 0 for x in each])
    guide = base.config.guide()
    latents = sample(base, prompts, noise, steps, gradient=True, subject_guidance=guide.subject)
    with base.autocast():
        pictures = base.pixels(latents)
    if len(pictures) < len(photos):  # moved as they would be beside the others
        everybody = pictures.new_zeros(len(photos), *pictures.shape[1:])
        everybody[part] = pictures
        compared = moved(everybody, g)[part]
    else:
        compared = moved(pictures, g)
    distance = (model.features(compared)[1] - known).square().mean(1)
    return (distance - apart).clamp_min(0)
