"""`dry_run=true`: what a command would need, told from the configuration files alone, and what really is alive."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperdb import config as configuration
from hyperdb.adapters.inject import Injection
from hyperdb.runtime import precision
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.memory import LIBRARIES, TRAINED, Need, Peak, Sketch, need


@pytest.fixture
def weightless(tiny_base: Path, tmp_path: Path) -> Path:
    """Return a base's folder that has every configuration and no weights."""
    folder = tmp_path / "weightless"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.rglob("*.safetensors"))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [f"diffusion.path={folder}", "diffusion.size=32", "diffusion.device=cpu", "diffusion.dtype=fp32", *more]


def needed(stage: str, settings: Any, device: str) -> Need:
    return need(configuration.stage_module(stage).passes, settings, device)


def test_a_peak_is_of_what_is_alive_at_once() -> None:
    weight = torch.nn.Linear(256, 256, bias=False)
    with Peak(weight) as peak, torch.no_grad():
        x = torch.zeros(4, 256)
        for _ in range(3):
            x = weight(x)  # the old one is freed when the new one is there
        assert weight.weight.detach().untyped_storage().nbytes() == 4 * 256 * 256
    assert peak.bytes == 2 * 4 * 4 * 256


def test_the_sketch_of_a_pass_holds_what_the_pass_holds(tiny_base: Path) -> None:
    settings = configuration.load("personalize", [*words(tiny_base), "image=none", "hypernet=null"])
    sketch, base = Sketch(settings, "cpu"), settings.diffusion.load()
    with sketch.measure("pass"):
        sketch.denoise(3, sketch.factors(1, 5, trained=True))
    with Peak(base.unet, base.text_encoder, base.vae) as peak:
        factors = {
            layer.name: (torch.zeros(1, 5, layer.in_).requires_grad_(), torch.zeros(1, layer.out, 5).requires_grad_())
            for layer in sketch.layout.layers
        }
        injection = Injection(base.targets())
        injection.set(factors)
        context = base.text_encoder(base.tokenize(["a face"] * 3))[0]
        out = base.unet(torch.zeros(3, *base.latent_shape), torch.zeros(3, dtype=torch.long), context).sample
        out.square().mean().backward()
        injection.remove()
    assert sketch.passes["pass"] == pytest.approx(peak.bytes, rel=0.02)


@pytest.mark.parametrize(
    ("stage", "more", "passes"),
    [
        ("personalize", ["image=none", "hypernet=null"], {"encoding photos", "fast fine-tuning", "drawing"}),
        ("personalize", ["image=none", "hypernet=null", "preview=false"], {"encoding photos", "fast fine-tuning"}),
        ("generate", [], {"drawing"}),
        ("precompute", [], {"encoding photos", "fits", "where the fits begin"}),
        ("train_hypernet", ["model.encoder.size=32"], {"encoding photos", "training step", "validation"}),
        ("train_hypernet", ["model.encoder.size=32", "identity_weight=0.1"], {"training step", "identity loss"}),
        ("evaluate", ["hypernet=null"], {"encoding photos", "row shuffled_40", "drawing"}),
    ],
)
def test_a_dry_run_loads_and_writes_nothing(
    weightless: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], stage: str, more: list[str], passes: set[str]
) -> None:
    before = sorted(in_tmp.rglob("*"))
    assert configuration.run(stage, words(weightless, "dry_run=true", *more)) is None
    said = capsys.readouterr().out
    assert f"{stage} on cpu in fp32" in said
    assert "expected: " in said
    assert "UNet" in said
    assert all(name in said for name in passes)
    assert sorted(in_tmp.rglob("*")) == before
    with pytest.raises(UserError, match="no usable unet"):
        configuration.load(stage, words(weightless, *more)).diffusion.load()


def test_more_people_need_more_and_computing_again_needs_less(weightless: Path) -> None:
    def total(*more: str) -> int:
        return needed("precompute", configuration.load("precompute", words(weightless, *more)), "cpu").total

    one, two = total("batch=8"), total("batch=16")
    assert total("batch=16", "diffusion.checkpointing=true") < two
    assert one < two


