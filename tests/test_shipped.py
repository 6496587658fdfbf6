"""The weights in the package are one set: each was made from the others that lie beside it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import hyperdb
from hyperdb import config, heads
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.diffusion.targets import base_hash
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics import judge
from hyperdb.runtime.files import load_json, load_metadata, load_tensors, save_json
from hyperdb.runtime.paths import resolve
from hyperdb.tuning.prior import load_prior

EMBEDDED = resolve("package:embedded")


@pytest.fixture(scope="module")
def model():
    return hyperdb.load()


def test_the_hypernetwork_belongs_to_the_base(model):
    hypernet = Hypernet.load(EMBEDDED / "hypernet" / "hypernet.safetensors")
    assert hypernet.metadata["base"] == model.base.digest
    assert hypernet.lidb.layout == Layout.of(model.base.targets())


def test_another_base_has_another_name(model, tmp_path):
    """The least change of its settings is another base."""
    copy = shutil.copytree(EMBEDDED / "base", tmp_path / "base")
    assert replace(model.base.config, path=str(copy)).load().digest == model.base.digest
    file = copy / "scheduler" / "scheduler_config.json"
    save_json(file, {**load_json(file), "prediction_type": "epsilon"})
    assert replace(model.base.config, path=str(copy)).load().digest != model.base.digest


def test_the_directions_are_in_the_hypernetworks_bases(model):
    hypernet = Hypernet.load(EMBEDDED / "hypernet" / "hypernet.safetensors")
    tensors, metadata = load_tensors(EMBEDDED / "directions.safetensors")
    assert metadata["lidb"] == hypernet.lidb.fingerprint
    assert metadata["base"] == base_hash(model.base.targets())
    assert tensors["directions"].shape == (len(metadata["attributes"].split()), hypernet.lidb.numbers)


def test_the_shipped_judges_know_people_in_styles_and_captions():
    people = [heads.Identity(seed) for seed in heads.SPLITS["test"][:6]]
    rng = np.random.default_rng(0)
    shown = {style: [heads.sample_view(rng, style=style) for _ in people] for style in ("photo", "oil", "sketch")}

    def rendered(views):
        each = [torch.from_numpy(heads.render(who, view)) for who, view in zip(people, views, strict=True)]
        return torch.stack(each).permute(0, 3, 1, 2)

    pictures = {style: rendered(views) for style, views in shown.items()}
    verifier = judge("verifier", str(EMBEDDED / "judges" / "verifier"), torch.device("cpu"))
    given = rendered([heads.sample_view(rng, style="photo") for _ in people])
    photos = verifier(given)
    assert torch.allclose((photos * photos).sum(-1), torch.ones(6))  # a picture and itself
    for images in pictures.values():
        cosine = verifier(images) @ photos.T
        own = cosine.diagonal().clone()
        assert own.mean() > cosine.fill_diagonal_(0).sum() / 30 + 0.2  # the person above others
    clip = judge("clip", str(EMBEDDED / "judges" / "clip"), torch.device("cpu"))
    words = clip.words([heads.prompt(style) for style in pictures])
    named = [(clip(images) @ words.T).argmax(1) for images in pictures.values()]
    right = torch.cat([found == i for i, found in enumerate(named)])
    assert right.float().mean() > 0.8
    vicreg = judge("vicreg", str(EMBEDDED / "judges" / "vicreg"), torch.device("cpu"))
    cosine = vicreg(pictures["photo"]) @ vicreg(given).T
    assert cosine.diagonal().mean() > (cosine.sum() - cosine.trace()) / 30  # the person above others, without labels
    every = torch.cat([pictures["photo"], pictures["oil"]])
    seen, darker = vicreg(every), vicreg((every.float() * 0.9).byte().roll(2, 3))
    assert ((seen @ darker.T).argmax(1) == torch.arange(len(every))).all()  # a picture is nearest to itself
    one, several = clip(pictures["oil"][:1]), clip(pictures["oil"])
    assert torch.allclose(one, several[:1], atol=1e-5)  # whatever the batch


def test_the_shipped_prior_is_used(model, monkeypatch, tmp_path):
    shipped = EMBEDDED / "hypernet" / "prior.safetensors"
    assert load_metadata(shipped)["key"].startswith(model.base.digest)
    settings = config.load("personalize", ["image=none"]).prior
    load_prior(model.base, settings, tmp_path / "prior.safetensors", shipped)
    assert list(tmp_path.iterdir()) == []  # nothing had to be sampled


def test_a_plain_pipeline_loads_the_base_and_draws_what_we_draw(model):
    pipe = StableDiffusionPipeline.from_pretrained(Path(EMBEDDED / "base"), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    base = model.base
    noise, generator = start_noise(base, [3]), torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = pipe("a pencil sketch of a face", generator=generator, height=128, width=128, **settings).images
    base.config.dtype = "fp32"
    with torch.no_grad():
        ours = sample(base, ["a pencil sketch of a face"], noise, steps=2, guidance=3.0)
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_sizes():
    def megabytes(folder):
        return sum(f.stat().st_size for f in (EMBEDDED / folder).rglob("*.safetensors")) / 1e6

    assert megabytes("base") <= 53
    assert megabytes("hypernet") <= 24
