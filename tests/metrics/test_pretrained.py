"""Judges from a model hub: what they say of pictures does not depend on how they are asked; bad files are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from hyperdb.metrics import ENCODERS, RECOGNISERS, JudgesConfig, judge, pretrained
from hyperdb.metrics.feature import Feature, TextFeature
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors, save_json, save_tensors

CPU = torch.device("cpu")
PICTURES = torch.randint(0, 256, (5, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def judges(tiny_judges):
    return {name: judge(name, str(folder), CPU) for name, folder in tiny_judges.items()}


@pytest.fixture
def copied(tiny_judges, tmp_path):
    """Return a function that copies a judge's folder, to be damaged."""
    return lambda name: shutil.copytree(tiny_judges[name], tmp_path / name)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_every_judge_of_whole_pictures_has_a_setting():
    assert set(JudgesConfig.__dataclass_fields__) == {*ENCODERS, "facenet", "verifier"}  # two are recognisers
    assert not ENCODERS.keys() & RECOGNISERS.keys()


@pytest.mark.parametrize("name", ENCODERS)
def test_identical_pictures_are_one_and_others_less(judges, name):
    found = judges[name](torch.cat([PICTURES, PICTURES]))
    cosine = found @ found.T
    assert torch.allclose(cosine[:5, 5:].diagonal(), torch.ones(5))
    others = cosine[:5, :5][~torch.eye(5, dtype=torch.bool)]
    assert others.max() < 1 - 1e-3
    assert (found.dtype, found.shape) == (torch.float32, (10, judges[name].dim))


@pytest.mark.parametrize("name", ENCODERS)
def test_the_batch_changes_nothing(judges, name, monkeypatch):
    together = judges[name](PICTURES)
    monkeypatch.setattr(pretrained, "BATCH", 2)
    assert torch.allclose(judges[name](PICTURES), together, atol=1e-6)
    assert torch.allclose(torch.cat([judges[name](one[None]) for one in PICTURES]), together, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(7, 9), (32, 32), (300, 200)])
def test_pictures_of_any_size(judges, name, size):
    picture = torch.full((1, 3, *size), 90, dtype=torch.uint8)
    same = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    assert torch.allclose(judges[name](picture), judges[name](same), atol=1e-5)


def test_only_uint8_pictures_are_taken(judges):
    with pytest.raises(ValueError, match="uint8"):
        judges["dino"](PICTURES.float())


# --- against the libraries


def test_dino_is_the_class_token_of_pictures_prepared_as_timm_prepares_them(judges):
    dino = judges["dino"]
    assert isinstance(dino, Feature)
    assert not isinstance(dino, TextFeature)
    square = F.interpolate(PICTURES.float(), (35, 49), mode="bicubic", antialias=True).round().clamp(0, 255)
    pixels = square[:, :, 2:34, 8:40] / 127.5 - 1  # 32 of 35: its crop_pct is 0.9
    token = F.normalize(dino.net.forward_features(pixels)[:, 0], dim=-1)
    assert (dino(PICTURES) * token).sum(-1).min() > 1 - 1e-4  # PIL rounds between the two directions


def test_clip_is_what_transformers_says_of_pictures_and_words(judges, tiny_judges):
    clip, texts = judges["clip"], ["a photo of a face", "a pencil sketch of a smiling face, on the beach"]
    assert isinstance(clip, TextFeature)
    net, processor = (kind.from_pretrained(tiny_judges["clip"]) for kind in (CLIPModel, CLIPProcessor))
    ready = processor(text=texts, images=[pil(x) for x in PICTURES], return_tensors="pt", padding=True)
    with torch.no_grad():
        known = net(**ready)
    assert torch.allclose(clip(PICTURES), known.image_embeds, atol=1e-5)
    assert torch.allclose(clip.words(texts), known.text_embeds, atol=1e-5)
    assert torch.allclose(clip.words(texts[:1]), clip.words(texts)[:1], atol=1e-6)  # padding says nothing
    assert clip.words(["face " * 100]).isfinite().all()  # longer than it can read


def test_clip_in_the_older_layout_of_the_hub(judges, copied):
    folder = copied("clip")
    whole = load_json(folder / "tokenizer.json")["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "processor_config.json").unlink()
    save_json(folder / "vocab.json", whole["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, whole["merges"])]) + "\n")
    settings = {"crop_size": 24, "size": 24, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    save_json(folder / "preprocessor_config.json", {**settings, "feature_extractor_type": "CLIPFeatureExtractor"})
    tensors, _ = load_tensors(folder / "model.safetensors")
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    half = {name: value.half() for name, value in tensors.items()}
    save_tensors(folder / "model.safetensors", half | positions)
    older = judge("clip", str(folder), CPU)
    assert torch.allclose(older(PICTURES), judges["clip"](PICTURES), atol=2e-3)
    assert torch.allclose(older.words(["a photo of a face"]), judges["clip"].words(["a photo of a face"]), atol=2e-3)


# --- files


@pytest.mark.parametrize("name", ENCODERS)
def test_missing_weights_are_one_line(name, tmp_path):
    with pytest.raises(UserError, match=rf"judges\.{name}=.*there is no such folder; set judges\.{name} to a folder"):
        judge(name, str(tmp_path / "nothing"), CPU)
    with pytest.raises(UserError) as told:
        judge(name, "nobody/nothing@refs/pr/15", CPU)
    assert "fetch it with `hf download nobody/nothing --revision refs/pr/15`, set" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_pickle_is_refused(copied, name):
    folder = copied(name)
    (folder / "model.safetensors").unlink()
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors \(other formats can run code"):
        judge(name, str(folder), CPU)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("damage", ["cut", "narrow", "lacking", "nan", "settings", "words"])
def test_a_damaged_model_is_refused(copied, name, damage):
    folder = copied(name)
    file = folder / "model.safetensors"
    tensors, metadata = load_tensors(file)
    first = next(key for key in sorted(tensors) if key.endswith("patch_embedding.weight" if name == "clip" else
                                                            "patch_embed.proj.weight"))  # fmt: skip
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "settings":
        (folder / "config.json").write_text("{}")
    elif damage == "words":
        for path in folder.glob("tokenizer*.json"):
            path.unlink()
    else:
        value = tensors.pop(first)
        tensors |= {"narrow": {first: value[:8]}, "lacking": {}, "nan": {first: value * torch.nan}}[damage]
        save_tensors(file, tensors, metadata)
    if (name, damage) in (("dino", "words"), ("vicreg", "words")):  # they read none
        assert judge(name, str(folder), CPU).dim == 24
        return
    with pytest.raises(UserError, match=rf"judges\.{name}=.* holds no model of this kind"):
        judge(name, str(folder), CPU)
