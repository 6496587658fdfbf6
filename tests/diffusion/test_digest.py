"""A base's digest is of all that is loaded, and of nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.digest import digest_base, digest_latents, digest_vae
from hyperdb.runtime.files import load_json, load_tensors, save_json, save_tensors

UNET, TEXT, VAE = "unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture
def copy(base: Base, tmp_path: Path) -> Path:
    return shutil.copytree(base.config.path, tmp_path / "copy")


def digest(base: Base, copy: Path, **more: Any) -> str:
    return replace(base.config, path=str(copy), **more).load().digest


def setting(file: str, **values: Any) -> Callable[[Path], object]:
    return lambda copy: save_json(copy / file, {**load_json(copy / file), **values})


def weight(file: str) -> Callable[[Path], object]:
    def change(copy: Path) -> None:
        tensors, metadata = load_tensors(copy / f"{file}.safetensors")
        last = tensors[max(tensors)].flatten()
        last[-1] += 1
        save_tensors(copy / f"{file}.safetensors", tensors, metadata)

    return change


def without_a_merge(copy: Path) -> None:
    words = load_json(copy / "tokenizer" / "tokenizer.json")
    words["model"]["merges"].pop()
    save_json(copy / "tokenizer" / "tokenizer.json", words)


def two_words_exchanged(copy: Path) -> None:
    words = load_json(copy / "tokenizer" / "tokenizer.json")
    vocabulary = words["model"]["vocab"]
    vocabulary["face</w>"], vocabulary["beach</w>"] = vocabulary["beach</w>"], vocabulary["face</w>"]
    save_json(copy / "tokenizer" / "tokenizer.json", words)


CHANGES = {
    "what is predicted": setting("scheduler/scheduler_config.json", prediction_type="epsilon"),
    "noise levels": setting("scheduler/scheduler_config.json", beta_end=0.03),
    "a sampler's spacing": setting("scheduler/scheduler_config.json", timestep_spacing="leading"),
    "a sampler's end": setting("scheduler/scheduler_config.json", set_alpha_to_one=False),
    "UNet's function": setting("unet/config.json", act_fn="gelu"),
    "UNet's time": setting("unet/config.json", flip_sin_to_cos=False),
    "text encoder's function": setting("text_encoder/config.json", hidden_act="gelu"),
    "text encoder's norm": setting("text_encoder/config.json", layer_norm_eps=1e-3),
    "autoencoder's scale": setting("vae/config.json", scaling_factor=0.5),
    "autoencoder's function": setting("vae/config.json", act_fn="gelu"),
    "length of a prompt": setting("tokenizer/tokenizer_config.json", model_max_length=20),
    "side of the padding": setting("tokenizer/tokenizer_config.json", padding_side="left"),
    "token of the padding": setting("tokenizer/tokenizer_config.json", pad_token="face</w>"),
    "pieces of words": without_a_merge,
    "vocabulary": two_words_exchanged,
    "UNet": weight(UNET),
    "text encoder": weight(TEXT),
    "autoencoder": weight(VAE),
}


@pytest.mark.parametrize("name", CHANGES)
def test_all_that_is_loaded_counts(base: Base, copy: Path, name: str) -> None:
    CHANGES[name](copy)
    assert digest(base, copy) != base.digest


def as_pickles(copy: Path) -> None:
    for file, name in ((UNET, UNET), (TEXT, "text_encoder/pytorch_model"), (VAE, VAE)):
        torch.save(load_tensors(copy / f"{file}.safetensors")[0], copy / f"{name}.bin")
        (copy / f"{file}.safetensors").unlink()


def in_float32(copy: Path) -> None:
    for file in (UNET, TEXT, VAE):
        tensors, metadata = load_tensors(copy / f"{file}.safetensors")
        save_tensors(copy / f"{file}.safetensors", {k: v.float() for k, v in tensors.items()}, metadata)


def without_defaults(copy: Path) -> None:
    for part, names in (("unet", ("act_fn", "freq_shift", "dropout")), ("vae", ("act_fn", "force_upcast"))):
        known = load_json(copy / part / "config.json")
        save_json(copy / part / "config.json", {k: v for k, v in known.items() if k not in names})


STORAGE = {
    "another place": lambda copy: None,
    "pickles": as_pickles,
    "numbers in float32": in_float32,
    "defaults left out": without_defaults,
    "versions": setting("unet/config.json", _diffusers_version="0.1.0", _name_or_path="elsewhere"),
    "text encoder's versions": setting("text_encoder/config.json", transformers_version="4.0", architectures=None),
    "a sampler's class": setting("scheduler/scheduler_config.json", _class_name="PNDMScheduler"),
    "a card beside it": lambda copy: (copy / "README.md").write_text("A model."),
    "weights that are not loaded": lambda copy: save_tensors(copy / f"{UNET}.ema.safetensors", {"x": torch.ones(2)}),
}


@pytest.mark.parametrize("name", STORAGE)
def test_how_it_is_stored_does_not(base: Base, copy: Path, name: str) -> None:
    STORAGE[name](copy)
    assert digest(base, copy) == base.digest


def test_nor_does_how_it_computes(base: Base, copy: Path) -> None:
    more = {"dtype": "bf16", "attention": "eager", "checkpointing": True, "size": 64, "rare_token": "zwx"}
    assert digest(base, copy, **more) == base.digest


def test_nor_what_was_asked_of_the_tokenizer_before(base: Base) -> None:
    base.tokenize(["a face", "a sks face"])
    parts = base.unet, base.text_encoder, base.vae, base.tokenizer, base.schedule
    assert digest_base(*parts) == base.digest


def test_other_pickles_are_another_base(base: Base, copy: Path) -> None:
    weight(UNET)(copy)
    as_pickles(copy)
    assert digest(base, copy) != base.digest


def test_the_variant_that_was_chosen_counts(base: Base, copy: Path) -> None:
    shutil.copy(copy / f"{UNET}.safetensors", copy / f"{UNET}.fp16.safetensors")
    weight(f"{UNET}.fp16")(copy)
    for file in (TEXT, VAE):
        shutil.copy(copy / f"{file}.safetensors", copy / f"{file}.fp16.safetensors")
    assert digest(base, copy) == base.digest
    assert digest(base, copy, variant="fp16") != base.digest


def test_an_autoencoder_is_its_settings_and_its_weights_to_float16(base: Base, copy: Path) -> None:
    def of(folder: Path) -> str:
        return digest_vae(replace(base.config, path=str(folder)).load().vae)

    known = digest_vae(base.vae)
    assert of(copy) == known
    tensors, metadata = load_tensors(copy / f"{VAE}.safetensors")
    close = {k: v.float() * (1 + 1e-6) for k, v in tensors.items()}
    save_tensors(copy / f"{VAE}.safetensors", close, metadata)
    assert of(copy) == known
    setting("vae/config.json", scaling_factor=0.5)(copy)
    assert of(copy) != known


def test_latents_are_the_same_with_another_decoder(base: Base, copy: Path) -> None:
    tensors, metadata = load_tensors(copy / f"{VAE}.safetensors")
    for part, same in (("decoder.", True), ("post_quant_conv.", True), ("encoder.", False), ("quant_conv.", False)):
        other = {k: v + 1 if k.startswith(part) else v for k, v in tensors.items()}
        save_tensors(copy / f"{VAE}.safetensors", other, metadata)
        vae = replace(base.config, path=str(copy)).load().vae
        assert (digest_latents(vae) == digest_latents(base.vae)) is same
        assert digest_vae(vae) != digest_vae(base.vae)
