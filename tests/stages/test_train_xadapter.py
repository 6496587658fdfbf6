"""`hyperdb train_xadapter` at tiny size: it learns, resumes, and an adapter of the old base steers the new one."""

from __future__ import annotations

import pytest
import torch

from hyperdb import config
from hyperdb.adapters import LoRAConfig
from hyperdb.data.people import load_people
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion import loss as module
from hyperdb.diffusion.targets import base_hash
from hyperdb.diffusion.xadapter import XAdapter
from hyperdb.faces.image import read_image
from hyperdb.formats.native import Part, Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.tuning.trainable import trainable

TINY = ["diffusion.size=32", "diffusion.dtype=fp32", "diffusion.device=cpu"]


def load(path):
    return DiffusionConfig(path=str(path), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture(scope="module")
def newer(tiny_base, tmp_path_factory):
    """Return the folder of a base whose UNet was moved away from the tiny one's."""
    from hyperdb.stages.train_base import save_base

    base, g = load(tiny_base), torch.Generator().manual_seed(0)
    for parameter in base.unet.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    save_base(base, folder := tmp_path_factory.mktemp("newer") / "base")
    return folder


def words(tiny_base, newer, rendered, out, *more):
    run = [f"data={rendered}", f"to={newer}", f"diffusion.path={tiny_base}", *TINY, f"out={out}", "width=8"]
    return [*run, "steps=4", "batch=2", "save_every=2", *more]


def test_it_learns_and_an_old_adapter_moves_the_new_bases_pictures(tiny_base, newer, rendered, tmp_path, capsys):
    out = config.run("train_xadapter", words(tiny_base, newer, rendered, tmp_path / "x", "steps=60", "rate=0.01"))
    report = load_json(out / "report.json")
    assert report["loss"]["steered"] < 0.97 * report["loss"]["alone"]
    assert report["loss"]["told"] > 0
    assert report["numbers"]["old_unet"] == report["numbers"]["new_unet"] > report["numbers"]["mapper"] > 0
    assert report["seconds_a_pass"]["alone"] > 0
    assert "both UNets run" in capsys.readouterr().out

    base = load(tiny_base)
    settings, adapter = trainable(base, LoRAConfig(rank=2))
    g = torch.Generator().manual_seed(3)
    params = {k: v + 0.5 * torch.randn(v.shape, generator=g) for k, v in adapter.init(1).items()}
    person = Personalization(
        adapter.layout, None, base=base_hash(base.targets()), rare_token="sks", class_word="face",
        parts=[Part(settings, adapter.layout, params)],
    ).save(tmp_path / "adapter.safetensors")  # fmt: skip
    drawing = [*TINY, "diffusion.steps=2", f"diffusion.path={newer}", "num_images=1"]
    pictures = {}
    for name, more in {
        "alone": [],
        "steered": [f"xadapter={out}"],
        "adapted": [f"xadapter={out}", f"adapter={person}"],
        "told": [f"xadapter={out}", f"adapter={person}", f"old={tiny_base}"],
    }.items():
        folder = config.run("generate", [*drawing, *more, f"out={tmp_path / name}"])
        pictures[name] = read_image(folder / "00000.png")
    assert (pictures["steered"] != pictures["alone"]).any()
    assert (pictures["adapted"] != pictures["steered"]).any()
    assert (pictures["told"] == pictures["adapted"]).all()
    assert "xadapter_digest" in load_json(tmp_path / "adapted" / "manifest.json")
    assert "xadapter_digest" not in load_json(tmp_path / "alone" / "manifest.json")


@pytest.mark.parametrize(("empty", "dropout"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_the_old_base_reads_the_caption_and_the_new_one_nothing(
    tiny_base, newer, rendered, tmp_path, monkeypatch, empty, dropout
):
    read = {"new": [], "old": []}
    loss, saying = module.diffusion_loss, XAdapter.saying
    monkeypatch.setattr(module, "diffusion_loss", lambda *a: read["new"].append(a[4]) or loss(*a))
    monkeypatch.setattr(XAdapter, "saying", lambda self, ids: read["old"].append(ids) or saying(self, ids))
    more = ["steps=1", f"empty={empty}", f"prompt_dropout={dropout}"]
    config.run("train_xadapter", words(tiny_base, newer, rendered, tmp_path / "x", *more))
    base = load(newer)
    nothing, captions = base.tokenize([""]), base.tokenize(load_people(rendered).captions)
    new, old = read["new"][0], read["old"][0]  # of the step; what follows measures
    assert len(new) == len(old) == 2
    if dropout:
        assert torch.equal(old, nothing.expand_as(old))
    else:
        assert all((captions == ids).all(1).any() for ids in old)
    assert torch.equal(new, nothing.expand_as(new) if empty else old)


def test_a_resumed_training_is_an_undisturbed_one(tiny_base, newer, rendered, tmp_path, killed, watched):
    whole = config.run("train_xadapter", words(tiny_base, newer, rendered, tmp_path / "whole", "tracker=tensorboard"))
    assert watched(whole) >= {"loss", "rate/0", "held_out/steered", "held_out/alone", "held_out/told"}
    parts = words(tiny_base, newer, rendered, tmp_path / "parts")
    killed("train_xadapter", parts)
    again = config.run("train_xadapter", parts)
    one, two = (load_tensors(out / "xadapter.safetensors")[0] for out in (whole, again))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(one[k].abs().sum() > 0 for k in one if k.endswith("4.weight"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["empty=2"], "empty=2.0: expected a share"),
        (["width=0"], "width=0: expected 1 to 4096"),
        (["diffusion.dtype=fp16"], "dtype=fp16 loses small gradients"),
        (["to=nowhere/at_all"], "nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_base, newer, rendered, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        config.run("train_xadapter", words(tiny_base, newer, rendered, tmp_path / "x", *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["old=x"], "old=x is the base of an xadapter"),
        (["xadapter=x", "dry_run=true"], "dry_run counts one base"),
        (["xadapter=nowhere"], "no X-Adapter at nowhere"),
    ],
)
def test_generate_refuses_what_is_none(tiny_base, in_tmp, more, message):
    with pytest.raises(UserError, match=message):
        config.run("generate", [*TINY, f"diffusion.path={tiny_base}", *more])
