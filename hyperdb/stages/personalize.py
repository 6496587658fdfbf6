"""One photo of a face -> an adapter that knows this face (paper sections 4.2 and 4.3).

The hypernetwork predicts LiDB weights; 40 iterations of rank-relaxed fine-tuning finish the likeness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.tuning import photos
from hyperdb.tuning.personalizer import PersonalizerConfig

if TYPE_CHECKING:
    from hyperdb.tuning.memory import Sketch

WRITES = photos.WRITES


@dataclass(kw_only=True)
class Config(PersonalizerConfig):
    """`image`: a photo in any common format; `hypernet`: a trained one's folder, `default` (the base's own) or null.

    Several photos of one person are written `[a.jpg,b.jpg]`: their predictions are averaged, and the fine-tuning
    sees all of them, `finetune.steps` iterations a photo. Without a hypernetwork the fast fine-tuning runs alone, or
    begins at another adapter, `start`: an average of people made by `hyperdb edit`, or an earlier fit. `adapter`
    chooses another way to personalise: dreambooth, lora, textual_inversion, svdiff or dora.
    """


def passes(config: Config, sketch: Sketch) -> None:
    """Measure prediction, fine-tuning and preview."""
    photos.passes(config, sketch)


def run(config: Config) -> Path:
    """Write `lidb.safetensors`, `adapter.safetensors`, `preview.png` and `report.json` to `out`.

    With a start, or an adapter other than LiDB, there is no prediction to keep as `lidb.safetensors`.
    """
    return photos.personalize(config)
