"""FaceNet as a recogniser: the network of the paper's "Face Rec.", trained on VGGFace2. Optional."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hyperdb.faces.detect import Face
from hyperdb.metrics.face import largest
from hyperdb.metrics.pretrained import SETTINGS, Pretrained, fill
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json

ARCHITECTURE = "InceptionResnetV1"
SIDE = 160  # pixels


def cut(rgb: NDArray[np.uint8], face: Face) -> NDArray[np.uint8]:
    """Return what a face's box holds, stretched to `[160, 160, 3]`: without a margin and not turned upright.

    So facenet-pytorch cuts faces out by default, of the boxes of its own detector.
    """
    x, y, width, height = face.box
    left, top = int(max(x, 0)), int(max(y, 0))
    inside = rgb[top : int(min(y + height, rgb.shape[0])), left : int(min(x + width, rgb.shape[1]))]
    return np.asarray(cv2.resize(inside, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


class Facenet(Pretrained):
    """InceptionResnetV1 (Schroff et al. 2015; Szegedy et al. 2017) of the package facenet-pytorch: 512 numbers a face.

    Faces are those that YuNet finds. The folder's `config.json` is `{"architecture": "InceptionResnetV1"}`, and its
    `model.safetensors` the network's numbers. The package keeps its own in pickles, which are not read here:
    docs/stable_diffusion.md says how the folder is made of them. Raises `UserError` if the package is missing, too.
    """

    name = "facenet"
    without = "as docs/stable_diffusion.md says, or take it out of recognisers"

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            import facenet_pytorch  # noqa: F401
        except ImportError as error:
            raise UserError(
                "the recogniser facenet needs a package: pip install 'facenet-pytorch==2.5.3'  "
                "(or: pip install -e '.[facenet]')"
            ) from error
        super().__init__(path, device)

    def load(self, folder: Path) -> nn.Module:
        """Build the network and fill it; its classifier of people is left out."""
        from facenet_pytorch import InceptionResnetV1

        settings = load_json(folder / SETTINGS)
        if (kind := settings.get("architecture")) != ARCHITECTURE:
            raise ValueError(f"{SETTINGS} is of the architecture {kind!r}, not {ARCHITECTURE}")
        return fill(InceptionResnetV1(), folder)

    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 `[N, 3, H, W]` as float32 `[N, 512]`; NaN where no face is found."""
        faces = {row: cut(rgb, face) for row, rgb, face in largest(images)}
        features = torch.full((len(images), self.dim), torch.nan)
        if faces:
            features[list(faces)] = self.encode(torch.from_numpy(np.stack(list(faces.values()))).permute(0, 3, 1, 2))
        return features

    def pixels(self, image: Tensor) -> Tensor:
        """Standardise a face, by the same numbers for all."""
        return (image.float() - 127.5) / 128

    def features(self, pixels: Tensor) -> Tensor:
        """Return the embedding."""
        return self.net(pixels)
