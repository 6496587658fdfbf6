"""The whole chain at tiny size: encoder, fits, hypernetwork with resume, personalisation, evaluation."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperdb import config as configuration
from hyperdb.adapters.base import delta
from hyperdb.data.people import load_people
from hyperdb.diffusion import DiffusionConfig
from hyperdb.faces.image import save_png
from hyperdb.formats.native import Personalization
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics.figures import closed, summary
from hyperdb.metrics.score import paired
from hyperdb.report.results import load
from hyperdb.report.table import markdown
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_tensors
from hyperdb.stages import status, train_hypernet
from hyperdb.tuning.photos import photos

TINY = [
    "diffusion.size=32",
    "diffusion.steps=2",
    "diffusion.dtype=fp32",
    "prior.images=2",
    "prior.prompts=[a photo of a face]",
    "adapter.a=12",
    "adapter.b=8",
]
# from the template, with AdamW: fits that move a network of random weights in two steps
FITS = ["start=template", "fit.trained=all", "fit.optimizer=adamw", "fit.logit_normal=null", "fit.noise=[0,1]"]
FITS += ["fit.views=3", "fit.rate=0.02", "fit.prior_weight=0.25", "fit.prior_rows=1", "fit.levels=2"]
HYPER = [
    *TINY,
    "validation=null",
    "model.width=32",
    "model.heads=2",
    "model.iterations=2",
    "model.encoder.name=vit_tiny_patch16_224",
    "model.encoder.size=32",
    "model.encoder.patch=16",
    "model.encoder.depth=1",
    "model.encoder.weights=null",
    "batch=2",
    "prior_rows=1",
    "warmup=1",
]


@pytest.fixture(scope="module")
def made(tiny_base, rendered, tmp_path_factory):
    """Fits and a hypernetwork over four rendered people."""
    root = tmp_path_factory.mktemp("chain")
    base = f"diffusion.path={tiny_base}"
    fits, hyper = root / "fits", root / "hyper"
    words = [base, *TINY, f"data={rendered}", "identities=3", "batch=2", "fit.steps=2", *FITS]
    configuration.run("precompute", [*words, f"out={fits}"])
    words = [base, *HYPER, f"data={rendered}", f"weights={fits}", "steps=4"]
    configuration.run("train_hypernet", [*words, f"out={hyper}"])
    return {"root": root, "base": base, "fits": fits, "hyper": hyper, "data": rendered}


def test_fits_are_complete_and_kept(made):
    index = json.loads((made["fits"] / "index.json").read_text())
    assert index["fits"] == 3
    assert index["by"] == "person"
    stamps = {p.name: p.stat().st_mtime_ns for p in made["fits"].glob("fits-*")}
    (made["fits"] / "fits-00001.safetensors").unlink()
    words = [made["base"], *TINY, f"data={made['data']}", "identities=3", "batch=2", "fit.steps=2", *FITS]
    configuration.run("precompute", [*words, f"out={made['fits']}"])
    again = {p.name: p.stat().st_mtime_ns for p in made["fits"].glob("fits-*")}
    assert again["fits-00000.safetensors"] == stamps["fits-00000.safetensors"]
    assert again["fits-00001.safetensors"] != stamps["fits-00001.safetensors"]


def test_fits_of_another_configuration_are_not_mixed_in(made):
    words = [made["base"], *TINY, f"data={made['data']}", "identities=3", "batch=2", "fit.steps=3", *FITS]
    with pytest.raises(UserError, match="another"):
        configuration.run("precompute", [*words, f"out={made['fits']}"])


def test_hypernetwork_training_resumes_bit_for_bit(made, killed):
    out = made["root"] / "resumed"
    words = [made["base"], *HYPER, f"data={made['data']}", f"weights={made['fits']}", "steps=4", f"out={out}"]
    words.append("save_every=2")
    killed("train_hypernet", words)
    assert not (out / "hypernet.safetensors").exists()
    steps, there, *_ = status.examine(out)
    assert re.fullmatch(r"steps +2 of 4 done, 2 missing; checkpoint at step 2", steps)
    assert there == f"{'jobs':20} 0 running, 1 failed"
    configuration.run("train_hypernet", words)
    whole, parts = (load_tensors(f / "hypernet.safetensors")[0] for f in (made["hyper"], out))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


PLAIN = [
    "steps=2", "fit_share=0.5", "target_view=other", "target_style=same", "target_prompt=instance", "face_weight=0",
    "signal_weight=null", "logit_normal=null", "identity_weight=0", "prior_weight=0.25", "levels=2", "rate=1e-3",
    "matrix_rate=null",
]  # fmt: skip
IDENTITY = ["identity_weight=0.1", "identity_people=2", "identity_steps=2"]


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """Return what trains a hypernetwork by PLAIN and further words, and returns its weights."""
    known = {}

    def train(*more):
        if more not in known:
            words = [made["base"], *HYPER, *PLAIN, f"data={made['data']}", f"weights={made['fits']}", *more]
            out = configuration.run("train_hypernet", [*words, f"out={tmp_path_factory.mktemp('trained')}"])
            known[more] = load_tensors(out / "hypernet.safetensors")[0]
        return known[more]

    return train


@pytest.mark.parametrize(
    ("under", "word"),
    [
        *(([], word) for word in (
            "weight_loss=plain", "target_view=same", "target_style=any", "target_prompt=caption", "beta=0",
            "fit_share=0", "prior_weight=0", "prior_rows=2", "face_weight=2", "signal_weight=0.5",
            "logit_normal=[0.2,1.0]", "levels=1", "matrix_rate=0.01", "encoder_rate=1e-4", "flips=true",
            "prompt_dropout=0.5", "identity_weight=0.1", "decay=0", "ema=0.05", "seed=1",
        )),
        (["prior_weight=0"], "alpha=0"),
        (["weights=null"], "default_spread=0.1"),  # fits have a spread of their own
        (IDENTITY, "identity_people=1"), (IDENTITY, "identity_steps=1"), (IDENTITY, "flips=true"),
        ([*IDENTITY, "alpha=0", "prior_weight=0", "fit_share=1"], "target_prompt=caption"),
    ],
)  # fmt: skip
def test_every_setting_of_the_training_counts(trained, under, word):
    without, with_it = trained(*under), trained(*under, word)
    assert without.keys() == with_it.keys()
    assert any(not torch.equal(without[name], with_it[name]) for name in without)


def test_what_is_denoised_is_the_same_person_under_its_own_caption(made):
    people = load_people(made["data"], split=None)
    captions, prompts = (train_hypernet._prompts(people, DiffusionConfig(), k) for k in ("caption", "instance"))
    photo = people.is_style("photo")
    assert not photo.all()
    for own, text, caption, is_photo in zip(captions, prompts, people.captions, photo, strict=True):
        assert own.count("sks face") == 1
        assert own.replace("sks ", "") == caption.replace("sks ", "")
        assert text == ("a sks face" if is_photo else own)
    g = torch.Generator().manual_seed(0)
    who = torch.arange(len(people.rows)).repeat(20)
    for pictures in (people.photos, people.rows):
        given, others = ([rows[i] for i in who.tolist()] for rows in (people.photos, pictures))
        shown, wanted = train_hypernet._views(given, others, 3, "other", g)
        assert photo[shown].all()
        assert (people.identity[wanted] == people.identity[shown][:, None]).all()
        assert (wanted != shown[:, None]).all()
        assert photo[wanted].all() == (pictures is people.photos)


def test_weight_loss_alone_draws_only_people_who_have_a_fit(made, tmp_path):
    words = [made["base"], *TINY, f"data={made['data']}", "identities=1", "average.steps=2"]
    words += ["fit.steps=2", "fit.levels=2"]
    fits = configuration.run("precompute", [*words, f"out={tmp_path / 'fits'}"])
    words = [made["base"], *HYPER, f"data={made['data']}", f"weights={fits}", "steps=3", "batch=2"]
    words += ["alpha=0", "prior_weight=0"]
    configuration.run("train_hypernet", [*words, f"out={tmp_path / 'out'}"])  # one fit among four people


def _three_people(tmp_path_factory, split, *words):
    """Render three people of a split."""
    out = tmp_path_factory.mktemp(split) / "heads"
    words = ["identities=3", "size=32", "workers=1", f"split={split}", *words]
    return configuration.run("render_heads", [*words, f"out={out}"])


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Three people of the validation split with two photos each."""
    return _three_people(tmp_path_factory, "validation", "views=2", "photo_views=2")


