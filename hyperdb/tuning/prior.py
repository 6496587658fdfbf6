"""The base's own pictures of class prompts, which an adapter is held to while it is trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.diffusion.base import Base


@dataclass
class PriorConfig:
    """Pictures of class prompts by the base itself, DreamBooth's class images: what an adapter should leave as it is.

    `images` pictures are drawn in all, of the `prompts` in turn. Each is kept at `levels` noise levels together with
    what the base predicts there. A training that keeps the prior asks for the same prediction with the adapter in
    place.
    """

    prompts: list[str]
    images: int
    levels: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or self.images < 1 or self.levels < 1:
            raise UserError("prior needs a prompt, an image and a level, of each at least 1")


@dataclass
class Prior:
    """Rows `[levels, images, ...]`: latents, noise, timesteps, token ids, and the base's own prediction for them."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    ids: Tensor
    own: Tensor

    def rows(self, count: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw latents, noise, timesteps, ids and own predictions `[count, ...]` of evenly spread noise levels."""
        import torch

        from hyperdb.runtime.seed import generator

        g = generator(seed, "prior", step)
        levels, images = self.timesteps.shape
        level = ((torch.arange(count) + torch.rand(count, generator=g)) / count * levels).long().clamp_(0, levels - 1)
        image = torch.randint(0, images, (count,), generator=g)
        z, noise, t = (x[level, image] for x in (self.latents, self.noise, self.timesteps))
        return z, noise, t, self.ids[level, image], self.own[level, image]


def load_prior(base: Base, config: PriorConfig, cache: Path, shipped: Path | None = None) -> Prior:
    """Sample the class pictures once and keep them in `cache`; `shipped` ones of the same base and prompts are used."""
    import torch
    from tqdm import tqdm

    from hyperdb.diffusion.loss import predict, stratified_timesteps
    from hyperdb.diffusion.sample import sample, start_noise
    from hyperdb.runtime.files import load_made, load_tensors, save_tensors
    from hyperdb.runtime.seed import generator

    how = base.config
    key = f"{base.digest} {config.prompts} {config.images} {config.levels} {config.seed}"
    key += f" {how.steps} {how.guidance} {how.size} {how.dtype}"
    if how.quantise is not None:
        key += f" {how.quantise}"
    start = start_noise(base, [config.seed + i for i in range(config.images)])
    key += f" {hashlib.sha256(start.numpy().tobytes()).hexdigest()[:8]}"
    prompts = [config.prompts[i % len(config.prompts)] for i in range(config.images)]
    ids = base.tokenize(prompts)
    g = generator(config.seed, "prior levels")
    t = stratified_timesteps(config.images, config.levels, base.schedule.config.num_train_timesteps, g).mT  # [S, M]
    noise = torch.randn((*t.shape, *base.latent_shape), generator=g)
    for path in filter(None, (shipped, cache)):
        read = load_made if path == cache else load_tensors  # what is shipped is not ours to remove
        if path.is_file() and (made := read(path)) is not None:
            tensors, metadata = made
            if metadata.get("key") == key:
                break
    else:
        parts = [slice(k, k + 16) for k in range(0, config.images, 16)]
        shown = tqdm(parts, desc="class pictures", unit="pass", dynamic_ncols=True)
        latents = torch.cat([sample(base, prompts[k], start[k]).cpu().half() for k in shown])
        with torch.no_grad():
            own = torch.stack([
                torch.cat([
                    predict(base, *(x.to(base.device) for x in (latents[k].float(), n[k], s[k], ids[k]))).cpu().half()
                    for k in parts
                ])
                for n, s in zip(noise, t, strict=True)
            ])  # fmt: skip
        tensors = {"latents": latents, "own": own}
        save_tensors(cache, tensors, {"key": key})
    latents, own = (tensors[name].float() for name in ("latents", "own"))
    rows = (latents.expand(*t.shape, -1, -1, -1), noise, t, ids.expand(*t.shape, -1), own)
    return Prior(*(x.to(base.device) for x in rows))
