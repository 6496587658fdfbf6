"""A Stable Diffusion folder becomes a frozen base: words, latents, devices, errors that say what to do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from torch import nn

from hyperdb.diffusion import STABLE_DIFFUSION, DiffusionConfig
from hyperdb.diffusion import base as base_module
from hyperdb.diffusion.base import Base, pick_device
from hyperdb.diffusion.targets import base_hash
from hyperdb.runtime.errors import NonFiniteError, UserError
from hyperdb.runtime.files import load_json, save_json

NO_MPS = pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is here")


@pytest.fixture(scope="module")
def config(tiny_base: Path) -> DiffusionConfig:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def base(config: DiffusionConfig) -> Base:
    return config.load()


def images(n: int, size: int = 32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)


# --- loading


def test_everything_is_frozen_float32_and_in_eval_mode(base: Base) -> None:
    for model in (base.unet, base.text_encoder, base.vae):
        assert not model.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_fp16_on_a_cpu_is_refused(config: DiffusionConfig) -> None:
    with pytest.raises(UserError, match=r"use diffusion\.dtype=bf16"):
        replace(config, dtype="fp16").load()


def test_missing_folder_is_named(config: DiffusionConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no base model at .*nowhere; set diffusion.path"):
        replace(config, path=str(tmp_path / "nowhere")).load()
    with pytest.raises(UserError, match=r"no base model at .*nothing"):
        replace(config, path="package:embedded/nothing").load()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_missing_part_is_named(config: DiffusionConfig, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(config.path, copy)
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"has no usable {part} "):
        replace(config, path=str(copy)).load()


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto").type == expected
    assert pick_device("cpu").type == "cpu"
    for name in ("gpu", "xpu", "hpu", "meta", "", "0", "CUDA", "cuda:-1"):
        with pytest.raises(UserError, match=f"'{name}': expected auto, cpu, cuda or mps"):
            pick_device(name)


def test_each_process_of_a_machine_has_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device_count` and `empty` stand for a machine with two."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for rank, card in (("0", 0), ("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", card)
        assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"3 processes .* with 2 cards: launch again with --num_processes=2"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"3 processes .* with 1 card: launch again with --num_processes=1"):
        pick_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # a launcher shows each process its own
    assert pick_device("auto") == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["cuda:99", pytest.param("mps", marks=NO_MPS)])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}': PyTorch sees no such device here"):
        pick_device(name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"attention": "flash"}, "attention"),
        ({"size": 60}, "size=60"),
        ({"size": 24}, "size=24"),
        ({"rare_token": " "}, "rare_token"),
        ({"rare_token": "[V]"}, "rare_token"),
        ({"crop": 0.1}, "crop"),
        ({"steps": 0}, "steps"),
        ({"guidance": float("nan")}, "guidance=nan"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiffusionConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"in_channels": 9}, "a UNet of 9 input channels, as for inpainting, and latents of 4"),
        ({"in_channels": 5}, "a UNet of 5 input channels, as for depth to picture"),
        ({"in_channels": 8}, "a UNet of 8 input channels, as for editing"),
        ({"out_channels": 8}, "a UNet of 8 output channels, and latents of 4"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 2048}, "is of the kind of Stable Diffusion XL"),
        ({"addition_embed_type": "image"}, "a UNet with addition_embed_type='image'"),
        ({"num_class_embeds": 1000}, "a UNet with num_class_embeds=1000"),
        ({"encoder_hid_dim_type": "text_proj"}, "a UNet with encoder_hid_dim_type='text_proj'"),
        ({"cross_attention_dim": 768}, "a UNet for texts 768 wide and a text encoder of 32"),
    ],
)
def test_a_unet_of_another_kind_is_named_before_it_is_read(
    config: DiffusionConfig, tmp_path: Path, settings: dict, said: str
) -> None:
    copy = shutil.copytree(config.path, tmp_path / "copy")
    file = copy / "unet" / "config.json"
    save_json(file, {**load_json(file), **settings})
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    other = replace(config, path=str(copy))
    for load in (Base.load, Base.sketch):
        with pytest.raises(UserError, match=rf"copy' .*{said}.*; hyperdb needs a text-to-image model like .* 1\.5"):
            load(other)


def test_a_schedule_of_another_kind_is_named(config: DiffusionConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(config.path, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    save_json(file, {**load_json(file), "prediction_type": "sample"})
    with pytest.raises(UserError, match="predicts 'sample' by its scheduler; hyperdb needs"):
        replace(config, path=str(copy)).load()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_variant_that_is_there_is_named(config: DiffusionConfig, tmp_path: Path, suffix: str) -> None:
    copy = shutil.copytree(config.path, tmp_path / "copy")
    unet, text = copy / "unet" / "diffusion_pytorch_model.safetensors", copy / "text_encoder" / "model.safetensors"
    text.rename(text.with_name(f"model.fp16.{suffix}"))
    with pytest.raises(UserError, match=r"no usable text_encoder of .*variant=null, .*set diffusion\.variant=fp16$"):
        replace(config, path=str(copy)).load()
    unet.rename(unet.with_name(f"diffusion_pytorch_model.fp16.{suffix}"))
    with pytest.raises(UserError, match=r"no usable unet of .*variants: fp16; set diffusion\.variant=fp16$"):
        replace(config, path=str(copy)).load()
    with pytest.raises(UserError, match=r"no usable unet of diffusion\.variant=bf16, .*set diffusion\.variant=fp16$"):
        replace(config, path=str(copy), variant="bf16").load()
    with pytest.raises(UserError, match=r"no usable unet of .*variants: none; set diffusion\.variant=null$"):
        replace(config, variant="fp16").load()


def test_variants_of_files_in_parts() -> None:
    files = ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.non_ema.bin", "x.bin"]
    assert base_module._variants([*files, "config.json", "model.safetensors.index.json"]) == ["fp16", "non_ema"]
    assert base_module._variants(["model.non_ema.safetensors", "pytorch_model.bin"]) == [None, "non_ema"]


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-inpainting"])
def test_what_has_moved_on_the_hub_is_named(config: DiffusionConfig, name: str) -> None:
    moved = replace(config, path=f"runwayml/{name}")
    for load in (Base.load, Base.sketch):
        with pytest.raises(UserError, match=rf"set diffusion\.path={STABLE_DIFFUSION}$"):
            load(moved)


def test_checkpointing_changes_no_gradient(config: DiffusionConfig) -> None:
    found = []
    for checkpointing in (False, True):
        base = replace(config, checkpointing=checkpointing).load()
        calls, block = [], base.unet.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        base.unet.conv_in.bias.requires_grad_()
        z = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
        base.unet(z, torch.tensor([5]), base.text_encoder(base.tokenize(["a face"]))[0]).sample.sum().backward()
        found.append(base.unet.conv_in.bias.grad)
        assert len(calls) == 1 + checkpointing
    assert torch.allclose(*found)


def test_large_pictures_pass_the_autoencoder_one_by_one(config: DiffusionConfig) -> None:
    base = config.load()
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    together = base.moments(images)
    base.config = replace(config, size=512)
    sizes: list[int] = []
    base.vae.encoder.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    assert torch.allclose(base.moments(images), together, atol=1e-5)
    assert sizes == [1, 1, 1]


# --- words


def test_a_rare_token_of_several_pieces_is_refused(config: DiffusionConfig) -> None:
    with pytest.raises(UserError, match="rare_token='sksbeach' is"):
        replace(config, rare_token="sksbeach").load()


def test_each_word_of_the_vocabulary_is_one_token(base: Base) -> None:
    for word in WORDS:
        assert len(base.tokenizer.tokenize(word)) == 1, word
    assert len(base.tokenizer.tokenize("a pencil sketch of sks face, on the beach")) == 10


def test_the_tokenizer_survives_saving(base: Base, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    base.tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a photo of sks face, 2 bicycles Très"
    assert again.model_max_length == base.tokenizer.model_max_length == 24
    assert again(text).input_ids == base.tokenizer(text).input_ids
    words = "a photo of sks face"
    assert again.decode(again(words).input_ids, skip_special_tokens=True) == words


def test_tokenize_pads_cuts_and_replaces_the_placeholder(base: Base) -> None:
    ids = base.tokenize(["a [V] face", "a sks face", "", "a face " * 30])
    assert ids.shape == (4, 24)
    assert torch.equal(ids[0], ids[1])
    begin, end = base.tokenizer.bos_token_id, base.tokenizer.eos_token_id
    assert ids[:, 0].tolist() == [begin] * 4
    assert ids[2, 1:].tolist() == [end] * 23
    assert ids[3, -1] == end


def test_unknown_words_are_named_once_and_in_order(base: Base) -> None:
    assert base.unknown_words("a [V] face, on the BEACH") == []
    assert base.unknown_words("a zebra on 2 très zebra, faces") == ["zebra", "très", "faces"]


# --- pictures


def test_moments_are_the_scaled_posterior(base: Base) -> None:
    pictures = images(5)
    moments = base.moments(pictures)
    assert moments.shape == (5, 2, *base.latent_shape) == (5, 2, 4, 16, 16)
    with torch.no_grad():
        posterior = base.vae.encode(pictures.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments[:, 0], posterior.mean * 0.7)
    torch.testing.assert_close(moments[:, 1], posterior.std * 0.7)
    torch.testing.assert_close(base.moments(pictures.numpy()), moments)


def test_decode_is_the_decoder_of_unscaled_latents(base: Base) -> None:
    latents = torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures = base.decode(latents)
    assert pictures.shape == (3, 3, 32, 32)
    assert pictures.dtype == torch.uint8
    with torch.no_grad():
        exact = (base.vae.decode(latents / 0.7).sample + 1) * 127.5
    assert (pictures.float() - exact.clamp(0, 255)).abs().max() <= 0.51


def test_what_is_no_number_is_no_picture(config: DiffusionConfig) -> None:
    base = config.load()
    latents = torch.zeros(2, *base.latent_shape)
    assert base.decode(latents).shape == (2, 3, 32, 32)
    for bad in (float("nan"), float("inf")):
        latents[1, 0, 0, 0] = bad
        with pytest.raises(NonFiniteError, match=r"decoded to NaN: lower the adapter's strength"):
            base.decode(latents)
    base.vae.encoder.conv_in.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="makes pictures into NaN: its weights are damaged"):
        base.moments(images(1))


def test_the_person_is_seen_in_a_prompt(base: Base) -> None:
    for prompt in ("a [V] face", "a photo of SKS", "sks, smiling"):
        assert base.says_person(prompt), prompt
    for prompt in ("", "a face", "a zwx face", "a sksbeach face", "a face " * 30 + "sks"):
        assert not base.says_person(prompt), prompt


# --- layers


@pytest.mark.parametrize("how", ["whole", "in place", "a part", "a layer"])
def test_targets_of_a_compiled_network_have_its_names(config: DiffusionConfig, how: str) -> None:
    base = config.load()
    known = list(base.targets().items())
    compiled = partial(torch.compile, backend="eager")
    attention = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    if how == "whole":
        base.unet, base.text_encoder = compiled(base.unet), compiled(base.text_encoder)
    elif how == "in place":
        base.unet.compile(backend="eager")
    elif how == "a part":
        base.unet.mid_block = compiled(base.unet.mid_block)
    else:
        attention.to_q = compiled(attention.to_q)
    assert list(base.targets().items()) == known


def test_targets_are_every_attention_and_geglu_by_name(base: Base) -> None:
    targets = base.targets()
    assert all(isinstance(layer, nn.Linear) for layer in targets.values())
    transformers = sum(name.endswith("ff.net.0.proj") for name in targets)
    assert transformers > 0
    assert sum(name.startswith("unet.") for name in targets) == 9 * transformers  # 2 x q, k, v, out and GEGLU
    assert sum(name.startswith("text_encoder.encoder.layers.1.") for name in targets) == 4
    assert sum(name.startswith("text_encoder.") for name in targets) == 8
    cross = targets["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert (cross.out_features, cross.in_features) == (32, 32)


def test_sets_leave_out_what_they_say(base: Base) -> None:
    every = set(base.places("attention"))
    geglu = {name for name in every if name.endswith(".net.0.proj")}
    words = {name for name in every if name.startswith("text_encoder.")}
    assert geglu
    assert words
    assert set(base.places("attention_unet")) == every - words
    assert set(base.places("without_geglu")) == every - geglu
    assert set(base.places("unet_attention")) == every - words - geglu


def test_base_hash_is_the_same_in_every_dtype_and_not_after_fine_tuning(config: DiffusionConfig) -> None:
    base = config.load()
    before = base_hash(base.targets())
    base.unet.to(torch.bfloat16)
    assert base_hash(base.targets()) == before
    base.unet.float()
    g = torch.Generator().manual_seed(0)
    for layer in base.targets().values():
        layer.weight.data += 1e-2 * torch.randn(layer.weight.shape, generator=g)
    assert base_hash(base.targets()) != before