@pytest.mark.parametrize(("tracker", "file"), [("tensorboard", "events.out.tfevents*"), ("wandb", "*.wandb")])
def test_validation_writes_scores_and_previews(made, unseen, tmp_path, tracker, file, capsys, watched):
    fits = tmp_path / "fits"
    words = [
        made["base"],
        *TINY,
        f"data={unseen}",
        "identities=3",
        "fit.steps=2",
        "average.steps=2",
        "fit.levels=2",
        "fit.views=2",
    ]
    configuration.run("precompute", [*words, f"out={fits}"])
    words = [made["base"], *HYPER, f"data={made['data']}", f"weights={made['fits']}", "steps=1", f"out={tmp_path}"]
    words += [f"validation={unseen}", "validation_people=3", f"validation_weights={fits}", f"tracker={tracker}"]
    configuration.run("train_hypernet", words)
    assert list(tmp_path.rglob(file))
    if tracker == "tensorboard":
        told = {"loss", "rate/0", "preview", "validation/face_cosine_own", "validation/diffusion_mean"}
        assert watched(tmp_path) >= told
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    names = {k for r in records for k in r if k.startswith("validation/")}
    assert {f"validation/face_cosine_{x}" for x in ("own", "shuffled")} <= names
    assert {f"validation/diffusion_{x}" for x in ("own", "shuffled", "mean")} | {"validation/weights"} <= names
    found = json.loads((tmp_path / "validation.json").read_text())
    assert found["people"] == 3
    assert {f"{k}_own-{x}" for k in ("diffusion", "face_cosine") for x in ("shuffled", "mean")} < set(found)
    last = {k: v for r in records for k, v in r.items()}
    for other in ("shuffled", "mean"):
        difference = last["validation/diffusion_own"] - last[f"validation/diffusion_{other}"]
        assert found[f"diffusion_own-{other}"]["mean"] == pytest.approx(difference, abs=2e-5)
    assert "everybody's average" in capsys.readouterr().out
    assert (tmp_path / "previews" / "step-000001.png").is_file()