def test_a_card_keeps_weights_in_bf16_and_a_trained_network_its_moments(weightless: Path, in_tmp: Path) -> None:
    told = ["model.encoder.size=32", "diffusion.dtype=bf16"]
    settings = configuration.load("train_hypernet", words(weightless, *told))
    here, there = needed("train_hypernet", settings, "cpu"), needed("train_hypernet", settings, "cuda")
    sizes = [{m.name: m.bytes for m in found.modules} for found in (here, there)]
    assert sizes[1]["UNet"] == pytest.approx(sizes[0]["UNet"] / 2, rel=0.01)
    assert sizes[1]["autoencoder"] == sizes[0]["autoencoder"]  # always float32
    decoder = next(m for m in there.modules if m.name == "hypernetwork decoder")
    assert decoder.extra == TRAINED * decoder.parameters
    assert next(m for m in there.modules if m.name == "image encoder").extra == 0
    stays = sum(m.bytes + m.extra for m in there.modules) + sum(d.bytes for d in there.data)
    assert there.total == round(LIBRARIES + stays + max(there.passes.values()))


def test_the_data_is_counted(
    weightless: Path, rendered: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["model.encoder.size=32", f"data={rendered}", "people=3", "validation=data/none", "alpha=1", "flips=true"]
    settings = configuration.load("train_hypernet", words(weightless, *told))
    found = needed("train_hypernet", settings, "cpu")
    data, validation = found.data
    shape = Sketch(settings, "cpu").base.latent_shape
    assert (data.pictures, data.people) == (9, 3)
    assert data.latents == 9 * 2 * 2 * 2 * math.prod(shape)  # pictures, turned or not, mean and deviation, float16
    assert validation.pictures == 0
    without = needed("train_hypernet", configuration.load("train_hypernet", words(weightless, told[0])), "cpu")
    assert found.total - without.total == data.bytes > 0
    configuration.run("train_hypernet", words(weightless, "dry_run=true", *told))
    said = capsys.readouterr().out
    assert "data/none                 not on this disk, not counted" in said
    assert "9     0.00 GB" in said
    assert "3 people" in said


def test_the_precision_told_is_the_one_used(weightless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configuration.load("generate", words(weightless, "diffusion.dtype=bf16"))
    for hardware, said in ((True, "bf16"), (False, "fp32, this CPU has no bf16")):
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda hardware=hardware: hardware)
        assert needed("generate", settings, "cpu").dtype == said
    assert needed("generate", settings, "cuda").dtype == "bf16"


def test_a_dry_run_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no base model at"):
        configuration.run("generate", ["diffusion.path=./nothing", "dry_run=true"])
    settings = ["diffusion=sd15", "diffusion.path=nobody/nothing", "dry_run=true"]
    with pytest.raises(UserError, match=r"`hf download nobody/nothing`.*diffusion=embedded"):
        configuration.run("generate", settings)


@pytest.mark.parametrize(
    "adapter",
    ["lora", "dora", "foura", "svdiff", "dreambooth", "textual_inversion", "a1111", "lorax", "custom_diffusion",
     "e4t", "plus"],
)
def test_a_dry_run_knows_every_adapter(weightless: Path, adapter: str) -> None:
    asked = ["image=none", f"adapter={adapter}", *(["adapter.encoder=null"] if adapter == "e4t" else [])]
    settings = configuration.load("personalize", [*words(weightless), *asked])
    found = needed("personalize", settings, "cpu").passes["fast fine-tuning"]
    bare = configuration.load("personalize", [*words(weightless), "image=none", "adapter=textual_inversion"])
    assert found >= needed("personalize", bare, "cpu").passes["fast fine-tuning"] > 0
    if adapter == "dreambooth":  # the numbers, their gradients and two averages of AdamW are alive at once
        numbers = sum(p.numel() for p in Sketch(settings, "cpu").base.unet.parameters())
        assert found > 4 * 4 * numbers


def test_a_dry_run_of_an_evaluation_counts_its_largest_row(weightless: Path) -> None:
    def found(*rows: str) -> Need:
        settings = [*words(weightless), "hypernet=null", "batch=20", f"rows=[{','.join(rows)}]"]
        return needed("evaluate", configuration.load("evaluate", settings), "cpu")

    none, large = found("floor", "copy"), found("floor", "dreambooth")
    assert list(none.passes) == ["encoding photos", "drawing"]
    assert large.passes == none.passes | {"row dreambooth": large.passes["row dreambooth"]}
    numbers = next(m.parameters for m in large.modules if m.name == "UNet")
    assert large.passes["row dreambooth"] > 20 * 4 * 4 * numbers  # of 20 people: numbers, gradients, two averages
    assert large.total - none.total == large.passes["row dreambooth"] - none.passes["drawing"]
    several = found("hyper_40", "no_hyper_40", "lidb_fit", "svdiff")  # the first two train the same
    assert list(several.passes) == ["encoding photos", "row hyper_40", "row lidb_fit", "row svdiff", "drawing"]
