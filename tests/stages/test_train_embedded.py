"""The trainings of the embedded base at tiny size: they run, resume, and write a folder diffusers loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from hyperdb import config as configuration
from hyperdb.data.people import load_people
from hyperdb.runtime import checkpoint
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_tensors
from hyperdb.stages.train_encoder import components


@pytest.fixture(scope="module")
def vae(rendered, tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder")
    words = [f"data={rendered}", f"out={out}", "channels=[8,16]", "steps=2", "batch=2", "held_out=2"]
    configuration.run("train_autoencoder", words)
    return out / "vae"


def _base_words(rendered, vae, out):
    return [
        f"data={rendered}", f"vae={vae}", f"out={out}", "channels=[16,32]", "heads=[1,2]", "text_width=32",
        "text_layers=1", "steps=4", "batch=2", "save_every=2",
    ]  # fmt: skip


def _changed(vae, folder):
    """Copy an autoencoder with its weights changed a little."""
    path = shutil.copytree(vae, folder) / "diffusion_pytorch_model.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, {k: 1.1 * v for k, v in tensors.items()}, metadata)
    return folder


def test_autoencoder_reports_and_scales(rendered, vae):
    """The latents of whom it was trained on have deviation 1, and the report is that of whom it was not."""
    report, model = json.loads((vae.parent / "report.json").read_text()), AutoencoderKL.from_pretrained(vae)
    images = load_people(rendered).images.float() / 127.5 - 1
    with torch.no_grad():
        latents = [model.encode(x).latent_dist.mean for x in (images[:9], images[9:])]
        away = (model.decode(latents[1]).sample.clamp(-1, 1) - images[9:]) / 2
    assert latents[0].std().item() * model.config.scaling_factor == pytest.approx(1, abs=1e-4)
    assert report["psnr_held_out"] == pytest.approx(-10 * away.square().mean().log10().item(), abs=0.01)
    assert (vae.parent / "reconstructions.png").is_file()


def test_an_autoencoder_can_be_trained_on(rendered, vae, tmp_path):
    words = [f"data={rendered}", f"out={tmp_path}", "steps=1", "batch=2", "held_out=2", "rate=1e-9"]
    configuration.run("train_autoencoder", [*words, f"init={vae}"])
    name = "diffusion_pytorch_model.safetensors"
    one, two = (load_tensors(f / name)[0] for f in (vae, tmp_path / "vae"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    assert json.loads((tmp_path / "report.json").read_text())["init"]
    with pytest.raises(UserError, match="nothing_here"):
        configuration.run("train_autoencoder", [*words, "init=nothing_here"])


def test_base_trains_resumes_and_goes_on(rendered, vae, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    configuration.run("train_base", _base_words(rendered, vae, whole))
    save = checkpoint.save

    def save_and_die(path, step, *rest):
        save(path, step, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        configuration.run("train_base", _base_words(rendered, vae, parts))
    monkeypatch.setattr(checkpoint, "save", save)
    configuration.run("train_base", _base_words(rendered, vae, parts))
    name = "base/unet/diffusion_pytorch_model.safetensors"
    one, two = (load_tensors(f / name)[0] for f in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)
    pipeline = StableDiffusionPipeline.from_pretrained(whole / "base", safety_checker=None)
    assert pipeline.tokenizer.model_max_length == 24
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    # a further segment from the written weights
    segment = [f"data={rendered}", f"init={whole / 'base'}", f"out={tmp_path / 'segment'}", "steps=1", "batch=2"]
    configuration.run("train_base", [*segment, f"vae={_changed(vae, tmp_path / 'vae')}"])
    assert json.loads((tmp_path / "segment" / "report.json").read_text())["init"]
    name = "diffusion_pytorch_model.safetensors"
    inside, given = (load_tensors(f / name)[0] for f in (tmp_path / "segment" / "base" / "vae", tmp_path / "vae"))
    assert all(torch.allclose(inside[k].float(), given[k].float(), atol=1e-2) for k in given)


def test_a_missing_autoencoder_is_named(rendered, tmp_path):
    with pytest.raises(UserError, match="train_autoencoder"):
        configuration.run("train_base", [f"data={rendered}", f"vae={tmp_path / 'no'}", f"out={tmp_path / 'out'}"])


def test_every_word_of_the_captions_is_one_token(rendered):
    from hyperdb.heads.captions import vocabulary
    from hyperdb.stages.train_base import build_tokenizer

    tokenizer = build_tokenizer(vocabulary(), 24)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer("a photo of a sks face")["input_ids"][0] == tokenizer.bos_token_id


def test_encoder_needs_enough_people(rendered, tmp_path):
    with pytest.raises(UserError, match="lower held_out"):
        configuration.run("train_encoder", [f"data={rendered}", f"out={tmp_path}"])


def test_encoder_trains(rendered, tmp_path):
    small = ["batch=2", "held_out=1", "steps=2", "encoder.size=32", "portrait=16", "shape=3"]
    configuration.run("train_encoder", [f"data={rendered}", f"out={tmp_path}", *small])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["people_held_out"] == report["rank1_held_out"] == 1  # alone, that person is the nearest
    assert report["portrait_r2"] < 0.5  # two steps teach no stranger's portrait
    assert report["shape_r2"] < 0.5
    tensors, _ = load_tensors(tmp_path / "encoder.safetensors")
    means = [v for k, v in tensors.items() if k.endswith("running_mean")]
    assert means
    assert all((v != 0).any() for v in means)


def test_components_come_largest_first_and_of_unit_variance():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    points = corners * torch.tensor([1.0, 5.0, 3.0]) + 7
    found = components(points, 2)
    unit = (7 / 8) ** 0.5  # by hand: of eight points, variance 8 / 7; an axis points to its largest coordinate's side
    assert torch.allclose(found, corners[:, [1, 2]] * unit, atol=1e-5)
    assert components(points[:3], 40).shape == (3, 2)
    assert components(points, 0).shape == (8, 0)


def test_judge_trains(tiny_base, rendered, tmp_path):
    words = [f"data={rendered}", f"out={tmp_path}", f"diffusion.path={tiny_base}", "diffusion.size=32"]
    configuration.run("train_judge", [*words, "batch=4", "held_out=1", "steps=2"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["accuracy_renders"]) == {"style", "place"}
    assert (tmp_path / "judge.safetensors").is_file()