def test_validation_weights_its_loss_as_training_does(made, unseen, tmp_path, monkeypatch):
    """Levels, signal weight and the weight of the face: the errors counted are those of `predict` at the same draws."""
    from hyperdb.diffusion import loss
    from hyperdb.tuning import validation

    drawn = []
    predict = loss.predict

    def watched(base, latents, noise, timesteps, ids):
        out = predict(base, latents, noise, timesteps, ids)
        error = (out - loss.target(base.schedule, latents, noise, timesteps)).square()
        focus = loss.face_focus(3.0, *error.shape[2:])
        weight = loss.signal_weight(base.schedule, timesteps, 0.7)[:, None, None, None]
        drawn.append((timesteps, (weight * focus * error).mean().item()))
        return out

    monkeypatch.setattr(validation, "predict", watched)
    words = [made["base"], *HYPER, f"data={made['data']}", "weights=null", "steps=1", f"out={tmp_path}"]
    words += ["prior_weight=0", f"validation={unseen}", "signal_weight=0.7", "face_weight=3", "logit_normal=[2.0,0.1]"]
    configuration.run("train_hypernet", words)
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    found = {k: v for r in records for k, v in r.items()}
    assert len(drawn) == 3
    for (timesteps, error), name in zip(drawn, ("own", "shuffled", "mean"), strict=True):
        assert found[f"validation/diffusion_{name}"] == pytest.approx(error, abs=2e-5)
        assert timesteps.float().mean() > 850  # sigmoid(2) = .88


def test_a_bad_loss_names_the_hypernetwork_and_the_noise_levels(made, tmp_path, monkeypatch):
    from hyperdb.diffusion import loss

    right = loss.predict

    def wrong(base, latents, noise, timesteps, ids):
        out = right(base, latents, noise, timesteps, ids)
        return torch.where((timesteps > 0)[:, None, None, None] & out.requires_grad, torch.nan, out)

    monkeypatch.setattr(loss, "predict", wrong)
    words = [made["base"], *HYPER, f"data={made['data']}", "weights=null", "steps=2", f"out={tmp_path}"]
    with pytest.raises(UserError, match=r"^hypernetwork, noise levels? [\d, …]+ of 1000: the loss is nan at step 1;"):
        configuration.run("train_hypernet", words)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.fixture
def photo(rendered, tmp_path):
    from hyperdb.data.people import load_people

    image = load_people(rendered).images[0].permute(1, 2, 0).numpy()
    return save_png(tmp_path / "me (1).png", image)


def _changed(base, folder, part):
    """Copy a base with the weights of one part changed a little."""
    path = shutil.copytree(base, folder) / part / "diffusion_pytorch_model.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, {k: 1.01 * v for k, v in tensors.items()}, metadata)
    return folder


def test_training_refuses_what_it_cannot_use(made, judged, tiny_base, tmp_path):
    words = [made["base"], *HYPER, "steps=1", f"out={tmp_path / 'out'}"]
    here = [f"data={made['data']}", f"weights={made['fits']}"]
    for bad, message in (
        ([f"data={judged}", "weights=null"], "test split"),
        ([*here, "tracker=clipboard"], "clipboard"),
        ([*here, "model.encoder.weights=none.safetensors"], "train_encoder"),
        ([*here, "adapter.seed=1"], "lidb"),
        ([*here, "prompt_dropout=1"], "prompt_dropout"),
        ([*here, "flips=true", "alpha=0"], "flips"),
        ([*here, "validation_weights=runs"], "validation_weights"),
        ([*here, "diffusion.class_word=head"], "another prompt"),
    ):
        with pytest.raises(UserError, match=message):
            configuration.run("train_hypernet", [*words, *bad])
    other = _changed(tiny_base, tmp_path / "other", "unet")
    with pytest.raises(UserError, match="another base"):
        configuration.run("train_hypernet", [*words, *here, f"diffusion.path={other}"])


