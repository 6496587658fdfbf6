"""Shared set-up: no network, no trackers, few threads; nothing a test writes lands in the checkout."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

# before any library reads them, and inherited by the subprocesses that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# what is kept of data from one test to the next, and by `datasets`; gone with the process that made it
CACHE = tempfile.TemporaryDirectory(prefix="hyperdb-tests-")
os.environ.setdefault("HYPERDB_CACHE", f"{CACHE.name}/hyperdb")
os.environ.setdefault("HF_DATASETS_CACHE", f"{CACHE.name}/datasets")


GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/ from what the code does now")
    parser.addoption("--write-screenshots", action="store_true", help="write docs/web-*.png from the page as it is now")
    parser.addoption("--examples", type=int, default=2000, help="files of a kind in test_hostile.py's slow tests")
    parser.addoption("--kills", type=int, default=3, help="how often test_surviving.py kills each stage")
    parser.addoption("--people", type=int, default=40, help="personalised in 2 iterations by test_long_running.py")
    parser.addoption("--whole-people", type=int, default=12, help="personalised in all iterations there")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Return a function that compares named lists of numbers with a text file of tests/golden.

    With --write-golden it writes the file instead. A line holds a name, a colon and its numbers.
    """

    def compare(name: str, found: Mapping[str, Sequence[float]], **tolerance: float) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--write-golden"):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text("".join(f"{key}: {' '.join(f'{x:.6f}' for x in row)}\n" for key, row in found.items()))
        lines = [line.partition(": ")[::2] for line in path.read_text().splitlines()]
        known = {key: [float(x) for x in row.split()] for key, row in lines}
        assert found.keys() == known.keys(), f"{path} has other rows"
        for key, row in found.items():
            assert row == pytest.approx(known[key], **tolerance), f"{key} is not what {path} says; see its README.md"

    return compare


@pytest.fixture
def killed(monkeypatch) -> Callable[[str, Sequence[str]], None]:
    """Return a function that runs a training and ends it as soon as it has saved its first checkpoint."""
    from hyperdb import config
    from hyperdb.runtime import checkpoint

    save = checkpoint.save

    def save_and_die(path, step, *rest):
        save(path, step, *rest)
        raise KeyboardInterrupt

    def run(stage: str, words: Sequence[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                config.run(stage, words)

    return run


@pytest.fixture
def watched() -> Callable[[Path], set[str]]:
    """Return a function that says which figures and pictures a run in a folder told TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def names(out: Path) -> set[str]:
        tags = EventAccumulator(str(out / "tensorboard")).Reload().Tags()
        return {*tags["scalars"], *tags["images"]}

    return names


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["a", "photo", "of", "face", "pencil", "sketch", "sks", "zwx", "smiling", "on", "the", "beach", ","]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Return the folder of an untrained Stable Diffusion of 32 px, v-prediction, that knows WORDS."""
    import torch
    from diffusers import AutoencoderKL

    from hyperdb.stages.train_base import Config, new_base, save_base

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
            mid_block_add_attention=False,
            scaling_factor=0.7,
        )
        base = new_base(Config(channels=[16, 32], heads=[2, 2], text_width=32, text_layers=2), vae, WORDS)
    folder = tmp_path_factory.mktemp("tiny") / "base"
    save_base(base, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_judges(tmp_path_factory):
    """Return the folders of an untrained DINO and VICReg, 32 px, and an untrained CLIP, 24 px, which knows WORDS."""
    import timm
    import torch
    from timm.models import save_for_hf
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from hyperdb.stages.train_base import build_tokenizer

    folders = {name: tmp_path_factory.mktemp("judges") / name for name in ("dino", "vicreg", "clip")}
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    tokenizer = build_tokenizer(WORDS, 16)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words |= {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=layers | words, vision_config=layers | {"image_size": 24, "patch_size": 8}, projection_dim=12
    )
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vits = {name: timm.create_model("vit_tiny_patch16_224", num_classes=0, **small) for name in ("dino", "vicreg")}
        clip = CLIPModel(config)
    for name, vit in vits.items():
        save_for_hf(vit, folders[name], model_args=small, safe_serialization=True)
    clip.save_pretrained(folders["clip"])
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folders["clip"])
    return folders


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Return a folder of 3 rendered people of the test split with 4 photos each, 32 px."""
    from hyperdb.stages.render_heads import Config, run

    out = str(tmp_path_factory.mktemp("test") / "heads")
    return run(Config(out=out, identities=3, views=4, photo_views=4, size=32, workers=1, split="test"))


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Return a folder of 4 rendered people with 3 views each, in shards of 2 people, 32 px."""
    from hyperdb.stages.render_heads import Config, run

    out = str(tmp_path_factory.mktemp("rendered") / "heads")
    return run(Config(out=out, identities=4, views=3, photo_views=2, size=32, shard=2, workers=1))


E4T = ["diffusion.size=32", "diffusion.dtype=fp32", "model.width=32", "model.heads=2", "model.iterations=1",
       "model.encoder.name=vit_tiny_patch16_224", "model.encoder.size=32", "model.encoder.patch=16",
       "model.encoder.depth=1", "model.encoder.weights=null", "batch=4", "steps=40", "rate=0.02", "warmup=0",
       "decay=0.5", "ema=0.9", "word_weight=1e-4", "save_every=20", "held_out=0"]  # fmt: skip


@pytest.fixture(scope="session")
def pretrain(tiny_base, rendered):
    """Return the words of a tiny `train_e4t`, without its folder."""
    return [f"diffusion.path={tiny_base}", f"data={rendered}", *E4T]


@pytest.fixture(scope="session")
def e4t(pretrain, tmp_path_factory):
    """Return the file of an encoder of E4T, trained on `rendered` people for the `tiny_base`."""
    from hyperdb import config

    return config.run("train_e4t", [*pretrain, f"out={tmp_path_factory.mktemp('e4t')}"]) / "e4t.safetensors"
