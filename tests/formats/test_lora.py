"""Exported files give, in the loaders of other tools, the pictures that the adapter gives in memory."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion import DiffusionConfig, resolve
from hyperdb.diffusion.targets import find_targets
from hyperdb.formats import lora
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata


@pytest.fixture(params=["random", "embedded"])
def pipeline(request, tiny_base):
    folder = tiny_base if request.param == "random" else resolve("package:embedded/base")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def layout(tiny_base):
    base = DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()
    return Layout.of(base.targets())


def factors_of(layout, ranks=(3,), scale=0.2):
    if not isinstance(layout, Layout):  # a pipeline
        layout = Layout.of(find_targets(layout.unet, layout.text_encoder))
    g = torch.Generator().manual_seed(1)
    ranks = [ranks[i % len(ranks)] for i in range(len(layout))]
    return {
        x.name: (scale * torch.randn(1, r, x.in_, generator=g), scale * torch.randn(1, x.out, r, generator=g))
        for x, r in zip(layout.layers, ranks, strict=True)
    }


def picture(pipe):
    g = torch.Generator().manual_seed(2)
    return torch.from_numpy(pipe("a photo of a face", num_inference_steps=2, generator=g, output_type="np").images)


def with_adapter(pipe, factors):
    injection = Injection(find_targets(pipe.unet, pipe.text_encoder))
    injection.set(factors)
    try:
        return picture(pipe)
    finally:
        injection.remove()


@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_our_file(pipeline, tmp_path, format, ranks):
    factors = factors_of(pipeline, ranks)
    plain, ours = picture(pipeline), with_adapter(pipeline, factors)
    assert (plain - ours).abs().max() > 1e-2
    path = lora.write(tmp_path / "ada.safetensors", factors, format, {})
    pipeline.load_lora_weights(str(path))
    assert torch.allclose(picture(pipeline), ours, atol=1e-4)


def test_the_text_encoder_is_not_dropped(pipeline, tmp_path):
    factors = {
        name: (down, up if name.startswith("text_encoder") else up * 0)
        for name, (down, up) in factors_of(pipeline, scale=0.6).items()
    }
    ours = with_adapter(pipeline, factors)
    assert (picture(pipeline) - ours).abs().max() > 1e-4
    pipeline.load_lora_weights(str(lora.write(tmp_path / "ada.safetensors", factors, "kohya", {})))
    assert torch.allclose(picture(pipeline), ours, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own
def test_peft_loads_our_folders(pipeline, tmp_path):
    from peft import PeftModel

    factors = factors_of(pipeline)
    ours = with_adapter(pipeline, factors)
    folder = lora.write(tmp_path / "ada", factors, "peft", {})
    for part in ("unet", "text_encoder"):
        setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), folder / part).base_model.model)
    assert torch.allclose(picture(pipeline), ours, atol=1e-4)


@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)])
def test_lycoris_loads_our_file(pipeline, tmp_path, monkeypatch, ranks):
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    factors = factors_of(pipeline, ranks)
    ours = with_adapter(pipeline, factors)
    path = str(lora.write(tmp_path / "ada.safetensors", factors, "kohya", {}))
    inside = "" if hasattr(pipeline.text_encoder, "text_model") else "_text_model"
    for prefix, part in (("lora_unet", pipeline.unet), (f"lora_te{inside}", pipeline.text_encoder)):
        monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", prefix)
        network, _ = create_lycoris_from_weights(1.0, path, part)
        side = "unet." if part is pipeline.unet else "text_encoder."
        assert len(network.loras) == sum(name.startswith(side) for name in factors)
        network.apply_to()
    assert torch.allclose(picture(pipeline), ours, atol=1e-4)


@pytest.mark.parametrize("format", lora.FORMATS)
def test_round_trip(layout, tmp_path, format):
    factors = factors_of(layout, (1, 3))
    path = lora.write(tmp_path / ("ada" if format == "peft" else "ada.safetensors"), factors, format, {"who": "ada"})
    again, metadata = lora.read(path, layout)
    assert lora.recognise(path) == format
    assert metadata["who"] == "ada"
    for name, (down, up) in factors.items():
        assert torch.allclose(up @ down, again[name][1] @ again[name][0], atol=1e-6)


def broken(path, change):
    tensors = change(load_file(path))
    save_file(tensors, path)
    return path


BREAKS = {
    "text_model": lambda t: {k.replace("lora_te_text_model_", "lora_te_"): v for k, v in t.items()},
    "alpha that varies": lambda t: t | {next(k for k in t if k.endswith(".alpha")): torch.tensor(1.5)},
    "no alpha": lambda t: {k: v for i, (k, v) in enumerate(sorted(t.items())) if i},
    "plain LoRA": lambda t: t | {"lora_unet_x.dora_scale": torch.ones(1)},
    "shape": lambda t: {k: v[:0] if k.endswith("down.weight") else v for k, v in t.items()},
    "takes": lambda t: {k: v[:, :-1].contiguous() if k.endswith("down.weight") else v for k, v in t.items()},
    "not finite": lambda t: {k: v * float("inf") if k.endswith("up.weight") else v for k, v in t.items()},
    "attentions": lambda t: {k.replace("lora_unet_", "lora_unet_other_"): v for k, v in t.items()},
}


@pytest.mark.parametrize("reason", BREAKS)
def test_a_broken_file_is_refused_with_the_reason(layout, tmp_path, reason):
    path = lora.write(tmp_path / "ada.safetensors", factors_of(layout), "kohya", {})
    with pytest.raises(UserError, match=reason):
        lora.read(broken(path, BREAKS[reason]), layout)


def test_other_files_are_refused(layout, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no LoRA"):
        lora.read(tmp_path / "x.safetensors", layout)
    with pytest.raises(UserError, match="adapter_config"):
        lora.read(tmp_path, layout)
    folder = lora.write(tmp_path / "ada", factors_of(layout), "peft", {})
    config = json.loads((folder / "unet" / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"use_rslora": True}, {"r": 0}, {"lora_alpha": None}, {"peft_type": "IA3"}):
        (folder / "unet" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=r"plain LoRA|lora_alpha"):
            lora.read(folder, layout)


def test_the_scale_of_the_header_counts(layout, tmp_path):
    factors = factors_of(layout)
    path = lora.write(tmp_path / "ada.safetensors", factors, "diffusers", {})
    tensors, stated = load_file(path), json.loads(load_metadata(path)["lora_adapter_metadata"])
    tensors = {k.replace("text_model.", ""): v for k, v in tensors.items()}  # as newer versions name them
    stated = {k: v * 2 if k.endswith("lora_alpha") else v for k, v in stated.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(stated)})
    again, _ = lora.read(path, layout)
    for name, (down, up) in factors.items():
        assert torch.allclose(2 * up @ down, again[name][1] @ again[name][0], atol=1e-6)


def test_half_precision_refuses_what_it_cannot_hold(layout, tmp_path):
    with pytest.raises(UserError, match="fp32"):
        lora.write(tmp_path / "a.safetensors", factors_of(layout, scale=1e6), "kohya", {}, torch.float16)