def test_what_is_around_a_training_may_change_when_it_goes_on(made, tmp_path, capsys):
    def train(*more):
        words = [made["base"], *HYPER, f"data={made['data']}", f"weights={made['fits']}", f"out={tmp_path / 'run'}"]
        return configuration.run("train_hypernet", [*words, "steps=2", *more])

    train("save_every=1")
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    (moved / "hypernet.safetensors").unlink()
    stamp = (moved / "checkpoint.safetensors").stat().st_mtime_ns
    data = shutil.copytree(made["data"], tmp_path / "data")
    again = ["save_every=7", "validate_every=3", "name=other", "tracker=tensorboard", f"out={moved}", f"data={data}"]
    assert (train(*again, "diffusion.device=cpu", "diffusion.attention=eager") / "hypernet.safetensors").is_file()
    assert (moved / "checkpoint.safetensors").stat().st_mtime_ns == stamp  # no step was left to do
    for other in ("rate=1", "seed=1", "diffusion.guidance=2"):
        with pytest.raises(UserError, match=f"with other {other.partition('=')[0]}"):
            train(*again, other)
    (moved / ".hyperdb.json").unlink()  # as runs of an earlier version: the checkpoint says what it is of
    with pytest.raises(UserError, match="other values of rate"):
        train(*again, "rate=1")
    train(*again)


def test_a_hypernetwork_file_can_be_trained_on(made, tmp_path):
    file = made["hyper"] / "hypernet.safetensors"
    words = [made["base"], *HYPER, f"data={made['data']}", "weights=null", "steps=1", f"init={file}"]
    configuration.run("train_hypernet", [*words, f"out={tmp_path / 'out'}", "rate=1e-9", "matrix_rate=1e-9"])
    before, after = (load_tensors(f)[0] for f in (file, tmp_path / "out" / "hypernet.safetensors"))
    assert all(torch.allclose(before[k].float(), after[k].float(), atol=1e-3) for k in before)
    for setting, said in (("adapter.seed=1", "lidb"), ("model.iterations=7", r"model.iterations=\d; set the same")):
        with pytest.raises(UserError, match=said):
            configuration.run("train_hypernet", [*words, f"out={tmp_path / setting}", setting])


def test_people_personalised_one_after_the_other_do_not_mix(made, photo, tmp_path):
    import hyperdb
    from hyperdb.faces.image import read_image

    words = [made["base"], *TINY, f"hypernet={made['hyper']}", "align=false", "finetune.steps=1", f"out={tmp_path}"]
    first, second = read_image(photo), 255 - read_image(photo)
    model, fresh = (hyperdb.load("embedded", *words) for _ in range(2))
    one = model.personalize(first)
    pipe, plain = model.pipeline(), model.pipeline()
    one.apply(pipe)
    two, alone = model.personalize(second), fresh.personalize(second)
    assert torch.equal(two.tokens, alone.tokens)
    assert all(torch.equal(a, b) for k in two.relaxed for a, b in zip(two.relaxed[k], alone.relaxed[k], strict=True))
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    draws = [p("a photo of a face", generator=torch.Generator().manual_seed(0), **settings) for p in (pipe, plain)]
    assert (draws[0].images != draws[1].images).any()


def test_several_photos_of_one_person_count_alike(made, photo, tmp_path):
    import hyperdb
    from hyperdb.faces.image import read_image

    words = [made["base"], *TINY, f"hypernet={made['hyper']}", "align=false", "finetune.steps=2", f"out={tmp_path}"]
    model = hyperdb.load("embedded", *words)
    first, second = read_image(photo), 255 - read_image(photo)
    one, two, both = (model.personalize(x, finetune=False).tokens for x in (first, second, [first, second]))
    assert not torch.allclose(one, two)
    assert torch.allclose(both, (one + two) / 2, atol=1e-5)
    iterations, crops = [], np.stack([first, second])
    model.finetune(crops, model.predict(crops), lambda n, _: iterations.append(n))
    assert iterations == [1, 2, 3, 4]  # two a photo
    iterations.clear()
    model.finetune(crops[0], model.predict(crops[0]), lambda n, _: iterations.append(n))
    assert iterations == [1, 2]  # one crop alone is one photo
    alone, more = model.personalize(first).relaxed, model.personalize([first, second]).relaxed
    assert any(not torch.equal(a, b) for k in alone for a, b in zip(alone[k], more[k], strict=True))
    other = save_png(tmp_path / "other.png", second)
    copy = save_png(tmp_path / "copy.png", first)
    _personalize(made, f"[{copy},{other}]", tmp_path / "out", f"hypernet={made['hyper']}", "preview=false")
    written = Personalization.load(tmp_path / "out" / "lidb.safetensors").tokens
    assert torch.allclose(written, both, atol=1e-5)


def test_a_list_of_photos_is_told_from_a_file_of_that_name(in_tmp):
    assert photos("[a.jpg, b.jpg]") == ["a.jpg", "b.jpg"]
    (in_tmp / "[1].jpg").touch()
    (in_tmp / "[a,b]").touch()
    assert photos("[1].jpg") == ["[1].jpg"]
    assert photos("[a,b]") == ["[a,b]"]
    assert photos("['a, b.jpg', Bob's (1).jpg]") == ["a, b.jpg", "Bob's (1).jpg"]
    for bad in ("[a.jpg,]", "[]"):
        with pytest.raises(UserError, match="photos of one person"):
            photos(bad)


