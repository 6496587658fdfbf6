"""Does a picture obey its prompt? A classifier of style and place, trained on renders, for the embedded base."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, reading, save_tensors

KIND = "hyperdb-judge-1"
SIDE = 64  # pixels that it sees of any picture: enough for a style and a place
BACKBONE = "convnext_zepto_rms"  # no running statistics: a checkpoint of parameters is all of it


class Judge(nn.Module):
    """Images `[B, 3, H, W]` uint8 -> the most likely word of each label, by a small convolutional network."""

    def __init__(self, words: dict[str, list[str]]) -> None:
        super().__init__()
        self.words = words
        self.net = timm.create_model(BACKBONE, num_classes=sum(map(len, words.values())))

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits `[B, words]` of each label for images in [0, 255]."""
        x = images.float()
        if x.shape[-1] > SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        parts = self.net(x / 127.5 - 1).float().split([len(w) for w in self.words.values()], dim=1)
        return dict(zip(self.words, parts, strict=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the index of the most likely word of each label, `[B]`."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.words}
        for part in images.split(256):
            for name, logits in self.logits(part).items():
                found[name].append(logits.argmax(1))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def save(self, path: Path, metadata: dict[str, str]) -> Path:
        """Write weights in fp16, with the words and `metadata`."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.net.state_dict().items()}
        return save_tensors(path, state, {"kind": KIND, "words": json.dumps(self.words), **metadata})

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Read a judge. Raises `UserError` for another kind of file."""
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != KIND:
            raise UserError(f"{path} is no judge of prompts; train one with `hyperdb train_judge`")
        with reading(path):
            judge = cls({str(name): list(map(str, words)) for name, words in json.loads(metadata["words"]).items()})
        own = judge.net.state_dict()
        if own.keys() != tensors.keys() or any(own[k].shape != v.shape for k, v in tensors.items()):
            raise UserError(f"{path} holds other layers than {BACKBONE}; train it again with `hyperdb train_judge`")
        judge.net.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()})
        return judge.eval()
