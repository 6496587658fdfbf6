"""The trainings of the embedded base at tiny size: they run, resume, and write a folder diffusers loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from hyperdb import config as configuration
from hyperdb.data.people import load_people
from hyperdb.metrics import judge
from hyperdb.metrics.figures import Standard
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata, load_tensors, save_tensors
from hyperdb.stages.train_encoder import components


@pytest.fixture(scope="module")
def vae(rendered, tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder")
    words = [f"data={rendered}", f"out={out}", "channels=[8,16]", "steps=2", "batch=2", "held_out=2"]
    configuration.run("train_autoencoder", [*words, "tracker=tensorboard"])
    return out / "vae"


def _base_words(rendered, vae, out):
    return [
        f"data={rendered}", f"vae={vae}", f"out={out}", "channels=[16,32]", "heads=[1,2]", "text_width=32",
        "text_layers=1", "steps=4", "batch=2", "save_every=2",
    ]  # fmt: skip


def _changed(vae, folder):
    """Copy an autoencoder with its weights changed a little."""
    path = shutil.copytree(vae, folder) / "diffusion_pytorch_model.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, {k: 1.1 * v for k, v in tensors.items()}, metadata)
    return folder


def test_autoencoder_reports_and_scales(rendered, vae, watched):
    """The latents of whom it was trained on have deviation 1, and the report is that of whom it was not."""
    report, model = json.loads((vae.parent / "report.json").read_text()), AutoencoderKL.from_pretrained(vae)
    images = load_people(rendered).images[:].float() / 127.5 - 1
    with torch.no_grad():
        latents = [model.encode(x).latent_dist.mean for x in (images[:9], images[9:])]
        away = (model.decode(latents[1]).sample.clamp(-1, 1) - images[9:]) / 2
    assert latents[0].std().item() * model.config.scaling_factor == pytest.approx(1, abs=1e-4)
    assert report["psnr_held_out"] == pytest.approx(-10 * away.square().mean().log10().item(), abs=0.01)
    assert (vae.parent / "reconstructions.png").is_file()
    told = {"loss", "pixels", "edges", "colour", "kl", "rate/0", "psnr_held_out"}
    assert watched(vae.parent) == {*told, "reconstructions"}


def test_an_autoencoder_can_be_trained_on(rendered, vae, tmp_path):
    words = [f"data={rendered}", f"out={tmp_path}", "steps=1", "batch=2", "held_out=2", "rate=1e-9"]
    configuration.run("train_autoencoder", [*words, f"init={vae}"])
    name = "diffusion_pytorch_model.safetensors"
    one, two = (load_tensors(f / name)[0] for f in (vae, tmp_path / "vae"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    assert json.loads((tmp_path / "report.json").read_text())["init"]
    with pytest.raises(UserError, match="nothing_here"):
        configuration.run("train_autoencoder", [*words, "init=nothing_here"])


def test_base_trains_resumes_and_goes_on(rendered, vae, tmp_path, killed, watched):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    configuration.run("train_base", [*_base_words(rendered, vae, whole), "tracker=tensorboard"])
    assert watched(whole) == {"loss", "rate/0", "samples"}
    killed("train_base", _base_words(rendered, vae, parts))
    configuration.run("train_base", _base_words(rendered, vae, parts))
    name = "base/unet/diffusion_pytorch_model.safetensors"
    one, two = (load_tensors(f / name)[0] for f in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)
    pipeline = StableDiffusionPipeline.from_pretrained(whole / "base", safety_checker=None)
    assert pipeline.tokenizer.model_max_length == 24
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    # a further segment from the written weights
    segment = [f"data={rendered}", f"init={whole / 'base'}", f"out={tmp_path / 'segment'}", "steps=1", "batch=2"]
    configuration.run("train_base", [*segment, f"vae={_changed(vae, tmp_path / 'vae')}"])
    assert json.loads((tmp_path / "segment" / "report.json").read_text())["init"]
    name = "diffusion_pytorch_model.safetensors"
    inside, given = (load_tensors(f / name)[0] for f in (tmp_path / "segment" / "base" / "vae", tmp_path / "vae"))
    assert all(torch.allclose(inside[k].float(), given[k].float(), atol=1e-2) for k in given)


def test_a_bad_loss_names_training_and_noise_level(rendered, vae, tmp_path, monkeypatch):
    from hyperdb.diffusion import loss

    right, calls = loss.predict, []

    def wrong(base, latents, noise, timesteps, ids):
        calls.append(timesteps)
        out = right(base, latents, noise, timesteps, ids)
        return torch.where(torch.tensor(len(calls) == 4), torch.nan, out)

    monkeypatch.setattr(loss, "predict", wrong)
    words = _base_words(rendered, vae, tmp_path)
    with pytest.raises(UserError, match=r"^base, noise levels \d+, \d+ of 1000: the loss is nan at step 4; lower"):
        configuration.run("train_base", words)
    assert load_metadata(tmp_path / "checkpoint.safetensors")["step"] == "3"
    monkeypatch.setattr(loss, "predict", right)
    configuration.run("train_base", words)
    assert (tmp_path / "base").is_dir()


def test_a_missing_autoencoder_is_named(rendered, tmp_path):
    with pytest.raises(UserError, match="train_autoencoder"):
        configuration.run("train_base", [f"data={rendered}", f"vae={tmp_path / 'no'}", f"out={tmp_path / 'out'}"])


def test_every_word_of_the_captions_is_one_token(rendered):
    from hyperdb.heads.captions import vocabulary
    from hyperdb.stages.train_base import build_tokenizer

    tokenizer = build_tokenizer(vocabulary(), 24)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer("a photo of a sks face")["input_ids"][0] == tokenizer.bos_token_id


def test_encoder_needs_enough_people(rendered, tmp_path):
    with pytest.raises(UserError, match="lower held_out"):
        configuration.run("train_encoder", [f"data={rendered}", f"out={tmp_path}"])


def test_encoder_trains(rendered, tmp_path, watched):
    small = ["batch=2", "held_out=1", "steps=2", "encoder.size=32", "portrait=16", "shape=3"]
    configuration.run("train_encoder", [f"data={rendered}", f"out={tmp_path}", *small, "tracker=tensorboard"])
    assert watched(tmp_path) >= {"loss", "portrait", "shape", "rate/0", "portrait_r2", "rank1_held_out"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["people_held_out"] == report["rank1_held_out"] == 1  # alone, that person is the nearest
    assert report["portrait_r2"] < 0.5  # two steps teach no stranger's portrait
    assert report["shape_r2"] < 0.5
    tensors, _ = load_tensors(tmp_path / "encoder.safetensors")
    means = [v for k, v in tensors.items() if k.endswith("running_mean")]
    assert means
    assert all((v != 0).any() for v in means)


def test_components_come_largest_first_and_of_unit_variance():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    points = corners * torch.tensor([1.0, 5.0, 3.0]) + 7
    found = components(points, 2)
    unit = (7 / 8) ** 0.5  # by hand: of eight points, variance 8 / 7; an axis points to its largest coordinate's side
    assert torch.allclose(found, corners[:, [1, 2]] * unit, atol=1e-5)
    assert components(points[:3], 40).shape == (3, 2)
    assert components(points, 0).shape == (8, 0)


JUDGES = {  # its settings at tiny size, its figures
    "prompts": ([], {"accuracy": {"style", "place"}}),
    "clip": (["judge.width=32", "judge.layers=1", "judge.patch=16", "judge.text_width=32", "judge.text_layers=1"],
             {"recall1": {"caption", "picture"}, "accuracy": {"style", "place"}}),
    "vicreg": (["judge.expander=16"], {"auc": {"photo"}, "rank1": {"photo"}, "probe": {"style", "place"}}),
    "verifier": (["judge.pictures=3"], {"auc": {"photo"}, "rank1": {"photo"}}),
}  # fmt: skip


def _judge_words(name, rendered, tiny_base, out):
    words = [f"data={rendered}", f"out={out}", f"diffusion.path={tiny_base}", "diffusion.size=32", "save_every=2"]
    return [f"judge={name}", *words, "batch=6", "held_out=2", "steps=4", *JUDGES[name][0]]


@pytest.mark.parametrize("name", JUDGES)
def test_judge_trains_and_resumes(name, tiny_base, rendered, tmp_path, killed, watched):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    configuration.run("train_judge", [*_judge_words(name, rendered, tiny_base, whole), "tracker=tensorboard"])
    report = json.loads((whole / "report.json").read_text())
    for kind in ("renders", "reconstructions"):
        for figure, of in JUDGES[name][1].items():
            assert set(report[f"{figure}_{kind}"]) >= of
            assert all(0 <= value <= 1 for value in report[f"{figure}_{kind}"].values())
            assert watched(whole) >= {f"{figure}_{kind}/{name}" for name in of} | {"loss", "rate/0"}
    killed("train_judge", _judge_words(name, rendered, tiny_base, parts))
    configuration.run("train_judge", _judge_words(name, rendered, tiny_base, parts))
    file = "judge.safetensors" if name == "prompts" else "judge/model.safetensors"
    one, two = (load_tensors(f / file)[0] for f in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = "vicreg" if name == "prompts" else "prompts"
    with pytest.raises(UserError, match="of a run with other"):  # one folder, one judge
        configuration.run("train_judge", _judge_words(other, rendered, tiny_base, whole))


@pytest.mark.parametrize("name", ["clip", "vicreg", "verifier"])
def test_a_trained_judge_judges(name, tiny_base, rendered, tmp_path):
    """It is loaded as `evaluate` does, and gives figures: of photos with themselves, one."""
    configuration.run("train_judge", [*_judge_words(name, rendered, tiny_base, tmp_path), "steps=1"])
    found, people = judge(name, str(tmp_path / "judge"), torch.device("cpu")), load_people(rendered)
    folder = {file.name for file in (tmp_path / "judge").iterdir()}
    assert {"config.json", "model.safetensors"} <= folder
    if name == "clip":
        assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= folder
    features = found(people.images[:])
    assert torch.allclose(features.norm(dim=-1), torch.ones(len(people)))
    assert torch.allclose(torch.cat([found(x) for x in people.images.split(5)]), features, atol=1e-6)
    assert found(torch.zeros(1, 3, 50, 70, dtype=torch.uint8)).isfinite().all()  # no face, another size
    photos = people.images[torch.stack([rows[:1] for rows in people.photos])]
    recognised, whole = ([found], []) if name == "verifier" else ([], [found])
    standard = Standard(recognised, None, photos, photos, [], {}, [], whole, ["a photo of a face"])
    score = standard.measure({"photos": photos})["photos"]
    figure = {"clip": "clip_i", "vicreg": "vicreg", "verifier": "cosine"}[name]
    assert torch.allclose(score[figure], torch.ones(4, dtype=score[figure].dtype), atol=1e-5)
    assert name != "clip" or score["clip_t"].isfinite().all()
    assert name != "verifier" or (score["detected"] == 1).all()


def test_judges_need_people_to_compare(tiny_base, rendered, tmp_path):
    words = _judge_words("verifier", rendered, tiny_base, tmp_path)
    with pytest.raises(UserError, match="held_out=1: this judge is measured on at least 2 people"):
        configuration.run("train_judge", [*words, "held_out=1"])
    with pytest.raises(UserError, match="1 people to learn from have two pictures"):
        configuration.run("train_judge", [*words, "held_out=3"])
    with pytest.raises(UserError, match=r"judge\.pictures=1"):
        configuration.run("train_judge", [*words, "judge.pictures=1"])
    with pytest.raises(UserError, match=r"judge\.width=48"):
        configuration.run("train_judge", [*_judge_words("clip", rendered, tiny_base, tmp_path), "judge.width=48"])
    assert not list(tmp_path.iterdir())