def test_a_hypernetwork_of_another_base_warns(made, photo, tiny_base, tmp_path):
    other = _changed(tiny_base, tmp_path / "other", "vae")
    words = [f"hypernet={made['hyper']}", f"diffusion.path={other}", "preview=false"]
    with pytest.warns(UserWarning, match="was trained on base"):
        _personalize(made, photo, tmp_path / "out", *words)


def test_demo_draws_both_people(made, tmp_path, capsys):
    words = [made["base"], *TINY, f"hypernet={made['hyper']}", f"out={tmp_path}", "finetune.steps=1"]
    configuration.run("demo", [*words, "preview_styles=[a pencil sketch of a [V] face]"])
    said = capsys.readouterr().out
    for name in ("rendered", "astronaut"):
        assert (tmp_path / name / "preview.png").is_file()
        assert str(tmp_path / name / "preview.png") in said
    configuration.run("demo", [*words, "preview=false", "preview_styles=[]", f"out={tmp_path / 'none'}"])
    assert "preview.png" not in capsys.readouterr().out  # there is none to look at


def _personalize(made, photo, out, *more):
    words = [made["base"], *TINY, f"image={photo}", f"out={out}", "align=false", "finetune.steps=2", *more]
    return configuration.run("personalize", words)


def test_personalize_writes_everything(made, photo, tmp_path, watched):
    out = tmp_path / "out"
    _personalize(made, photo, out, f"hypernet={made['hyper']}", "tracker=tensorboard")
    names = {p.name for p in out.iterdir()}
    assert {"lidb.safetensors", "adapter.safetensors", "preview.png", "pictures.png", "report.json"} <= names
    cosines = {f"face_cosine/{name}" for name in ("base", "prediction", "fine-tuned")}
    assert watched(out) == {"loss", "rate", "pictures", *cosines}
    report = json.loads((out / "report.json").read_text())
    assert set(report["seconds"]) >= {"crop", "load", "predict", "finetune"}
    predicted, finished = (Personalization.load(out / n) for n in ("lidb.safetensors", "adapter.safetensors"))
    assert not predicted.relaxed
    assert finished.relaxed
    assert torch.equal(predicted.tokens, finished.tokens)


def test_nothing_of_another_person_is_replaced(made, photo, tmp_path):
    from hyperdb.faces.image import read_image

    out = tmp_path / "out"
    hyper = f"hypernet={made['hyper']}"
    _personalize(made, photo, out, hyper, "preview=false")
    before = (out / "adapter.safetensors").read_bytes()
    other = save_png(tmp_path / "other.png", 255 - read_image(photo))
    for image, more, named in ((other, (), "photos"), (photo, ("finetune.rate=1e-2",), r"finetune\.rate")):
        with pytest.raises(UserError, match=f"with other {named}, which would be lost.*name=NAME"):
            _personalize(made, image, out, hyper, "preview=false", *more)
    assert (out / "adapter.safetensors").read_bytes() == before
    copy = save_png(tmp_path / "copy.png", read_image(photo))  # the same person, the same adapter, with a preview
    _personalize(made, copy, out, hyper, "preview=true", "name=b")
    assert (out / "preview.png").is_file()


@pytest.mark.parametrize("name", ["preview.png", "report.json", "adapter.safetensors"])
def test_files_that_are_somebodys_are_kept(made, photo, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"replaced: {name}; choose another folder with out=FOLDER"):
        _personalize(made, photo, tmp_path / "out", "hypernet=null")
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_sweep_keeps_every_person(made, photo, tmp_path, monkeypatch):
    from hyperdb import cli
    from hyperdb.faces.image import read_image

    monkeypatch.chdir(tmp_path)
    save_png(tmp_path / "two.png", 255 - read_image(photo))
    words = [made["base"], *TINY, "hypernet=null", "align=false", "finetune.steps=1", "preview=false", "out=~/people"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["personalize", "-m", *words, "image=['me (1).png',~/two.png]"]) == 0
    found = sorted((tmp_path / "people").glob("*/adapter.safetensors"))
    assert len(found) == 2
    assert found[0].read_bytes() != found[1].read_bytes()


def test_without_a_hypernetwork_the_fine_tuning_runs_alone(made, photo, tmp_path):
    _personalize(made, photo, tmp_path / "out", "hypernet=null", "preview=false")
    alone = Personalization.load(tmp_path / "out" / "adapter.safetensors")
    assert all((up == 0).all() for _, up in alone.lidb.factors({"tokens": alone.tokens[None]}).values())


def _residual(person):
    return {name: delta(*pair) for name, pair in person.factors().items()}


