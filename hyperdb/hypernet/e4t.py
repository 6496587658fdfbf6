"""E4T's encoder (Gal et al. 2023, arXiv 2302.12228): a photo -> where the training of its person begins.

The word is predicted as the hypernetwork predicts, in one token. The reference also shows its encoder what the UNet
makes of the noisy picture under the empty prompt, so that a person has another word at each noise level, and keeps on
predicting while it draws. Here a person has one word, which an adapter can hold and the tuning can train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from hyperdb.adapters.e4t import Word
from hyperdb.hypernet import HypernetConfig
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata

KIND = "e4t"  # in the header of its file, as the adapter's kind
SCALE = 0.1  # of what is predicted


def require(path: Path) -> Path:
    """Return the path of an encoder. Raises `UserError` where there is none, or another file."""
    if not path.is_file():
        raise UserError(f"no encoder of E4T at {path}; run `hyperdb train_e4t`, or set adapter.encoder=null")
    if load_metadata(path).get("adapter") != KIND:
        raise UserError(f"{path} is no encoder of E4T; train one with `hyperdb train_e4t`")
    return path


class E4TEncoder(Hypernet):
    """Images `[I, 3, H, W]` uint8 -> the parameters of E4T at which people begin.

    `centre` is the class word's vector, and `offsets` are what everybody begins at in the layers, trained with it.
    """

    def __init__(self, config: HypernetConfig, word: Word, default_spread: float = SCALE) -> None:
        super().__init__(config, word, default_spread)  # type: ignore[arg-type]
        # where modules are made now: of a file that claims any size, in no memory
        shared = word.adapter.layers.to(torch.empty(0).device).init(1)
        self.names = list(shared)
        self.offsets = nn.ParameterList(value[0] for value in shared.values())

    # v = v_class + 0.1 enc(x)
    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Return `{vector: [I, C], layer.down: [1, n], layer.up: [1, m]}`."""
        shared = {name: value[None] for name, value in zip(self.names, self.offsets, strict=True)}
        return {"vector": self(images)[:, 0], **shared}

    # lambda |enc(x)|^2
    def penalty(self, vector: Tensor) -> Tensor:
        """Return the squared length of what is predicted for each vector, `[I]`."""
        return ((vector - self.centre) / SCALE).square().sum(1)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an encoder. Raises `UserError` for a foreign or damaged file, and where there is none."""
        return super().load(require(path))
