"""What VICReg and the verifier have in common: a small convolutional network, written as a timm folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import Tensor

from hyperdb.metrics import judge
from hyperdb.metrics.dino import Dino
from hyperdb.metrics.obedience import BACKBONE, SIDE
from hyperdb.metrics.objectives import EncoderConfig
from hyperdb.metrics.objectives.objective import Objective
from hyperdb.metrics.objectives.unseen import told_apart
from hyperdb.metrics.pretrained import SETTINGS, WEIGHTS
from hyperdb.runtime.files import save_json, save_tensors

if TYPE_CHECKING:
    from hyperdb.data.people import People


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