def test_a_fit_begins_at_any_adapter(made, photo, tmp_path):
    _personalize(made, photo, tmp_path / "one", "hypernet=null", "preview=false", "finetune.rate=0.01")
    person = Personalization.load(tmp_path / "one" / "adapter.safetensors")
    other = replace(person, relaxed={k: (d.flip(1), u) for k, (d, u) in person.relaxed.items()})
    other.save(tmp_path / "two" / "adapter.safetensors")
    average = tmp_path / "average"
    configuration.run("edit", [f"adapter=[{tmp_path / 'one'},{tmp_path / 'two'}]", f"out={average}"])
    start = Personalization.load(average / "adapter.safetensors")
    one, two = _residual(person), _residual(other)
    for name, found in _residual(start).items():
        assert torch.allclose(found, (one[name] + two[name]) / 2, atol=1e-6)

    # a step too small to be seen leaves it where it began; as a file and in the base's words of the start too
    out = tmp_path / "begun"
    words = [f"start={average / 'adapter.safetensors'}", "finetune.rate=1e-9", "diffusion.rare_token=zwx"]
    _personalize(made, photo, out, *words, "preview_styles=[a pencil sketch of a [V] face]")
    begun = Personalization.load(out / "adapter.safetensors")
    assert (begun.rare_token, begun.class_word) == ("sks", "face")
    for name, found in _residual(begun).items():
        assert torch.allclose(found, _residual(start)[name], atol=1e-6)
    assert not (out / "lidb.safetensors").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["start"] == str(average / "adapter.safetensors")
    assert set(report["face_cosine_to_photo"]) == {"base", "start", "fine-tuned"}

    # and it is under the fit, not only in the file: the same fit from nothing is another
    _personalize(made, photo, tmp_path / "more", f"start={average}", "preview=false", "finetune.rate=0.01")
    more = Personalization.load(tmp_path / "more" / "adapter.safetensors")
    trained = {k: delta(*more.relaxed[k]) - delta(*start.relaxed[k]) for k in more.relaxed}
    assert any(not torch.allclose(trained[k], one[k], atol=1e-5) for k in trained)


def test_a_start_that_does_not_go_is_named(made, photo, tmp_path):
    for words, said in [
        (["start=none.safetensors"], "none.safetensors"),
        ([f"start={made['hyper']}", f"hypernet={made['hyper']}"], "leave out one"),
        (["start=package:embedded/hypernet/hypernet.safetensors"], "start|adapter"),
    ]:
        with pytest.raises(UserError, match=said):
            _personalize(made, photo, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="start belongs to personalize"):
        configuration.load("evaluate", ["start=x"])


def test_a_base_without_hypernetwork_says_so(made, photo, tmp_path):
    with pytest.raises(UserError, match="hypernet=null"):
        _personalize(made, photo, tmp_path / "out", "default_hypernet=null")
    assert not (tmp_path / "out").exists()


