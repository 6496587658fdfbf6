"""One photo of a face -> an adapter that knows this face (paper sections 4.2 and 4.3).

The hypernetwork predicts LiDB weights; 40 iterations of rank-relaxed fine-tuning finish the likeness.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.runtime.track import Track, check_tracker, tracked
from hyperdb.tuning import photos
from hyperdb.tuning.personalizer import PersonalizerConfig

if TYPE_CHECKING:
    from hyperdb.tuning.memory import Sketch

WRITES = photos.WRITES


@dataclass(kw_only=True)
class Config(PersonalizerConfig):
    """Whose photo, what is learned from it, and where the learning begins.

    `image` is a photo in any common format. Photos of one person are written `[a.jpg,b.jpg]`. The hypernetwork's
    predictions for them are averaged, and the fine-tuning sees all of them, with `finetune.steps` iterations for each.
    Of several faces in a photo the largest is taken; `face=2` takes the next largest. `align=false` says that the
    picture is a crop as FFHQ has them already.

    `adapter` is `lidb`, the paper's way, or another yaml of conf/adapters: `lora`, `dora`, `foura`, `svdiff`,
    `dreambooth`, `textual_inversion`, `plus`, `custom_diffusion`, `e4t`, `a1111` or `lorax`. LiDB is predicted by the
    hypernetwork, and `finetune` trains the low-rank factors `relaxed` on top of it. The others have no
    hypernetwork, so `finetune` trains them from nothing, as their references do; E4T begins where its `adapter.encoder`
    says, a file of `hyperdb train_e4t`.

    `hypernet` is the folder of a trained hypernetwork, `default` for the one that belongs to the base, or null for
    none. `start` is an adapter that takes the place of the prediction: an average of people made by `hyperdb edit`, or
    an earlier result of this command. The settings of `finetune` are explained in `hyperdb.tuning.fit.FitConfig`.
    `prior` says which class pictures the fine-tuning keeps as the base draws them.
    """

    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tracker(self.tracker)


def passes(config: Config, sketch: Sketch) -> None:
    """Measure prediction, fine-tuning and preview."""
    photos.passes(config, sketch)


@tracked
def run(config: Config, track: Track) -> Path:
    """Write `lidb.safetensors`, `adapter.safetensors`, `preview.png`, `pictures.png` and `report.json` to `out`.

    Without a hypernetwork, with a start or with an adapter other than LiDB, there is no prediction to keep as
    `lidb.safetensors`.
    """
    return photos.personalize(config, track=track)
