"""Draw people with their adapters, many at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperdb.adapters.base import identities_of, select
from hyperdb.adapters.inject import Injection, settled
from hyperdb.diffusion.sample import sample, start_noise

if TYPE_CHECKING:
    from hyperdb.adapters.base import Changes
    from hyperdb.diffusion.base import Base


def together(size: int) -> int:
    """Return how many pictures of `size` px are drawn at once."""
    return max(1, min(64, 2**20 // size**2))


@torch.no_grad()
def draw(
    base: Base,
    changes: Changes | None,
    people: int,
    prompts: list[str],
    seeds: list[int],
    steps: int | None = None,
    strength: float = 1.0,
    hybrid: bool = True,
    batch: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Return images `[I, K, 3, H, W]` uint8: for each of `people` the K prompts at the K seeds, the same for everyone.

    `changes` have an identity axis of `people` (or 1, or are None: the base alone). `batch` pictures are drawn at once:
    64 of 64 px, 4 of 512 px. Without `hybrid` the guidance is ordinary, whatever the base's is.
    """
    injection, guide = Injection(base.sites(changes or ())), base.config.guide(changes is not None and hybrid)
    alone = changes is not None and identities_of(changes) == 1
    if changes is not None and alone:
        changes = settled(changes, injection.sites)
    noise = start_noise(base, seeds)
    most = batch or together(base.config.size)
    group = max(1, most // len(prompts))
    passes = [slice(first, first + most) for first in range(0, len(prompts), most)]
    found = []
    try:
        for first in range(0, people, group):
            count = min(group, people - first)
            if changes is not None:
                part = changes if alone else select(changes, slice(first, first + count))
                injection.set(part, strength, repeat=guide.adapted, plain=guide.plain)
            drawn = []
            for some in passes:
                noises = noise[some].repeat(count, 1, 1, 1)
                latents = sample(base, prompts[some] * count, noises, steps, subject_guidance=guide.subject)
                drawn.append(base.decode(latents).unflatten(0, (count, -1)))
            found.append(torch.cat(drawn, 1))
            if progress is not None:
                progress(count)
    finally:
        injection.remove()
    return torch.cat(found)
