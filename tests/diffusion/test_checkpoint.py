"""One file in Stable Diffusion's first format, as other tools ship it, is the same base as the folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_tensors

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
HEAD = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, layers: int) -> str:
    """Return the first format's name of a UNet tensor; a block has `layers` residual layers, one more upwards."""
    for ours, theirs in HEAD.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    where, *rest = name.split(".")
    if where == "mid_block":
        place, rest = f"middle_block.{MIDDLE['.'.join(rest[:2])]}", rest[2:]
        kind = "resnets" if place[-1] in "02" else "attentions"
    else:
        block, kind, layer, rest = int(rest[0]), rest[1], int(rest[2]), rest[3:]
        side = "input" if where == "down_blocks" else "output"
        first = 1 + block * (layers + 1) if side == "input" else block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest[-1]}"
        if kind == "upsamplers":  # every block of the small base has attention
            return f"output_blocks.{first + layers}.2.conv.{rest[-1]}"
        place = f"{side}_blocks.{first + layer}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([place, *rest])


def vae_name(name: str, blocks: int) -> str:
    """Return the first format's name of a tensor of the autoencoder."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for i in range(blocks):
        up = blocks - 1 - i
        name = name.replace(f"encoder.down_blocks.{i}.resnets.", f"encoder.down.{i}.block.")
        name = name.replace(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
        name = name.replace(f"decoder.up_blocks.{i}.resnets.", f"decoder.up.{up}.block.")
        name = name.replace(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{up}.upsample.")
    return name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")


@pytest.fixture(scope="module")
def folder(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture(scope="module")
def checkpoint(folder: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {}
    for name, value in folder.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, 1)}"] = value
    for name, value in folder.vae.state_dict().items():
        tensors[f"first_stage_model.{vae_name(name, 2)}"] = value
    for name, value in folder.text_encoder.state_dict().items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{inner}"] = value
    assert len(tensors) == sum(len(m.state_dict()) for m in (folder.unet, folder.vae, folder.text_encoder))
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_tensors(path, {k: v.contiguous() for k, v in tensors.items()})
    return path


def drawn(base: Base) -> torch.Tensor:
    return base.decode(sample(base, ["a sks face"], start_noise(base, [0]), 2, 3.0))


def test_a_checkpoint_draws_what_the_folder_draws(folder: Base, checkpoint: Path, tiny_base: Path) -> None:
    base = replace(folder.config, path=str(checkpoint), config=str(tiny_base)).load()
    assert torch.equal(drawn(base), drawn(folder))
    assert base.schedule.config.prediction_type == folder.schedule.config.prediction_type == "v_prediction"
    assert set(base.targets()) == set(folder.targets())
    assert base.digest == folder.digest


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers' own use of the hub
def test_a_hub_layout_with_a_variant_draws_what_the_folder_draws(
    folder: Base, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--someone--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    snapshot = shutil.copytree(tiny_base, cache / "snapshots" / ("a" * 40))
    for file in snapshot.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.utils.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    base = replace(folder.config, path="someone/model", variant="fp16").load()
    assert torch.equal(drawn(base), drawn(folder))
    assert base.digest == folder.digest
    with pytest.raises(UserError, match=r"unet of diffusion\.variant=null, .* set diffusion\.variant=fp16$"):
        replace(folder.config, path="someone/model").load()
    with pytest.raises(UserError, match="no usable unet"):
        replace(folder.config, path="someone/model", variant="bf16").load()


def test_a_pickle_is_never_opened(folder: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").write_bytes(b"anything")
    for path in ("model.ckpt", str(tmp_path / "model.ckpt")):
        with pytest.raises(UserError, match=r"model\.ckpt is a pickle, .*from_single_file\('.*model\.ckpt'\)"):
            replace(folder.config, path=path).load()
    for path in ("none.ckpt", "none.pt", "none.bin"):
        with pytest.raises(UserError, match=f"no base model at {path}"):
            replace(folder.config, path=path).load()
    Path("model.gguf").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"model\.gguf is not a base model of a known format"):
        replace(folder.config, path="model.gguf").load()


def test_what_is_no_checkpoint_is_named(folder: Base, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no base model at .*none\.safetensors"):
        replace(folder.config, path=str(tmp_path / "none.safetensors")).load()
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"x": torch.zeros(2)})
    with pytest.raises(UserError, match=r"other\.safetensors is not a Stable Diffusion checkpoint"):
        replace(folder.config, path=str(other), config=str(tiny_base)).load()


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("input_blocks.0.0.weight", (8, 9, 3, 3), "a UNet of 9 input channels, as for inpainting"),
        ("out.2.weight", (8, 8, 3, 3), "a UNet of 8 output channels"),
        ("label_emb.0.0.weight", (8, 2816), "is of the kind of Stable Diffusion XL"),
    ],
)
def test_a_checkpoint_of_another_kind_is_named(
    folder: Base, tmp_path: Path, name: str, shape: tuple[int, ...], said: str
) -> None:
    shapes = {"input_blocks.0.0.weight": (8, 4, 3, 3), "out.2.weight": (4, 8, 3, 3), name: shape}
    file = tmp_path / "other.safetensors"
    save_tensors(file, {f"model.diffusion_model.{k}": torch.zeros(v) for k, v in shapes.items()})
    with pytest.raises(UserError, match=rf"other\.safetensors' .*{said}.*; hyperdb needs a text-to-image model"):
        replace(folder.config, path=str(file)).load()
