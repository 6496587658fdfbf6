"""A LoRA of another tool becomes an adapter that is drawn with, exported again and mixed, whatever it adapts."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hyperdb import config
from hyperdb.adapters.base import delta
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.targets import find_sites
from hyperdb.faces.image import read_image, read_text
from hyperdb.formats import lora
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError

ADAPTED = ("attn2.to_q", "proj_in", "conv1", "conv_in", "mlp.fc1", "time_emb_proj")


@pytest.fixture
def base(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture
def file(base, tmp_path):
    """Return a kohya file of linear layers and convolutions, of two ranks and one scale."""
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, module in find_sites(base.unet, base.text_encoder).items():
        if name.endswith(ADAPTED):
            (m, *n), r, key = module.weight.shape, 3 if "conv" in name else 2, lora.kohya_name(name)
            tensors[f"{key}.lora_down.weight"] = 0.3 * torch.randn(r, *n, generator=g)
            tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(m, r, *[1] * (len(n) - 1), generator=g)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.trigger_phrase": "ohwx man"})
    return tmp_path / "a.safetensors"


def run(tiny_base, out, *words):
    return config.run("import", [f"diffusion.path={tiny_base}", "diffusion.size=32", f"out={out}", *words])


def generate(tiny_base, out, adapter, *words):
    settings = ["diffusion.size=32", "diffusion.dtype=fp32", "diffusion.device=cpu", "num_images=1", "steps=2"]
    settings += [f"diffusion.path={tiny_base}", f"adapter={adapter}", f"out={out}"]
    return config.run("generate", [*settings, *words])


@pytest.mark.filterwarnings("ignore:.V. stands for:UserWarning")
@pytest.mark.filterwarnings("ignore:prompt has words that this base was never taught:UserWarning")
def test_a_trigger_phrase_is_text_and_the_pictures_are_those_of_diffusers(base, tiny_base, file, tmp_path, capsys):
    assert len(base.tokenizer.tokenize("ohwx")) > 1
    out = run(tiny_base, tmp_path / "in", f"path={file}")
    person = Personalization.load(out / "adapter.safetensors")
    assert (person.rare_token, person.class_word) == ("ohwx", "man")
    assert "other layers" in capsys.readouterr().out
    words = ["guidance=3", "diffusion.subject_guidance=null", "prompt=a photo of a [V] man", "scheduler=ddim"]
    drawn = generate(tiny_base, tmp_path / "out", out, *words) / "00000.png"
    assert read_text(drawn)["rare_token"] == "ohwx"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    how = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "np"}
    latents = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    plain = torch.from_numpy(pipe("a photo of a ohwx man", latents=latents, **how).images[0]) * 255
    pipe.load_lora_weights(str(file))
    reference = torch.from_numpy(pipe("a photo of a ohwx man", latents=latents, **how).images[0]) * 255
    ours = torch.from_numpy(read_image(drawn)).float()
    assert (plain - reference).abs().max() > 3
    assert (ours - reference).abs().max() <= 1


@pytest.mark.parametrize(
    ("stated", "words", "expected"),
    [
        ("ohwx", [], ("ohwx", "face")),
        ("  blue  haired woman ", [], ("blue haired", "woman")),
        ("ohwx man", ["words=tok dog"], ("tok", "dog")),
        ("", [], ("sks", "face")),
        (None, ["words=zwx face"], ("zwx", "face")),
        ("a [V] man", [], ("sks", "face")),
        ("x" * 300, [], ("sks", "face")),
        ("Zoë 東京", [], ("Zoë", "東京")),
    ],
)
def test_words(tiny_base, file, tmp_path, stated, words, expected):
    save_file(load_file(file), file, None if stated is None else {"modelspec.trigger_phrase": stated})
    person = Personalization.load(run(tiny_base, tmp_path / "in", f"path={file}", *words) / "adapter.safetensors")
    assert (person.rare_token, person.class_word) == expected


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "native"])
def test_what_it_adapts_beyond_the_papers_layers_goes_out_and_comes_back(base, tiny_base, file, tmp_path, format):
    sites = find_sites(base.unet, base.text_encoder)
    original = lora.read(file).factors(sites, "")
    assert {name for name in original if name not in base.targets()}
    out = run(tiny_base, tmp_path / "in", f"path={file}")
    dtype = "int8" if format == "native" else "fp32"
    words = [f"adapter={out}", f"format={format}", "strength=0.5", f"dtype={dtype}", "name=ada"]
    written = config.run("export", [*words, f"out={tmp_path / 'x'}"])
    if format == "native":
        again = Personalization.load(written / "ada.safetensors").factors()
    else:
        again = lora.read(written if format == "peft" else written / "ada.safetensors").factors(sites, "")
    assert original.keys() <= again.keys()
    for name, pair in original.items():
        assert torch.allclose(0.5 * delta(*pair), delta(*again[name]), atol=2e-2 if dtype == "int8" else 1e-5), name
        assert delta(*again[name])[0].shape == sites[name].weight.shape


def test_people_of_different_sites_mix(tiny_base, file, tmp_path):
    one = run(tiny_base, tmp_path / "one", f"path={file}", "words=sks face")
    fewer = {key: value for key, value in load_file(file).items() if "conv1" not in key}
    save_file(fewer, tmp_path / "b.safetensors")
    two = run(tiny_base, tmp_path / "two", f"path={tmp_path / 'b.safetensors'}")
    mixed = config.run("edit", [f"adapter=[{one},{two}]", "shares=[0.25,0.75]", f"out={tmp_path / 'mix'}"])
    factors, original = Personalization.load(mixed / "adapter.safetensors").factors(), lora.read(file)
    for key, pair in original.pairs.items():
        name = next(name for name in factors if lora.kohya_name(name) == key)
        share = 0.25 if "conv1" in key else 1
        whole = (pair.up.flatten(1) @ pair.down.flatten(1)).reshape(delta(*factors[name])[0].shape) * pair.scale
        assert torch.allclose(share * whole, delta(*factors[name])[0], atol=1e-5)


def test_a_file_for_another_model_writes_nothing(tiny_base, file, tmp_path):
    tensors = {key.replace("lora_unet_", "lora_unet_other_"): value for key, value in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(UserError, match="has no layer"):
        run(tiny_base, tmp_path / "in", f"path={file}")
    assert not (tmp_path / "in" / "adapter.safetensors").exists()


def test_empty_words_are_refused(tiny_base, file, tmp_path):
    with pytest.raises(UserError, match="words="):
        run(tiny_base, tmp_path / "in", f"path={file}", "words= ")


def test_an_adapter_of_ours_is_not_imported(tiny_base, file, tmp_path):
    out = run(tiny_base, tmp_path / "in", f"path={file}")
    with pytest.raises(UserError, match="already: use it with adapter="):
        run(tiny_base, tmp_path / "again", f"path={out / 'adapter.safetensors'}")
