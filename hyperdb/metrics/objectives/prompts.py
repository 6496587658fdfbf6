"""Train the classifier of style and place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperdb.metrics.obedience import Judge
from hyperdb.metrics.objectives import PromptsConfig
from hyperdb.metrics.objectives.objective import Objective

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base


class PromptsObjective(Objective):
    """The cross-entropy of style and place, whose words are taken for right at 95 %."""

    def __init__(self, config: PromptsConfig, people: People, seen: Tensor, base: Base) -> None:
        super().__init__(people, seen)
        self.judge = Judge({name: people.names[name] for name in ("style", "place")})

    def forward(self, images: Tensor, rows: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        """Return the logits of each label."""
        return self.judge.logits(images)

    def loss(self, found: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return a term a label."""
        right = {name: self.people.labels[name][rows].to(logits.device) for name, logits in found.items()}
        return {name: F.cross_entropy(x, right[name], label_smoothing=0.05) for name, x in found.items()}

    def save(self, out: Path, metadata: dict[str, str]) -> Judge:
        """Write `out/judge.safetensors`."""
        return Judge.load(self.judge.save(out / "judge.safetensors", metadata))

    def measure(self, judge: Judge, images: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
        """Return how often each label is named rightly, and of pictures of each of its words."""
        labels = {name: self.people.labels[name][rows] for name in judge.words}
        right = {name: told == labels[name] for name, told in judge(images).items()}
        measured = {"accuracy": {name: hits.float().mean().item() for name, hits in right.items()}}
        for name, hits in right.items():
            some = {word: hits[labels[name] == i].float() for i, word in enumerate(judge.words[name])}
            measured[name] = {word: x.mean().item() for word, x in some.items() if len(x)}
        return measured
