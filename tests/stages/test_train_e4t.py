"""E4T at tiny size: the pretraining learns and resumes, the tuning begins there, wrong files are told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hyperdb import config
from hyperdb.adapters import E4TConfig
from hyperdb.adapters.inject import Injection
from hyperdb.data.people import latent_moments, load_people
from hyperdb.diffusion.loss import diffusion_loss
from hyperdb.faces.image import read_image, save_png
from hyperdb.formats.native import Personalization
from hyperdb.hypernet.e4t import E4TEncoder
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors, save_tensors
from hyperdb.runtime.seed import generator
from hyperdb.tuning.personalizer import Personalizer, to_images
from hyperdb.tuning.trainable import trainable


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    save_png(path, np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), {})
    return path


@pytest.fixture(scope="module")
def words(tiny_base, photo, e4t):
    base = [f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32"]
    return [*base, f"image={photo}", "align=false", "preview=false", "adapter=e4t", f"adapter.encoder={e4t}"]


def test_what_is_predicted_denoises_photos_better_than_the_class_word(words, rendered):
    """On noise that the training has not seen."""
    model, people = Personalizer(config.load("personalize", words)), load_people(rendered, size=32)
    base, rows = model.base, torch.cat(people.photos)
    g = torch.Generator().manual_seed(1)
    z = latent_moments(base, people)[rows, 0].float()
    t = torch.randint(0, base.schedule.config.num_train_timesteps, (len(rows),), generator=g)
    noised = z, torch.randn(z.shape, generator=g), t, base.tokenize(["a [V] face"]).expand(len(rows), -1)
    begun = model.begin(model.config.adapter, people.images[rows][:, None]).params

    injection = Injection(base.sites(model.trainable.layout.names))

    def loss(params):
        with torch.no_grad(), injection.using(model.trainable.changes(params)):
            return diffusion_loss(base, *noised).mean().item()

    plain = model.trainable.init(len(rows), injection.sites)
    losses = [loss(begun), loss({**begun, "vector": plain["vector"]}), loss(plain)]
    assert losses[0] < losses[1] < losses[2]  # word and offsets, the offsets alone, nothing
    spread = begun["vector"].std(0)
    assert spread.max() > 0  # and is not everybody's


def test_a_resumed_run_is_an_undisturbed_one(pretrain, e4t, tmp_path, killed):
    killed("train_e4t", [*pretrain, f"out={tmp_path}"])
    config.run("train_e4t", [*pretrain, f"out={tmp_path}"])
    whole, parts = (load_tensors(file)[0] for file in (e4t, tmp_path / "e4t.safetensors"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    report = load_json(tmp_path / "report.json")
    assert E4TEncoder.load(e4t).metadata["base"] == report["base"]
    with pytest.raises(UserError, match="of a run with other word_weight"):
        config.run("train_e4t", [*pretrain, f"out={tmp_path}", "word_weight=1"])


def test_the_word_is_near_the_class_word_and_its_length_is_the_penalty(e4t):
    model = E4TEncoder.load(e4t)
    with torch.no_grad():
        model.decoder.linear.zero_()
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.zero_()
        model.decoder.head.bias[0, :2] = torch.tensor([3.0, -4.0])
    begun = model.begin(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    expected = model.centre[0].clone()
    expected[:2] += torch.tensor([0.3, -0.4])
    torch.testing.assert_close(begun["vector"], expected.expand(2, -1), rtol=1e-4, atol=1e-4)  # 0.1 in fp16
    torch.testing.assert_close(model.penalty(begun["vector"]), torch.tensor([25.0, 25.0]), rtol=1e-2, atol=1e-2)
    assert [*begun] == ["vector", *model.names]
    assert all(torch.equal(begun[name], value[None]) for name, value in zip(model.names, model.offsets, strict=True))


def test_unseen_people_show_whether_a_word_is_its_persons(pretrain, words, rendered, tmp_path, capsys, watched):
    def measured(*words):
        report = load_json(config.run("train_e4t", [*pretrain, "held_out=2", *words]) / "report.json")
        return report["held_out"]

    apart = measured(f"out={tmp_path / 'apart'}", "word_weight=0", "rate=3", "tracker=tensorboard")
    assert watched(tmp_path / "apart") >= {"loss", "rate/0", "held_out/own", "held_out/another"}
    assert apart["people"] == 2
    assert abs(apart["others_above_own"]["mean"]) > 1e-4
    assert apart["error_of_another"] - apart["error"] == pytest.approx(apart["others_above_own"]["mean"])
    assert "2 people unseen: error" in capsys.readouterr().out
    # the last two people, the first photo given and the last denoised, at the middle of each of eight levels
    base = Personalizer(config.load("personalize", words)).base
    people, model = load_people(rendered, size=32), E4TEncoder.load(tmp_path / "apart" / "e4t.safetensors")
    first, last = (torch.stack([rows[i] for rows in people.photos[-2:]]) for i in (0, -1))
    begun, (mean, std) = model.begin(people.images[first]), latent_moments(base, people)[last].float().unbind(1)
    _, adapter = trainable(base, E4TConfig())
    injection, errors = Injection(base.sites(adapter.layout.names)), []
    for level in range(8):
        g = generator(0, "e4t held out", 0, level)
        jitter, noise = (torch.randn(mean.shape, generator=g) for _ in "zn")
        t = torch.full((2,), int((level + 0.5) / 8 * base.schedule.config.num_train_timesteps))
        with torch.no_grad(), injection.using(adapter.changes(begun)):
            ids = base.tokenize(["a [V] face"]).expand(2, -1)
            errors.append(diffusion_loss(base, mean + std * jitter, noise, t, ids).mean().item())
    injection.remove()
    assert apart["error"] == pytest.approx(sum(errors) / 8, rel=1e-5)
    same = measured(f"out={tmp_path / 'same'}", "steps=1", "rate=1e-9")  # everybody's word is next to the class word
    assert abs(same["others_above_own"]["mean"]) < abs(apart["others_above_own"]["mean"]) / 10
    with pytest.raises(UserError, match="too few people with several photos for held_out=4 beside those to learn from"):
        config.run("train_e4t", [*pretrain, "held_out=4", f"out={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="held_out=1: expected 0, or at least 2"):
        config.load("train_e4t", [*pretrain, "held_out=1"])


def test_a_strong_penalty_keeps_the_class_word(pretrain, e4t, tmp_path):
    out = config.run("train_e4t", [*pretrain, f"out={tmp_path}", "word_weight=100"])
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    far, near = (E4TEncoder.load(file) for file in (e4t, out / "e4t.safetensors"))
    lengths = [model.penalty(model.begin(images)["vector"]).mean().item() for model in (far, near)]
    assert lengths[1] < 0.1 * lengths[0]


def test_the_tuning_begins_at_what_is_predicted(words, photo, e4t, tmp_path):
    out = config.run("personalize", [*words, f"out={tmp_path}", "finetune.rate=1e-9"])
    part = Personalization.load(out / "adapter.safetensors").parts[0]
    begun = E4TEncoder.load(e4t).begin(to_images(read_image(photo)))
    assert part.params.keys() == begun.keys()
    for name, value in begun.items():
        torch.testing.assert_close(part.params[name], value.detach(), rtol=1e-5, atol=1e-6)
    assert load_json(out / "report.json")["encoder"] == str(e4t)
    with pytest.raises(UserError, match=r"adapter\.safetensors of a run with other encoder"):
        config.run("personalize", [*words, f"out={tmp_path}", "finetune.rate=1e-9", "adapter.encoder=null"])


def test_a_word_that_begins_elsewhere_is_refused(words):
    """What the encoder predicts is near the class word of its training."""
    with pytest.raises(UserError, match=r"predicts words near token \d+, and this training begins at token 5"):
        Personalizer(config.load("personalize", [*words, "adapter.start=5"]))


def test_the_word_of_every_method_is_asked_for(words):
    """An evaluation has methods of its own beside the adapter of its settings."""
    model = Personalizer(config.load("personalize", words))
    model.encoder(model.config.adapter)
    with pytest.raises(UserError, match=r"predicts words near token \d+, and this training begins at token 5"):
        model.encoder(replace(model.config.adapter, start=5))


def test_photos_of_a_person_have_the_mean_of_their_words(words):
    model = Personalizer(config.load("personalize", words))
    images = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    begun = model.begin(model.config.adapter, images).params
    encoder = model.encoder(model.config.adapter)
    with torch.no_grad():
        torch.testing.assert_close(begun["vector"][1], encoder.begin(images[1])["vector"].mean(0))
    assert {len(value) for value in begun.values()} == {2}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: m.update(kind="other"), "not a hyperdb hypernetwork"),
        (lambda t, m: m.pop("adapter"), "is no encoder of E4T; train one with `hyperdb train_e4t`"),
        (lambda t, m: t.pop("offsets.0"), "lacks offsets.0"),
        (lambda t, m: t.update({"offsets.0": t["offsets.0"][1:]}), "unexpected tensor offsets.0"),
        (lambda t, m: t.update({"offsets.0": t["offsets.0"] * float("nan")}), "offsets.0 has non-finite values"),
        (lambda t, m: m.update(layout=m["layout"].split(";")[0]), "one embedding, and layers"),
        (lambda t, m: m.update(layout=m["layout"].replace("attn1", "attn3")), "was made for another model"),
        (lambda t, m: m.update(lidb=json.dumps(json.loads(m["lidb"]) | {"rank": 3})), "is damaged"),
    ],
)
def test_a_wrong_file_is_one_line(words, e4t, tmp_path, damage, message):
    tensors, metadata = load_tensors(e4t)
    damage(tensors, metadata)
    file = save_tensors(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=message) as told:
        config.run("personalize", [*words, f"adapter.encoder={file}", f"out={tmp_path / 'out'}"])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_what_has_no_encoder_is_told(words, tiny_base, e4t, tmp_path):
    with pytest.raises(UserError, match=r"no encoder of E4T at .*none; run `hyperdb train_e4t`, or set"):
        config.run("personalize", [*words, f"adapter.encoder={tmp_path / 'none'}", f"out={tmp_path / 'out'}"])
    with pytest.raises(UserError, match=r"no setting 'adapter\.encoder'"):
        config.load("personalize", ["image=x.png", "adapter=lora", f"adapter.encoder={e4t}"])
    with pytest.raises(UserError, match=r"unexpected tensor offsets\.0"):
        Hypernet.load(e4t)


def test_a_dry_run_counts_the_encoder(words, capsys):
    config.run("personalize", [*words, "dry_run=true"])
    said = capsys.readouterr().out
    assert "image encoder" in said
    assert "prediction" in said
    with pytest.raises(UserError, match=r"no encoder of E4T at .*none; run `hyperdb train_e4t`, or set"):
        config.run("personalize", [*words, "adapter.encoder=none", "dry_run=true"])
