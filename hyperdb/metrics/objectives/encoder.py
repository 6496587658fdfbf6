"""What VICReg and the verifier have in common: a small convolutional network, written as a timm folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor

from hyperdb.metrics import judge
from hyperdb.metrics.dino import Dino
from hyperdb.metrics.obedience import BACKBONE, SIDE
from hyperdb.metrics.objectives import EncoderConfig
from hyperdb.metrics.objectives.objective import Objective
from hyperdb.metrics.pretrained import SETTINGS, WEIGHTS
from hyperdb.metrics.score import auc
from hyperdb.runtime.files import save_json, save_tensors

if TYPE_CHECKING:
    from hyperdb.data.people import People


def told_apart(features: Tensor, people: People, rows: Tensor) -> dict[str, dict[str, float]]:
    """Return by style how well photos tell of pictures whom they show, from features `[N, C]` of length 1 of the rows.

    `auc` is the chance that a photo of the person is nearer to a picture than a photo of somebody else, `rank1` how
    often the nearest photo of all is the person's. No photo is compared with itself. A style in which no picture has
    another photo of its person is left out.
    """
    photo, who = people.is_style("photo")[rows], people.identity[rows]
    cosine = features @ features.mT  #                                                 [N, N]
    same = (who[:, None] == who) & photo & ~torch.eye(len(rows), dtype=torch.bool)
    other = (who[:, None] != who) & photo
    nearest = cosine.masked_fill(~(same | other), -2).argmax(1, keepdim=True)
    hit = same.gather(1, nearest)[:, 0]
    found: dict[str, dict[str, float]] = {"auc": {}, "rank1": {}}
    for style in people.names["style"]:
        mine = people.is_style(style)[rows] & same.any(1)
        if mine.any() and other[mine].any():
            found["auc"][style] = auc(cosine[mine][same[mine]], cosine[mine][other[mine]])
            found["rank1"][style] = hit[mine].float().mean().item()
    return found


class EncoderObjective(Objective):
    """A network whose pooled features judge, as those of `hyperdb.metrics.dino.Dino` do."""

    name: str  # of the judge

    def __init__(self, config: EncoderConfig, people: People, seen: Tensor) -> None:
        super().__init__(people, seen)
        self.sizes = {"dims": [config.width * 2**level for level in range(4)]}
        self.net = timm.create_model(BACKBONE, num_classes=0, **self.sizes)

    def judging(self) -> Any:
        """Return the timm model that is written: the network itself."""
        return self.net

    def save(self, out: Path, metadata: dict[str, str]) -> Dino:
        """Write the folder `out/judge` as timm has it, the weights in fp16."""
        folder, half, model = out / "judge", [0.5] * 3, self.judging()
        how = {"input_size": [3, SIDE, SIDE], "mean": half, "std": half, "interpolation": "bilinear", "crop_pct": 1.0}
        net = {"architecture": BACKBONE, "model_args": self.sizes, "num_classes": model.num_classes}
        save_json(folder / SETTINGS, {**net, "pretrained_cfg": how})
        state = {name: value.half() for name, value in model.state_dict().items()}
        save_tensors(folder / WEIGHTS, state, {"format": "pt", **metadata})
        return judge(self.name, str(folder), next(self.net.parameters()).device)

    def measure(self, judge: Dino, images: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
        """Return how well people are told apart, style by style."""
        return told_apart(judge(images), self.people, rows)