def test_bad_photos_leave_nothing_behind(made, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    blank = save_png(tmp_path / "blank.png", torch.full((64, 64, 3), 128, dtype=torch.uint8).numpy())
    for image in (tmp_path / "none.png", tmp_path / "text.png", blank):
        words = [made["base"], *TINY, f"image={image}", f"out={tmp_path / 'out'}", f"hypernet={made['hyper']}"]
        with pytest.raises(UserError, match=Path(image).name):
            configuration.run("personalize", words)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Three people with three photos and two renders of every style."""
    return _three_people(tmp_path_factory, "test", "views=17", "photo_views=3")


ROWS = [
    *("floor", "shuffled", "mean", "hyper_only", "shuffled_40", "mean_40", "hyper_40", "no_hyper_40", "lidb_fit"),
    *("copy", "ceiling"),
]
DRAWN_ONCE = ("copy", "ceiling")
PAIRS = {
    *("hyper_only-floor", "hyper_only-shuffled", "hyper_only-mean", "hyper_40-hyper_only", "hyper_40-shuffled_40"),
    *("hyper_40-mean_40", "mean_40-no_hyper_40", "hyper_40-no_hyper_40", "hyper_40-lidb_fit", "hyper_40-copy"),
}


def test_evaluate_measures_every_row_and_goes_on_where_it_was(made, judged, tmp_path):
    words = [made["base"], *TINY, f"data={judged}", f"hypernet={made['hyper']}", f"out={tmp_path}", "people=3"]
    words.append(f"rows=[{','.join(ROWS)}]")
    words += ["views=1", "images=2", "batch=2", "styled=[sketch,cartoon/beach]", "seeds=2"]
    words += ["finetune.steps=1", "methods.lidb_fit.finetune.steps=2"]
    words.append("changed=['a photo of a [V] face, in the snow','a smiling [V] face']")
    configuration.run("evaluate", words)
    result = load(tmp_path / "results.json")  # `hyperdb report` takes what is written
    assert list(result["rows"]) == ROWS
    row = result["rows"]["hyper_40"]
    assert {"cosine", "rank1", "rank1_styled", "style_accuracy", "copy_background", "diversity"} <= set(row)
    assert {"cosine_changed", "rank1_changed", "detected_changed", "place_accuracy"} <= set(row)
    # photos were not made under the prompts; the renders of the ceiling do have styles
    asked = {name: {"style_accuracy", "place_accuracy"} & set(result["rows"][name]) for name in ("copy", "ceiling")}
    assert asked == {"copy": set(), "ceiling": {"style_accuracy"}}
    assert "hyper_40-copy" in result["paired"]
    assert "hyper_40-copy" not in result["paired_further"]["place_accuracy"]
    assert row["bytes"] > result["rows"]["hyper_only"]["bytes"] > 0
    assert set(result["paired"]) == PAIRS
    told = {name: (row["start"], row["adapter"], row["steps"]) for name, row in result["rows"].items()}
    assert told["hyper_only"] == ("own", None, 0)
    assert told["hyper_40"] == ("own", "lora", 1)
    assert told["no_hyper_40"] == (None, "lora", 1)
    assert told["lidb_fit"] == (None, "lidb", 2)
    assert told["ceiling"] == (None, None, 0)
    changed = {"cosine_changed", "rank1_changed", "place_accuracy"}
    begun = {name for name, how in result["methods"].items() if "hypernet" in how}
    assert begun == {name for name, (start, _, _) in told.items() if start is not None}
    assert {result["methods"][name]["hypernet"] for name in begun} == {result["hypernet"]["digest"]}
    compared = {"rank1", "rank1_styled", "style_accuracy", "copy_background", "copy_pose", "diversity"}
    assert set(result["paired_further"]) == compared | changed
    # an untrained base draws no faces: there is no way to go; the backgrounds tell the rows apart
    assert not any(figures["detected"] for figures in result["rows"].values())
    assert result["closed"] == {}
    assert len({figures["copy_background"]["mean"] for figures in result["rows"].values()}) > 5
    assert result["rows"]["ceiling"]["bytes"] == result["rows"]["copy"]["bytes"] == 0
    assert result["rows"]["mean_40"]["bytes"] == row["bytes"]
    # every figure comes from the values: a number a row, figure, seed and person
    assert len(result["persons"]) == result["people"] == 3
    for name, figures in result["rows"].items():
        values = {figure: np.array(v).T for figure, v in result["values"][name].items()}
        assert {v.shape for v in values.values()} == {(3, 1 if name in DRAWN_ONCE else 2)}
        assert figures["people"] == 3
        told = ("label", "start", "adapter", "steps", "people", "seconds", "trained", "bytes", "base_bytes")
        assert summary(values, 0) == {k: v for k, v in figures.items() if k not in told}
    values = {name: np.array(figures["cosine"]).T for name, figures in result["values"].items()}
    assert result["closed"] == closed({name: {"cosine": v} for name, v in values.items()}, "floor", "ceiling")
    for pair in PAIRS:
        a, b = pair.split("-")
        assert result["paired"][pair] == paired(values[a], values[b], 0)
    files = {p.stem: load_tensors(p) for p in (tmp_path / "rows").iterdir()}
    pictures = {name: tensors["images"] for name, (tensors, _) in files.items()}
    for tensors, told in files.values():  # which say what they show
        assert json.loads(told["persons"]) == result["persons"]
        assert len(prompts := json.loads(told["prompts"])) == tensors["images"].shape[1]
        assert prompts[:3] == ["a sks face", "a sks face", "a photo of a [V] face, in the snow"]
    assert set(pictures) == {*ROWS, *(f"{r}-1" for r in ROWS if r not in DRAWN_ONCE)}
    for name in ("floor", "hyper_40"):  # another seed draws other pictures
        assert not torch.equal(pictures[name], pictures[f"{name}-1"])
    assert (pictures["copy"] == pictures["copy"][:, :1]).all()
    for one, other in (("hyper_40", "mean_40"), ("hyper_40", "shuffled_40"), ("mean_40", "no_hyper_40")):
        assert not torch.equal(pictures[one], pictures[other])
    table = markdown(result)
    assert "interval over people and seeds" in table
    assert all(f"| {row['label']} |" in table for row in result["rows"].values())
    assert "| hypernetwork + 1 iterations |" in table
    assert "| LiDB fitted to the photo, 2 iterations |" in table
    assert (tmp_path / "people.png").is_file()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    (tmp_path / "rows" / "mean.safetensors").unlink()
    first = {n: (tmp_path / n).read_bytes() for n in ("results.json", "people.png")}
    configuration.run("evaluate", [*words, "seeds=1", "results=one.json"])  # whose pictures are the first seed's
    again = json.loads((tmp_path / "one.json").read_text())
    assert (tmp_path / "one.png").is_file()
    for name, figures in again["values"].items():
        assert figures == {figure: values[:1] for figure, values in result["values"][name].items()}
    assert all((tmp_path / "rows" / n).stat().st_mtime_ns == t for n, t in kept.items() if n != "mean.safetensors")
    lost = {"methods.lidb_fit.finetune.steps=3": "rows/lidb_fit.* with other finetune.steps", "seed=1": "other seed"}
    lost |= {"finetune.rate=1": "other finetune.rate", "relaxed.rank=2": "other adapter.rank"}
    lost |= {"rows=[floor]": "would be lost .shuffled", "seeds=1": "would be lost .2 seeds", "images=3": "other images"}
    for other, named in lost.items():
        with pytest.raises(UserError, match=named):
            configuration.run("evaluate", [*words, other])
    (tmp_path / "mine.json").write_text('{"results": 1}')
    with pytest.raises(UserError, match=r"mine\.json.*results=FILE"):
        configuration.run("evaluate", [*words, "results=mine.json"])
    assert {n: (tmp_path / n).read_bytes() for n in first} == first
    # with another hypernetwork, here none, the rows that begin at no prediction stay
    configuration.run("evaluate", [*words, "hypernet=null", "rows=[floor,no_hyper_40,copy]", "results=without.json"])
    names = ("floor.safetensors", "floor-1.safetensors", "no_hyper_40.safetensors", "copy.safetensors")
    assert all((tmp_path / "rows" / n).stat().st_mtime_ns == kept[n] for n in names)
    without = json.loads((tmp_path / "without.json").read_text())
    assert without["values"]["floor"] == result["values"]["floor"]
    tensors, metadata = load_tensors(made["hyper"] / "hypernet.safetensors")
    tensors["decoder.head.bias"] += 1
    save_tensors(tmp_path / "other" / "hypernet.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"rows/hyper_only.* of a run with other hypernet"):
        configuration.run(
            "evaluate", [*words, f"hypernet={tmp_path / 'other'}", "rows=[hyper_only]", "results=other.json"]
        )


def test_any_adapter_may_begin_at_the_prediction(made, judged, tmp_path):
    """The fit's changes are added to the prediction's, whatever they are: a step too small to be seen leaves that."""
    words = [made["base"], *TINY, f"data={judged}", f"hypernet={made['hyper']}", f"out={tmp_path}", "people=3"]
    words += ["views=1", "images=2", "batch=2", "rows=[floor,hyper_only,svdiff]", "methods.svdiff.start=own"]
    words += ["methods.svdiff.finetune.steps=1", "methods.svdiff.finetune.rate=1e-9"]
    configuration.run("evaluate", words)
    pictures = {p.stem: load_tensors(p)[0]["images"].float() for p in (tmp_path / "rows").iterdir()}
    moved = (pictures["hyper_only"] - pictures["floor"]).abs().mean()
    assert (pictures["svdiff"] - pictures["hyper_only"]).abs().mean() < 0.01 * moved
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (rows["svdiff"]["start"], rows["svdiff"]["adapter"]) == ("own", "svdiff")
    assert rows["svdiff"]["bytes"] > rows["hyper_only"]["bytes"] > 0


def test_a_method_may_use_fewer_refinements(made, judged, tmp_path):
    """Its pictures are those of a hypernetwork that refines so many times, and other rows keep theirs."""
    words = [made["base"], *TINY, f"data={judged}", "people=3", "views=1", "images=1", "methods.hyper_40_k1.train=null"]
    hypernet = Hypernet.load(made["hyper"] / "hypernet.safetensors")
    hypernet.refine(1)
    hypernet.save(tmp_path / "one" / "hypernet.safetensors", {"base": hypernet.metadata["base"]})

    def pictures(hyper, *rows, more=()):
        out = tmp_path / f"{hyper.name}-{len(rows)}"
        configuration.run("evaluate", [*words, f"hypernet={hyper}", f"rows=[{','.join(rows)}]", f"out={out}", *more])
        return {row: load_tensors(out / "rows" / f"{row}.safetensors")[0]["images"] for row in rows}

    both = pictures(made["hyper"], "hyper_40_k1", "hyper_only")
    (out,) = tmp_path.glob("hyper-2")
    told = json.loads((out / "results.json").read_text())["settings"]
    assert (told["views"], told["diffusion"]["size"], told["hypernet"]["steps"]) == (1, 32, 4)
    assert torch.equal(both["hyper_40_k1"], pictures(tmp_path / "one", "hyper_only")["hyper_only"])
    assert torch.equal(both["hyper_only"], pictures(made["hyper"], "hyper_only")["hyper_only"])
    assert not torch.equal(both["hyper_40_k1"], both["hyper_only"])
    with pytest.raises(UserError, match=r"hyper_40_k1\.refinements=3: the hypernetwork was trained with 2"):
        pictures(made["hyper"], "hyper_40_k1", "floor", "copy", more=["methods.hyper_40_k1.refinements=3"])


def test_evaluate_refuses_what_it_cannot_judge(made, judged, tmp_path):
    words = [made["base"], *TINY, f"data={judged}", f"hypernet={made['hyper']}", f"out={tmp_path}"]
    bad_words = {"rows=[best]": "floor", "styled=[fresco]": "fresco", "styled=[sketch/moon]": "moon"}
    bad_words["changed=['a face, on the beach']"] = "where the person is meant"
    bad_words |= {"recognisers=[]": "least one", "views=3": "photos", "split=train": "split"}
    for bad, message in bad_words.items():
        with pytest.raises(UserError, match=message):
            configuration.run("evaluate", [*words, bad, *(["views=1"] if "views" not in bad else [])])
    with pytest.raises(UserError, match="test split"):  # of data, where people of the validation are asked for
        configuration.run("evaluate", [*words, "views=1", "split=validation"])
