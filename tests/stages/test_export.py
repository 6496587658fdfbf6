"""An adapter goes out in every format and comes back as it was; strength is baked in."""

from __future__ import annotations

import pytest
import torch

from hyperdb import config
from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.base import delta
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion import DiffusionConfig
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata


@pytest.fixture
def person(tiny_base, tmp_path):
    layout = Layout.of(DiffusionConfig(path=str(tiny_base), size=32, device="cpu").load().targets())
    g = torch.Generator().manual_seed(0)
    settings = LiDBConfig(12, 8)
    relaxed = {
        x.name: (torch.randn(1, 2, x.in_, generator=g), torch.randn(1, x.out, 2, generator=g)) for x in layout.layers
    }
    tokens = torch.randn(settings.build(layout).mask.shape, generator=g)
    made = Personalization(layout, tokens, settings, "0123", "zwx", "face", relaxed)
    made.save(tmp_path / "ada" / "adapter.safetensors")
    return made


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_out_and_back(person, tiny_base, tmp_path, format, capsys):
    words = [f"adapter={tmp_path / 'ada'}", f"format={format}", "dtype=fp32", "strength=0.5", "name=ada"]
    out = config.run("export", [*words, f"out={tmp_path / 'out'}"])
    path = out if format == "peft" else out / "ada.safetensors"
    card = (out / "README.md").read_text()
    assert "zwx face" in card
    assert format in card
    words = [f"path={path}", f"diffusion.path={tiny_base}", "diffusion.size=32", f"out={tmp_path / 'back'}"]
    back = Personalization.load(config.run("import", words) / "adapter.safetensors")
    assert (back.rare_token, back.class_word, back.base) == ("zwx", "face", "0123")
    factors = back.factors()
    for name, pair in person.factors().items():
        assert torch.allclose(0.5 * delta(*pair), delta(*factors[name]), atol=1e-5)
    assert f"{len(person.layout)} of {len(person.layout)} layers" in capsys.readouterr().out


def test_adapters_share_a_folder_and_keep_to_themselves(person, tmp_path):
    out = tmp_path / "loras"
    out.mkdir()
    for name in ("README.md", "bob.safetensors"):
        (out / name).write_text("mine")
    words = [f"adapter={tmp_path / 'ada'}", f"out={out}"]
    for _ in "ab":
        config.run("export", [*words, "name=ada [1]"])
    config.run("export", [*words, "name=eve", "strength=0.5"])
    with pytest.raises(UserError, match=r"replaced: bob\.safetensors"):
        config.run("export", [*words, "name=bob"])
    with pytest.raises(UserError, match=r"eve\.md of a run with other strength"):
        config.run("export", [*words, "name=eve"])
    with pytest.raises(UserError, match="not a path"):
        config.run("export", [*words, "name=/x"])
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "bob.safetensors", ".hyperdb.json"),
        *("ada [1].safetensors", "ada [1].md", "eve.safetensors", "eve.md"),
    }
    assert (out / "README.md").read_text() == (out / "bob.safetensors").read_text() == "mine"


def test_native_again_with_another_strength(person, tmp_path):
    words = [f"adapter={tmp_path / 'ada'}", "format=native", "strength=2", "dtype=fp32", f"out={tmp_path / 'out'}"]
    twice = Personalization.load(config.run("export", words) / "default.safetensors").factors()
    for name, pair in person.factors().items():
        assert torch.allclose(2 * delta(*pair), delta(*twice[name]), atol=1e-4)


def test_only_stable_diffusion_15_calls_itself_that(person, tmp_path):
    out = config.run("export", [f"adapter={tmp_path / 'ada'}", f"out={tmp_path / 'out'}"])
    metadata = load_metadata(out / "default.safetensors")
    assert metadata["modelspec.trigger_phrase"] == "zwx face"
    assert "ss_base_model_version" not in metadata


def test_the_digest_of_stable_diffusion_15():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from hyperdb.adapters.layout import SD15
    from hyperdb.diffusion.targets import find_targets

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        targets = find_targets(UNet2DConditionModel(sample_size=64, cross_attention_dim=768), CLIPTextModel(clip))
    assert Layout.of(targets).digest == SD15


@pytest.mark.parametrize("word", ["format=ckpt", "dtype=bf16", "strength=nan", "adapter=none"])
def test_wrong_settings_are_named(person, tmp_path, word):
    with pytest.raises(UserError, match=word.partition("=")[0]):
        config.run("export", [f"adapter={tmp_path / 'ada'}", f"out={tmp_path / 'out'}", word])
    assert not (tmp_path / "out").exists()
