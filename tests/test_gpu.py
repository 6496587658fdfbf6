"""What must hold on a graphics card: every stage runs there, and its results are the CPU's to the card's precision.

    python3 -m pytest -m gpu -q
"""

from __future__ import annotations

import json

import pytest
import torch

from hyperdb import config as configuration
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.adapters.lora import LoRA
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.loss import diffusion_loss
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors
from hyperdb.runtime.journal import read
from hyperdb.tuning.fit import FitConfig, fit
from hyperdb.tuning.prior import PriorConfig, load_prior

pytestmark = pytest.mark.gpu


def _load(folder, device, **more):
    settings = {"size": 32, "dtype": "fp32", "steps": 3, **more}
    return DiffusionConfig(path=str(folder), device=device, **settings).load()


@pytest.fixture(scope="module")
def pair(tiny_base):
    """Return the same base on the CPU and on the card, both in float32."""
    return _load(tiny_base, "cpu"), _load(tiny_base, "cuda")


@pytest.fixture(scope="module")
def moments(pair):
    return torch.rand(2, 1, 2, *pair[0].latent_shape, generator=torch.Generator().manual_seed(3))


TINY = ["model.encoder.name=vit_tiny_patch16_224", "model.encoder.size=32", "model.encoder.patch=8",
        "model.encoder.depth=1", "model.encoder.weights=null", "model.width=32", "model.heads=2", "model.layers=1",
        "model.summary=4"]  # fmt: skip


