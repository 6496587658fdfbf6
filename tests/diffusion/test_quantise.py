"""A base in fewer bits: still the same base by name, trained on top, and said in one line where torchao is missing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

from hyperdb import config
from hyperdb.adapters import DoRAConfig, LoRAConfig, LoRAXConfig, SVDiffConfig
from hyperdb.adapters.inject import Injection, settled
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.diffusion import DiffusionConfig, quantise
from hyperdb.diffusion.targets import base_hash
from hyperdb.faces.image import read_text, save_png
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.prior import PriorConfig, load_prior

KINDS = {"int8": 8, "nf4": 4}
WITHOUT = "torchao is not installed: pip install -e '.[quantise]'"
NEEDED = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason=WITHOUT)
OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torchao")


@pytest.fixture
def settings(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu")


def test_the_bytes_of_a_model_are_those_of_its_numbers():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32)).half()
    assert quantise.stored(model) == 2 * (64 * 32 + 32 + 4 * 32) + 8  # and how many batches were seen


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_one_line_says_what_to_install(settings, monkeypatch, kind):
    find = importlib.util.find_spec
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(UserError, match=rf"^diffusion\.quantise={kind} needs torchao: pip install -e '.*\]'$"):
        replace(settings, path="./nowhere", quantise=kind).load()


def test_a_dry_run_counts_the_layers_in_fewer_bits(capsys):
    """By hand: 96 x 96 weights in float32, and as int8 with a scale and a zero a row, or as nf4 in 144 blocks."""
    layer = nn.Sequential(nn.Linear(96, 96), nn.Conv2d(3, 3, 3))
    assert quantise.fewer(layer, "int8") == 4 * 96**2 - (96**2 + 96 * (4 + 1))
    assert quantise.fewer(layer, "nf4") == 4 * 96**2 - (96**2 // 2 + 144 + 4 * 9 + 4 + 4 * 16)
    assert quantise.fewer(nn.Linear(3, 3), "nf4") == 0  # no multiple of 64
    config.run("personalize", ["image=none.png", "diffusion.quantise=nf4", "dry_run=true"])
    said = capsys.readouterr().out
    assert "the base's linear layers in nf4; nothing is loaded or written" in said


def test_another_kind_is_refused(settings):
    with pytest.raises(UserError, match="quantise='int4': expected int8, nf4 or null"):
        replace(settings, quantise="int4")


@NEEDED
@OWN
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_base_in_fewer_bits(settings, kind):
    plain, fewer = settings.load(), replace(settings, quantise=kind).load()
    assert fewer.digest == plain.digest
    assert base_hash(fewer.targets()) == base_hash(plain.targets())
    for name in ("unet", "text_encoder"):  # a dry run counts what it really takes
        less = quantise.fewer(getattr(plain, name), kind)
        assert quantise.stored(getattr(fewer, name)) == quantise.stored(getattr(plain, name)) - less
    steps = 2 ** (KINDS[kind] - 1) - 1
    layers = [(name, Site(name, module), plain.targets()[name]) for name, module in fewer.targets().items()]
    assert all(site.shape == tuple(layer.weight.shape) for _, site, layer in layers)
    for _, site, layer in layers:
        error = (site.weight() - layer.weight).abs().max() / layer.weight.abs().max()
        assert 0 < error < (0.51 if kind == "int8" else 1.2) / steps
    assert 0 < quantise.stored(fewer.unet) < quantise.stored(plain.unet)
    inputs = torch.randn(2, *plain.latent_shape), torch.tensor([10, 900])
    with torch.no_grad():
        words = [base.text_encoder(base.tokenize(["a sks face"] * 2))[0] for base in (plain, fewer)]
        a, b = (base.unet(*inputs, w).sample for base, w in zip((plain, fewer), words, strict=True))
    assert 0 < (a - b).norm() / a.norm() < 2 / steps


@NEEDED
@OWN
@pytest.mark.parametrize("adapter", [LoRAConfig(rank=2), DoRAConfig(rank=2)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_top_does_what_its_dense_change_does(settings, kind, adapter):
    base = replace(settings, quantise=kind).load()
    sites = {name: Site(name, module) for name, module in base.targets().items()}
    made, g = adapter.build(Layout.listing(sites)), torch.Generator().manual_seed(0)
    params = {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in made.init(1, sites).items()}
    params = {k: v.requires_grad_() for k, v in params.items()}
    for name in list(sites)[:6]:
        x = torch.randn(3, 4, sites[name].shape[1], generator=g)
        change, wanted = made.changes(params)[name], nn.functional.linear(x, sites[name].weight())
        wanted = wanted + x @ change.dense(sites[name].weight())[0].mT
        if (bias := sites[name].module.bias) is not None:
            wanted = wanted + bias
        injection = Injection({name: sites[name]})
        for ready in (change, settled({name: change}, sites)[name]):
            with injection.using({name: ready}):
                y = sites[name].module(x)
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        injection.remove()
    with Injection(sites).using(made.changes(params)):
        words = base.text_encoder(base.tokenize(["a sks face"]))[0]
        base.unet(torch.randn(1, *base.latent_shape), torch.tensor([10]), words).sample.square().sum().backward()
    assert all(v.grad is not None and v.grad.any() for v in params.values())


@NEEDED
@OWN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [LoRAXConfig(rank=4), SVDiffConfig()])
def test_numbers_along_the_singular_vectors_need_the_weights_as_they_are(settings, kind, adapter):
    base = replace(settings, quantise=kind).load()
    sites = {name: Site(name, module) for name, module in base.targets().items()}
    name = next(iter(sites))
    made = adapter.build(Layout.listing({name: sites[name]}))
    change = made.changes({k: torch.ones_like(v) for k, v in made.init(1, sites).items()})
    with pytest.raises(UserError, match=r"singular vectors .* leave out diffusion"):
        settled(change, sites)


@NEEDED
@OWN
def test_its_class_pictures_are_its_own(settings, tmp_path):
    """The shipped ones, and what the base predicts for them, are those of the base in all its bits."""
    asked = PriorConfig(prompts=["a face"], images=1, levels=1)
    kept = {
        kind: load_prior(replace(settings, steps=2, quantise=kind).load(), asked, tmp_path / "prior.safetensors").own
        for kind in (None, "nf4")
    }
    assert not torch.equal(kept[None], kept["nf4"])


@NEEDED
@OWN
@pytest.mark.parametrize("kind", KINDS)
def test_a_photo_is_personalised_on_it_and_the_file_is_for_the_base_as_it_is(settings, kind, tmp_path):
    photo = tmp_path / "photo.png"
    save_png(photo, torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0)).byte().numpy(), {})
    words = [f"diffusion.path={settings.path}", "diffusion.size=32", "diffusion.steps=2", f"diffusion.quantise={kind}"]
    trained = ["prior.images=2", "prior.levels=2", "finetune.steps=4", "finetune.rate=0.05", "preview=false"]
    photo_words = [f"image={photo}", "align=false", "adapter=lora", f"out={tmp_path / 'a'}"]
    out = config.run("personalize", [*words, *trained, *photo_words])
    person = Personalization.load(out / "adapter.safetensors")
    assert person.base == base_hash(settings.load().targets())
    assert any(value.any() for name, value in person.parts[0].params.items() if name.endswith(".up"))
    drawn = ["num_images=1", "prompt=a photo of a [V] face", f"out={tmp_path / 'b'}"]
    picture = config.run("generate", [*words, *drawn, f"adapter={out}"]) / "00000.png"
    assert read_text(picture)["quantise"] == kind
