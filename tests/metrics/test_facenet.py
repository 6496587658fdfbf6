"""The recogniser facenet sees the face alone, and reads safetensors alone; its network is the package's."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import skimage.data
import torch
from torch import nn
from torch.nn import functional as F

from hyperdb import config
from hyperdb.faces.align import face_crop
from hyperdb.faces.detect import detect
from hyperdb.metrics import judge, pretrained
from hyperdb.metrics.face import largest
from hyperdb.metrics.facenet import cut
from hyperdb.metrics.feature import Feature
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_json, save_tensors

CPU = torch.device("cpu")
SETTINGS = {"architecture": "InceptionResnetV1"}


class Small(nn.Module):
    """In the place of the package's network, which has 23 million numbers."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 8, 40, 40)

    def forward(self, x):
        assert x.shape[1:] == (3, 160, 160)
        return self.map(x).flatten(1)


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", types.SimpleNamespace(InceptionResnetV1=Small))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_tensors(tmp_path / "model.safetensors", Small().state_dict() | {"logits.weight": torch.zeros(5, 128)})
    save_json(tmp_path / "config.json", SETTINGS)
    return tmp_path


@pytest.fixture(scope="module")
def pictures():
    """The astronaut, a picture without a face, and the astronaut in the mirror."""
    crop, _ = face_crop(skimage.data.astronaut(), 128)
    return torch.from_numpy(np.stack([crop, np.full_like(crop, 127), crop[:, ::-1]])).permute(0, 3, 1, 2)


def test_it_judges_the_face_and_says_where_there_is_none(package, folder, pictures, monkeypatch):
    facenet = judge("facenet", str(folder), CPU)
    assert isinstance(facenet, Feature)
    found = facenet(pictures)
    assert (found.shape, found.dtype) == ((3, facenet.dim), torch.float32)
    assert found[1].isnan().all()
    for row, rgb, face in largest(pictures):
        chip = torch.from_numpy(cut(rgb, face)).permute(2, 0, 1)[None]
        assert torch.allclose(found[row], F.normalize(facenet.net((chip - 127.5) / 128), dim=-1), atol=1e-6)
    assert found[0] @ found[2] < 0.999
    monkeypatch.setattr(pretrained, "BATCH", 1)
    assert torch.allclose(facenet(pictures), found, atol=1e-6, equal_nan=True)
    assert facenet(pictures[1:2]).isnan().all()
    with pytest.raises(ValueError, match="uint8"):
        facenet(pictures.float())


def test_what_is_missing_is_one_line(package, folder, monkeypatch):
    with pytest.raises(UserError, match=r"'facenet' needs judges\.facenet=FOLDER; docs/stable_diffusion\.md"):
        config.load("evaluate", ["recognisers=[sface,facenet]"])
    assert config.load("evaluate", ["recognisers=[sface,facenet]", "judges.facenet=x"]).judges.facenet == "x"
    save_json(folder / "config.json", {"architecture": "vit_small_patch16_224"})
    with pytest.raises(UserError, match=r"is of the architecture 'vit_small_patch16_224'.*take it out of recognisers"):
        judge("facenet", str(folder), CPU)
    (folder / "model.safetensors").rename(folder / "20180402-114759-vggface2.pt")
    with pytest.raises(UserError, match=r"has no model\.safetensors \(other formats can run code"):
        judge("facenet", str(folder), CPU)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match=r"facenet needs a package: pip install 'facenet-pytorch==2\.5\.3'"):
        judge("facenet", str(folder), CPU)


def test_it_is_what_the_package_says_of_a_face(tmp_path):
    package = pytest.importorskip("facenet_pytorch")
    rgb = np.ascontiguousarray(skimage.data.astronaut()[:256, 100:356])
    face = detect(rgb)[0]
    x, y, width, height = face.box
    whole = package.extract_face(rgb, [x, y, x + width, y + height])
    assert np.array_equal(cut(rgb, face), whole.permute(1, 2, 0).numpy().astype(np.uint8))
    torch.manual_seed(0)
    net = package.InceptionResnetV1().eval()
    save_tensors(tmp_path / "model.safetensors", net.state_dict())
    save_json(tmp_path / "config.json", SETTINGS)
    with torch.no_grad():
        known = net(package.fixed_image_standardization(whole)[None])
    found = judge("facenet", str(tmp_path), CPU)(torch.from_numpy(rgb).permute(2, 0, 1)[None])
    assert torch.allclose(found, known, atol=1e-5)
