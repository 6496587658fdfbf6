"""What trainings and an evaluation find at tiny size is what tests/golden says: a redesign moves no figure."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperdb import config as configuration
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.adapters.lora import LoRA
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime import precision
from hyperdb.runtime.journal import Journal
from hyperdb.tuning.fit import FitConfig, fit
from hyperdb.tuning.prior import PriorConfig, load_prior

STEPS = 10
ROWS = (
    "floor", "shuffled", "mean", "hyper_only", "shuffled_40", "mean_40", "hyper_40", "no_hyper_40", "lidb_fit", "copy",
    "ceiling",
)  # fmt: skip
TINY = [
    "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "diffusion.device=cpu", "prior.images=2",
    "prior.prompts=[a photo of a face,a pencil sketch of a face]", "adapter.a=12", "adapter.b=8",
]  # fmt: skip
HYPER = [
    *TINY, "validation=null", "model.width=32", "model.heads=2", "model.iterations=2", "model.summary=2",
    "model.encoder.name=vit_tiny_patch16_224", "model.encoder.size=32", "model.encoder.patch=16",
    "model.encoder.depth=1", "model.encoder.weights=null", "batch=4", "levels=2", "warmup=1", "rate=0.003",
    "default_spread=0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Multiply in float32, as a CPU does that has no bf16."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)


@pytest.fixture
def losses(monkeypatch):
    """Return the list in which the loss of every training step is put down."""
    found: list[float] = []
    advance = Journal.step

    def step(self: Journal, number: int, loss: float, **terms: float) -> None:
        found.append(loss)
        advance(self, number, loss, **terms)

    monkeypatch.setattr(Journal, "step", step)
    return found


def rows(losses: list[float]) -> dict[str, list[float]]:
    assert len(losses) == STEPS
    return {str(step): [loss] for step, loss in enumerate(losses, 1)}


@pytest.fixture(scope="module")
def base(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu", steps=2).load()


@pytest.mark.parametrize("kind", ["lidb", "relaxed"])
def test_losses_of_a_fit(base, tmp_path, golden, kind):
    """Of two people at once, with everything that a fit has: weights of levels and of the face, a prior, a warm-up."""
    settings = FitConfig(
        steps=STEPS, levels=3, noise=[0.1, 0.8], rate=0.1, warmup=3, signal_weight=0.5, face_weight=2.0,
        prior_weight=0.5, prior_rows=1,
    )  # fmt: skip
    moments = torch.rand(2, 2, 2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    moments[:, :, 1] *= 0.1
    config = PriorConfig(prompts=["a photo of a face", "a pencil sketch of a face"], images=2, levels=4)
    prior = load_prior(base, config, tmp_path / "prior.safetensors")
    lidb, found = LiDB(Layout.of(base.targets()), a=12, b=8), []
    how: dict[str, Any] = {"prior": prior, "progress": lambda _, loss: found.append(loss)}
    if kind == "lidb":
        fit(base, lidb, moments, settings, **how)
    else:
        g = torch.Generator().manual_seed(1)
        tokens = torch.randn(2, *lidb.mask.shape, generator=g)
        frozen = lidb.changes({"tokens": lidb.init(2)["tokens"] + 0.3 * tokens})
        fit(base, LoRA(lidb.layout, 2), moments, replace(settings, rate=0.03), frozen, **how)
    golden(f"fit_{kind}", rows(found), rel=1e-3)


@pytest.fixture(scope="module")
def fits(tiny_base, rendered, tmp_path_factory):
    """A store of the fits of three people."""
    words = [f"diffusion.path={tiny_base}", *TINY, f"data={rendered}", "by=person", "fit.views=2", "fit.steps=3"]
    words += ["fit.levels=2", "fit.rate=0.05", "identities=3", "start=template", "fit.trained=all"]
    words += ["fit.optimizer=adamw", "fit.logit_normal=null", "fit.noise=[0,1]", "fit.prior_weight=0.25"]
    words += ["fit.prior_rows=1"]
    return configuration.run("precompute", [*words, f"out={tmp_path_factory.mktemp('fits')}"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("diffusion", ["weights=null", "prior_weight=0.5", "flips=true", "prompt_dropout=0.3", "target_style=any",
                       "target_prompt=instance"]),
        ("weights", ["alpha=0", "prior_weight=0", "target_style=same"]),
        ("identity", ["identity_weight=1", "identity_people=2", "identity_steps=2", "matrix_rate=0.005",
                      "encoder_rate=0.0003", "beta=0.5", "fit_share=0.5"]),
    ],
)  # fmt: skip
def test_losses_of_the_hypernetwork(tiny_base, rendered, fits, losses, tmp_path, golden, kind, words):
    words = [f"diffusion.path={tiny_base}", *HYPER, f"data={rendered}", f"weights={fits}", f"steps={STEPS}", *words]
    configuration.run("train_hypernet", [*words, f"out={tmp_path}"])
    golden(f"train_hypernet_{kind}", rows(losses), rel=1e-3)


@pytest.fixture(scope="module")
def vae(tiny_base):
    return tiny_base / "vae"


@pytest.mark.parametrize(
    ("name", "stage", "words"),
    [
        ("train_autoencoder", "train_autoencoder", ["channels=[8,16]", "latent_channels=4", "held_out=2", "rate=0.03"]),
        ("train_autoencoder_decoder", "train_autoencoder",
         ["held_out=2", "rate=0.03", "init={vae}", "decoder_only=true", "crop=16", "adversarial_weight=30"]),
        ("train_base", "train_base", ["channels=[16,32]", "heads=[1,2]", "text_width=32", "text_layers=1",
                                      "vae={vae}", "warmup=1", "rate=0.003", "prompt_dropout=0.3"]),
        ("train_encoder", "train_encoder",
         ["held_out=1", "portrait=16", "rate=0.003", "workers=1", "encoder.size=32"]),
        ("train_judge", "train_judge", ["held_out=1", "rate=0.01", "diffusion.path={base}", "diffusion.size=32"]),
        ("train_judge_clip", "train_judge",
         ["judge=clip", "held_out=2", "rate=0.003", "diffusion.path={base}", "diffusion.size=32", "judge.width=32",
          "judge.layers=1", "judge.patch=16", "judge.text_width=32", "judge.text_layers=1"]),
        ("train_judge_vicreg", "train_judge",
         ["judge=vicreg", "held_out=2", "rate=0.0003", "diffusion.path={base}", "diffusion.size=32",
          "judge.expander=16"]),
        ("train_judge_verifier", "train_judge",
         ["judge=verifier", "held_out=2", "rate=0.0003", "diffusion.path={base}", "diffusion.size=32",
          "judge.pictures=2", "judge.temperature=1"]),
    ],
)  # fmt: skip
def test_losses_of_the_other_trainings(tiny_base, rendered, vae, losses, tmp_path, golden, name, stage, words):
    words = [word.format(vae=vae, base=tiny_base) for word in words]
    configuration.run(stage, [f"data={rendered}", f"out={tmp_path}", f"steps={STEPS}", "batch=4", *words])
    golden(name, rows(losses), rel=1e-3)


ROWS = [
    "floor", "shuffled", "mean", "hyper_only", "shuffled_40", "mean_40", "hyper_40", "no_hyper_40", "lidb_fit", "copy",
    "ceiling",
]  # fmt: skip


def test_figures_of_an_evaluation(tmp_path, golden):
    """Every row on the embedded base, whose pictures have faces: no figure is that of a picture without one."""
    words = ["split=test", "identities=3", "views=17", "photo_views=3", "workers=1"]
    people = configuration.run("render_heads", [*words, f"out={tmp_path / 'people'}"])
    words = [f"data={people}", f"out={tmp_path}", f"rows=[{','.join(ROWS)}]", "people=3", "images=2"]
    words += ["views=1", "styled=[sketch]", "diffusion.dtype=fp32", "diffusion.device=cpu", "diffusion.steps=4"]
    words += ["finetune.steps=2", "methods.lidb_fit.finetune.steps=2", "prior.images=2", "prior.levels=2"]
    result = json.loads(configuration.run("evaluate", words).read_text())
    found = {f"{row} {name}": x for row, figures in result["values"].items() for name, (x,) in figures.items()}
    found |= {f"{row} bytes": [figures["bytes"]] for row, figures in result["rows"].items()}
    found |= {f"{pair} cosine": [x["mean"], x["lo"], x["hi"]] for pair, x in result["paired"].items()}
    found |= {f"{row} closed": [x] for row, x in result["closed"].items()}
    golden("evaluate", found, abs=3e-3)
    for words in result["slices"].values():  # each attribute splits the same people
        assert sum(part["people"] for part in words.values()) == result["people"]
        mean = sum(part["people"] * part["floor"] for part in words.values()) / result["people"]
        assert mean == pytest.approx(result["rows"]["floor"][result["slices_of"]]["mean"], abs=1e-3)
    assert set(result["slices"]) == {"sex", "age", "skin", "reference_wears"}
    means = {row: figures["cosine"]["mean"] for row, figures in result["rows"].items()}
    way = means["ceiling"] - means["floor"]
    assert way > 0.1
    for row in set(means) - {"floor", "ceiling"}:
        assert result["closed"][row] == pytest.approx((means[row] - means["floor"]) / way, abs=2e-3)
