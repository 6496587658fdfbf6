"""An adapter on another version of its base: what of it fits there, what is said of the rest."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperdb import config
from hyperdb.adapters import (
    A1111Config,
    CustomConfig,
    DoRAConfig,
    FullConfig,
    LiDBConfig,
    LoRAXConfig,
    PlusConfig,
    SVDiffConfig,
    TokenConfig,
)
from hyperdb.adapters.base import delta
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.targets import base_hash
from hyperdb.diffusion.xadapter import Mapper
from hyperdb.faces.image import read_image
from hyperdb.formats.native import Part, Personalization, places
from hyperdb.report import results
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.tuning.trainable import trainable

OTHER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KINDS = {
    "lorax": LoRAXConfig(rank=5), "svdiff": SVDiffConfig(sites="attention"), "dora": DoRAConfig(rank=2),
    "a1111": A1111Config(bias=False),
}  # fmt: skip


def load(path):
    return DiffusionConfig(path=str(path), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture(scope="module")
def versions(tiny_base, tmp_path_factory):
    """Return the folders of a base trained a little further, one layer of which is new, and of an unrelated one."""
    from hyperdb.stages.train_base import save_base

    folder = tmp_path_factory.mktemp("versions")
    for name, share in (("further", 0.01), ("unrelated", 1.0)):
        base, g = load(tiny_base), torch.Generator().manual_seed(0)
        for module in base.targets().values():
            spread = module.weight.std()
            module.weight.mul_(1 - share).add_(share * spread * torch.randn(module.weight.shape, generator=g))
        if name == "further":
            base.targets()[OTHER].weight.normal_(generator=g)
        save_base(base, folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def person(tiny_base):
    """Return a prediction with relaxed factors."""
    base, g = load(tiny_base), torch.Generator().manual_seed(1)
    layout, settings = Layout.of(base.targets()), LiDBConfig(12, 8)
    tokens = torch.randn(settings.build(layout).mask.shape, generator=g)
    relaxed = {
        x.name: (torch.randn(1, 2, x.in_, generator=g), torch.randn(1, x.out, 2, generator=g)) for x in layout.layers
    }
    return Personalization(layout, tokens, settings, base_hash(base.targets()), "zwx", "face", relaxed)


def transfer(tiny_base, person, to, tmp_path, *words):
    file = person.save(tmp_path / "old.safetensors")
    settings = [f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.dtype=fp32", "diffusion.device=cpu"]
    out = f"out={tmp_path / 'out'}"
    return config.run("transfer", [*settings, f"adapter={file}", f"to={to}", out, *words])


def wanted(dense, weight, subspace):
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    u, vt = u[:, :subspace], vt[:subspace]
    return u @ u.mT @ dense @ vt.mT @ vt


def test_a_prediction_moves_to_the_next_version(tiny_base, versions, person, tmp_path, capsys):
    out = transfer(tiny_base, person, versions["further"], tmp_path, "subspace=6", "rank=8")
    told, said = load_json(out / "transfer.json"), capsys.readouterr().out
    assert told["skipped"] == {OTHER: "other singular vectors"}
    assert f"left out (other singular vectors): {OTHER}" in said
    moved, base = Personalization.load(out / "adapter.safetensors"), load(versions["further"])
    assert (moved.rare_token, moved.class_word, moved.base) == ("zwx", "face", base_hash(base.targets()))
    factors = moved.factors()
    assert OTHER not in moved.relaxed
    table = (out / "transfer.md").read_text()
    for name, (down, up) in person.factors().items():
        row = told["layers"][name]
        assert f"| `{name}` |" in table
        if name == OTHER:
            assert min(row["inputs"], row["outputs"]) < 0.8
            continue
        new = wanted(delta(down, up)[0], base.targets()[name].weight, 6)
        torch.testing.assert_close(delta(*factors[name])[0], new, rtol=1e-3, atol=1e-3)
        assert min(row["inputs"], row["outputs"]) > 0.8
        assert row["kept"] == pytest.approx(float(new.square().sum() / delta(down, up).square().sum()), abs=1e-3)
    words = [f"diffusion.path={versions['further']}", "diffusion.size=32", "diffusion.rare_token=zwx", "steps=2"]
    drawn = [
        config.run("generate", [*words, "num_images=1", f"strength={x}", f"adapter={out}", f"out={tmp_path / str(x)}"])
        for x in (0, 1)
    ]
    assert (read_image(drawn[0] / "00000.png") != read_image(drawn[1] / "00000.png")).any()


def test_a_change_moves_in_as_many_directions_as_the_narrowest_layer_has(tiny_base, versions, person, tmp_path):
    told = load_json(transfer(tiny_base, person, versions["further"], tmp_path) / "transfer.json")
    assert told["subspace"] == min(min(x.out, x.in_) for x in person.layout.layers)
    wide = [x.name for x in person.layout.layers if min(x.out, x.in_) > told["subspace"] and x.name != OTHER]
    assert wide
    assert all(told["layers"][name]["kept"] < 0.9 for name in wide)


def test_an_unrelated_base_gets_nothing_unless_asked(tiny_base, versions, person, tmp_path):
    with pytest.raises(UserError, match=r"nothing of .* can be moved .*other singular vectors, similarity 0\.\d\d"):
        transfer(tiny_base, person, versions["unrelated"], tmp_path)
    assert not Path(tmp_path / "out").exists()
    told = load_json(transfer(tiny_base, person, versions["unrelated"], tmp_path, "least=0") / "transfer.json")
    rows = told["layers"].values()
    assert told["skipped"] == {}
    assert 0.3 < sum(row["inputs"] for row in rows) / len(rows) < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_can_be_merged_becomes_a_lora_of_its_own_base(tiny_base, person, tmp_path, kind):
    base, g = load(tiny_base), torch.Generator().manual_seed(2)
    settings = KINDS[kind]
    sites = {name: Site(name, module) for name, module in base.places(settings.where()).items()}
    layout = Layout.listing(sites)
    start = settings.build(layout).init(1, sites)
    params = {name: x + 0.3 * torch.randn(x.shape, generator=g) for name, x in start.items()}
    own = replace(person, tokens=None, relaxed={}, parts=[Part(settings, layout, params)])
    out = transfer(tiny_base, own, tiny_base, tmp_path)
    factors = Personalization.load(out / "adapter.safetensors").factors()
    for name, change in own.changes().items():
        weight = sites[name].weight()
        new = change.dense(weight)[0]  # of the same weights nothing is projected
        torch.testing.assert_close(delta(*factors[name])[0], new, rtol=1e-3, atol=1e-3)
    config.run("export", [f"adapter={out}", f"out={tmp_path / 'kohya'}"])  # other tools read it now


def test_of_its_own_base_nothing_but_the_rank_is_cut(tiny_base, person, tmp_path):
    base, g = load(tiny_base), torch.Generator().manual_seed(2)
    layout = Layout.listing({n: Site(n, m) for n, m in base.places("unet_attention").items()})
    params = {x.name: torch.randn(1, *x.shape, generator=g) for x in layout.layers}
    own = replace(person, tokens=None, relaxed={}, parts=[Part(FullConfig(sites="unet_attention"), layout, params)])
    out = transfer(tiny_base, own, tiny_base, tmp_path, "rank=3")
    factors = Personalization.load(out / "adapter.safetensors").factors()
    wide = [x.name for x in layout.layers if x.in_ > x.out]  # more inputs than the weight's own vectors reach
    assert wide
    for name, change in own.changes().items():
        u, s, vt = torch.linalg.svd(change.dense(base.sites([name])[name].weight)[0], full_matrices=False)
        nearest = u[:, :3] * s[:3] @ vt[:3]
        torch.testing.assert_close(delta(*factors[name])[0], nearest, rtol=1e-3, atol=1e-3)
    kept = load_json(out / "transfer.json")["layers"]
    assert all(0 < kept[name]["kept"] < 1 for name in wide)


def test_a_folder_of_another_run_is_refused_before_the_work(tiny_base, versions, person, tmp_path, monkeypatch):
    transfer(tiny_base, person, versions["further"], tmp_path)
    monkeypatch.setattr("hyperdb.stages.transfer.move", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=r"holds adapter\.safetensors of a run with other"):
        transfer(tiny_base, replace(person, rare_token="qqq"), versions["further"], tmp_path)


def test_what_cannot_be_merged_or_is_of_another_base_is_refused(tiny_base, versions, person, tmp_path):
    base = load(tiny_base)
    layout = Layout.listing({n: Site(n, m) for n, m in base.places("kv").items()})
    settings = A1111Config(activation="relu")
    part = Part(settings, layout, settings.build(layout).init(1))
    for other, message in (
        (replace(person, tokens=None, relaxed={}, parts=[part]), "with biases or an activation is no matrix"),
        (replace(person, base="0123"), "was made for base 0123, and .* name its own with diffusion=NAME"),
    ):
        with pytest.raises(UserError, match=message):
            transfer(tiny_base, other, versions["further"], tmp_path)
    bound, adapter = trainable(base, PlusConfig())
    several = Part(bound, adapter.layout, adapter.init(1, _sites(base, adapter)))
    with pytest.raises(UserError, match=r"is of P\+, .* no weight can stand for; .*: hyperdb train_xadapter to="):
        transfer(tiny_base, replace(person, tokens=None, relaxed={}, parts=[several]), versions["further"], tmp_path)
    with pytest.raises(UserError, match="no base model at"):
        transfer(tiny_base, person, "./nowhere", tmp_path)
    for word in ("least=2", "rank=0", "subspace=0"):
        with pytest.raises(UserError, match=re.escape(word.partition("=")[0])):
            transfer(tiny_base, person, tiny_base, tmp_path, word)
    assert not (tmp_path / "out").exists()


def test_the_study_measures_each_way_and_goes_on_where_it_was(versions, tiny_base, people, tmp_path, capsys):
    """On the same base an adapter is what it was, and so is one fitted there; what was drawn is not drawn again."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "embedded" / "transfer" / "transfer.py"))
    words = [f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32"]
    words += ["diffusion.subject_guidance=3", "hypernet=null", f"data={people}", "people=2", "views=2", "given=1"]
    words += ["images=1", "styled=[]", "changed=['a photo of a [V] face']", "recognisers=[sface]", "batch=2"]
    words += ["judges.clip=null", "judges.verifier=null", "rows=[lora]"]
    words += [f"methods.lora.finetune.{word}" for word in ("steps=2", "rate=0.05", "levels=2")]
    bases = load(tiny_base), load(versions["further"])
    mapper = Mapper.between(*bases, 8).save(tmp_path / "xadapter.safetensors", *bases)
    for to, more in ((tiny_base, []), (versions["further"], ["--xadapter", str(mapper)])):
        script["main"](["--to", str(to), "--out", str(tmp_path / to.name), "--subspace", "4096", *more, *words])
    capsys.readouterr()
    same = results.load(tmp_path / tiny_base.name / "results.json")
    drawn = [load_tensors(tmp_path / tiny_base.name / "rows" / f"lora{way}.safetensors")[0]["images"]
             for way in ("", "_untouched", "_fitted")]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    layers = same["layers"]["lora_transferred"]
    square = [layer["kept"] for name, layer in layers.items() if name.endswith("attn1.to_q")]
    assert square == [pytest.approx(1.0, abs=1e-3)] * len(square) != []  # of others there is more than W spans
    assert same["rows"]["lora"]["label"] == "LoRA DreamBooth, 2 iterations, on its own base"
    assert set(same["rows"]) == {"old", "new", "lora", "lora_untouched", "lora_transferred", "lora_fitted"}
    assert set(same["paired"]) == {f"lora_transferred-lora{way}" for way in ("", "_untouched", "_fitted")}
    other = results.load(tmp_path / "further" / "results.json")
    assert other["rows"]["lora"]["cosine"] == same["rows"]["lora"]["cosine"]
    assert any("skipped" in layer for layer in other["layers"]["lora_transferred"].values())
    assert other["rows"]["lora_steered"]["label"].endswith("its base steers the new one")
    assert other["rows"]["lora_steered"]["base_bytes"] > 2 * other["rows"]["lora"]["base_bytes"]
    lora, fitted = (other["rows"][row] for row in ("lora", "lora_fitted"))
    assert fitted["bytes"] == lora["bytes"] == 4 * lora["trained"]

    file = tmp_path / "further" / "rows" / "lora_untouched.safetensors"
    before = file.stat().st_mtime_ns
    (tmp_path / "further" / "rows" / "lora_fitted.safetensors").unlink()
    script["main"](["--to", str(to), "--out", str(tmp_path / "further"), "--subspace", "4096", *more, *words])
    assert file.stat().st_mtime_ns == before
    assert results.load(tmp_path / "further" / "results.json")["values"] == other["values"]
    script["main"](["--to", str(to), "--out", str(tmp_path / "further"), "--subspace", "4096", *more, *words,
                    "methods.lora.finetune.rate=0.01"])  # fmt: skip
    assert file.stat().st_mtime_ns > before
    with pytest.raises(UserError, match="rows=floor: expected ways to personalise"):
        script["main"](["--to", str(to), "--out", str(tmp_path / "no"), *words, "rows=[floor]"])


@pytest.mark.parametrize("settings", [CustomConfig(), TokenConfig(vectors=2)])
def test_a_word_goes_on_as_it_is(tiny_base, versions, person, tmp_path, capsys, settings):
    base, g = load(tiny_base), torch.Generator().manual_seed(2)
    settings, adapter = trainable(base, settings)
    params = {k: v + torch.randn(v.shape, generator=g) for k, v in adapter.init(1, _sites(base, adapter)).items()}
    own = replace(person, tokens=None, relaxed={}, parts=[Part(settings, adapter.layout, params)])
    out = transfer(tiny_base, own, versions["further"], tmp_path)
    embedding, *layers = adapter.layout.names
    moved = Personalization.load(out / "adapter.safetensors")
    assert [(part.kind, part.layout.names) for part in moved.parts] == [("token", (embedding,))]
    assert torch.equal(moved.parts[0].params["vector"], params["vector"])
    assert places(out / "adapter.safetensors") == settings.vectors
    assert load_json(out / "transfer.json")["layers"][embedding] == {"word": "as it is"}
    assert set(moved.relaxed) <= set(layers)
    assert bool(moved.relaxed) == bool(layers)
    assert f"{len(moved.relaxed)} of {1 + len(layers)} layers moved, and the word as it is" in capsys.readouterr().out
    if not layers:  # a word alone stays one that other tools read
        config.run("export", [f"adapter={out}", "format=textual_inversion", f"out={tmp_path / 'word'}"])


def _sites(base, adapter):
    return {name: Site(name, module) for name, module in base.sites(adapter.layout.names).items()}
