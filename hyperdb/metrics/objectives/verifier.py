"""Train the verifier: are two pictures, whatever their styles, of one person?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperdb.metrics.objectives import VerifierConfig
from hyperdb.metrics.objectives.encoder import EncoderObjective
from hyperdb.metrics.objectives.objective import pixels
from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base


# -mean_p log exp(z_i z_p / t) / sum_(a != i) exp(z_i z_a / t), p the others of the same person
# (Khosla et al. 2020, equation 2)
def contrast(features: Tensor, who: Tensor, temperature: float) -> Tensor:
    """Return how badly pictures `[B, C]`, of length 1, find the others of their person, `who [B]`; each has some."""
    itself = torch.eye(len(who), dtype=torch.bool, device=who.device)
    found = (features @ features.mT / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    same = (who[:, None] == who) & ~itself
    return -(found.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


class VerifierObjective(EncoderObjective):
    """The pictures of a person are nearer to each other than to anybody else's, in whatever styles.

    The style alone makes two pictures alike, and the loss never asks for it.
    """

    name = "verifier"

    def __init__(self, config: VerifierConfig, people: People, seen: Tensor, base: Base) -> None:
        super().__init__(config, people, seen)
        self.config = config
        self.each = [people.rows[i] for i in people.identity[seen].unique().tolist() if len(people.rows[i]) > 1]
        if len(self.each) < 2:
            raise UserError(f"{len(self.each)} people to learn from have two pictures; render more people or views")

    def draw(self, count: int, g: torch.Generator) -> Tensor:
        """Return several pictures each of people drawn at random, in a random order."""
        people = torch.randperm(len(self.each), generator=g)[: max(2, count // self.config.pictures)]
        each = [self.each[i] for i in people.tolist()]
        rows = torch.cat([mine[torch.randperm(len(mine), generator=g)[: self.config.pictures]] for mine in each])
        return rows[torch.randperm(len(rows), generator=g)]

    def forward(self, images: Tensor, rows: Tensor, g: torch.Generator) -> Tensor:
        """Return the features of the pictures, some of them mirrored, which are of the same person still."""
        mirrored = (torch.rand(len(images), 1, 1, 1, generator=g) < 0.5).to(images.device)
        return self.net(pixels(torch.where(mirrored, images.flip(-1), images)))

    def loss(self, found: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Return the one term."""
        who = self.people.identity[rows].to(found.device)
        return {"person": contrast(F.normalize(found.float(), dim=-1), who, self.config.temperature)}