@pytest.fixture(scope="module")
def words(tiny_base):
    return [f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", "adapter.a=8", "adapter.b=4",
            "prior.images=4"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(words, rendered, tmp_path_factory):
    """Return fits and a hypernetwork of two steps, both losses, made on the card."""
    out = tmp_path_factory.mktemp("card")
    configuration.run("precompute", [*words, f"data={rendered}", f"out={out / 'fits'}", "identities=4", "fit.steps=2"])
    configuration.run("train_hypernet", [
        *words, *TINY, f"data={rendered}", f"out={out / 'hypernet'}", f"weights={out / 'fits'}", "beta=0.1",
        "validation=null", "steps=3", "batch=2", "levels=2", "warmup=1", "fit_share=1.0", "identity_weight=0.1",
        "identity_people=1", "identity_steps=2", "target_style=any",
    ])  # fmt: skip
    return out


def test_auto_is_the_card_and_a_process_has_its_own(monkeypatch):
    from hyperdb.diffusion.base import pick_device

    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device("auto") == torch.device("cuda", 0)


def test_weights_rest_in_the_compute_dtype(tiny_base):
    base = _load(tiny_base, "cuda", dtype="bf16")
    assert base.unet.dtype is base.text_encoder.dtype is torch.bfloat16
    assert base.vae.dtype is torch.float32


def test_pictures_are_the_cpus(pair):
    drawn = []
    for base in pair:
        latents = sample(base, ["a photo of a face", "a pencil sketch of a face"], start_noise(base, [0, 1]))
        drawn.append(base.decode(latents).float())
    assert (drawn[0] - drawn[1]).abs().max() <= 2


def test_losses_are_the_cpus(pair):
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(4, *pair[0].latent_shape, generator=g) for _ in "zn")
    t = torch.tensor([10, 300, 600, 990])
    losses = []
    for base in pair:
        ids = base.tokenize(["a sks face"] * 4)
        losses.append(diffusion_loss(base, *(x.to(base.device) for x in (z, noise, t)), ids).cpu())
    assert torch.allclose(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_fits_are_the_cpus(pair, moments, tmp_path):
    found = []
    for base in pair:
        lidb = LiDB(Layout.of(base.targets()), a=12, b=8)
        kept = tmp_path / f"{base.device.type}.safetensors"
        prior = load_prior(base, PriorConfig(prompts=["a face"], images=4), kept)
        settings = FitConfig(steps=3, levels=2, rate=1e-3, prior_weight=0.5, prior_rows=1)
        found.append(fit(base, lidb, moments, settings, prior=prior)["tokens"].cpu())
    assert not torch.equal(found[0][0], found[0][1])
    # Adam's first steps have the size of the rate whatever the gradient: signs of the smallest ones may differ
    assert ((found[0] - found[1]).abs() < 1e-4).float().mean() > 0.98


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fine_tuning_in_half_precision_learns(tiny_base, moments, dtype):
    base = _load(tiny_base, "cuda", dtype=dtype)
    losses: list[float] = []
    settings = FitConfig(steps=30, levels=4, rate=1e-2)
    fit(base, LoRA(Layout.of(base.targets()), rank=4), moments, settings, progress=lambda _, x: losses.append(x))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_fp16_is_refused_where_it_would_lose_gradients(words):
    with pytest.raises(UserError, match="bf16"):
        configuration.load("train_hypernet", [*words, "diffusion.dtype=fp16"])


def test_checkpointing_changes_no_gradient(tiny_base, moments):
    found = []
    for checkpointing in (False, True):
        base = _load(tiny_base, "cuda", checkpointing=checkpointing)
        lidb = LiDB(Layout.of(base.targets()), a=12, b=8)
        found.append(fit(base, lidb, moments, FitConfig(steps=1, levels=2, rate=1e-2))["tokens"])
    assert torch.allclose(*found, atol=1e-4)


def test_many_people_in_one_pass_are_each_alone(pair):
    base = pair[1]
    lidb = LiDB(Layout.of(base.targets()), a=12, b=8).to("cuda")
    tokens = lidb.init(2)["tokens"] + 0.1 * torch.arange(2, device="cuda")[:, None, None]
    injection, noise = Injection(base.targets()), start_noise(base, [0, 1])
    with torch.no_grad():
        injection.set(lidb.factors({"tokens": tokens}), repeat=2)
        both = sample(base, ["a sks face"] * 2, noise)
        alone = []
        for i in range(2):
            injection.set(lidb.factors({"tokens": tokens[i : i + 1]}), repeat=2)
            alone.append(sample(base, ["a sks face"], noise[i : i + 1]))
    injection.remove()
    assert torch.allclose(both, torch.cat(alone), atol=2e-2)


def test_fits_and_hypernetwork_train_and_resume(trained, words, rendered):
    records = read(trained / "hypernet/journal.jsonl")
    assert records[-1]["step"] == 3
    assert {"diffusion", "prior", "weights", "identity"} <= records[-1].keys()
    model = Hypernet.load(trained / "hypernet/hypernet.safetensors")
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(model(images), model.to("cuda")(images.cuda()).cpu(), atol=1e-2)


def test_a_person_is_personalised_and_drawn(trained, words, tmp_path):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    person = ["align=false", f"hypernet={trained / 'hypernet'}", "finetune.steps=3", "preview=false"]
    configuration.run("personalize", [*words, *person, f"image={tmp_path / 'photo.png'}", f"out={tmp_path / 'ada'}"])
    drawn = ["num_images=2", f"adapter={tmp_path / 'ada'}", f"out={tmp_path / 'drawn'}", "prompt=a [V] face"]
    configuration.run("generate", [w for w in words if w.startswith("diffusion")] + drawn)
    assert len(list((tmp_path / "drawn").glob("0000*.png"))) == 2


def test_e4t_is_pretrained_and_tuned(e4t, words, tmp_path):
    from hyperdb.faces.image import save_png

    save_png(tmp_path / "photo.png", torch.full((32, 32, 3), 99, dtype=torch.uint8).numpy(), {})
    person = ["adapter=e4t", f"adapter.encoder={e4t}", "align=false", "finetune.steps=2", "preview=false"]
    photo = [f"image={tmp_path / 'photo.png'}", f"out={tmp_path / 'ada'}"]
    configuration.run("personalize", [*words[:3], *person, *photo])
    begun, tuned = (load_tensors(file)[0] for file in (e4t, tmp_path / "ada/adapter.safetensors"))
    assert tuned["part0:vector"].shape == begun["centre"][0].shape
    assert all(value.isfinite().all() for value in tuned.values())


def test_the_embedded_trainings_run(rendered, words, tmp_path):
    common = [f"data={rendered}", "steps=2", "batch=2"]
    encoder = ["encoder.size=32", "held_out=1", "portrait=8", f"out={tmp_path / 'encoder'}"]
    configuration.run("train_encoder", [*common, *encoder])
    vae = ["channels=[8,16]", "held_out=2", f"out={tmp_path / 'vae'}"]
    configuration.run("train_autoencoder", [*common, *vae, "crop=16"])
    sharp = [f"init={tmp_path / 'vae/vae'}", "decoder_only=true", "adversarial_weight=0.1", "feature_weight=0.1"]
    sharp += ["encoder.size=32", f"encoder.weights={tmp_path / 'encoder/encoder.safetensors'}"]
    configuration.run("train_autoencoder", [*common, *vae[:2], *sharp, f"out={tmp_path / 'sharp'}"])
    made = json.loads((tmp_path / "sharp/report.json").read_text())
    assert made["steps"] == 2
    base = ["channels=[16,32]", "heads=[1,2]", "text_width=32", "text_layers=1", "logit_normal=[0,1]"]
    configuration.run("train_base", [*common, *base, f"vae={tmp_path / 'sharp/vae'}", f"out={tmp_path / 'base'}"])
    for judge in ("prompts", "clip", "vicreg", "verifier"):
        held = [f"judge={judge}", "held_out=2", f"out={tmp_path / judge}"]
        configuration.run("train_judge", [*common, *words[:3], *held])
    for part in ("base/base/unet", "prompts/judge.safetensors", "clip/judge", "vicreg/judge", "verifier/judge"):
        assert (tmp_path / part).exists()
