"""Fits reach whom they belong to, on an aligned folder with people of all splits, whatever part of it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyperdb import config as configuration
from hyperdb.adapters.layout import Layout
from hyperdb.data.fits import load_store
from hyperdb.data.people import load_people
from hyperdb.data.pictures import Pictures
from hyperdb.hypernet import loss as weight_space
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.errors import NonFiniteError, UserError
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.stages import status
from hyperdb.tuning import fit as fitting
from hyperdb.tuning.fit import fit

TINY = ["diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "adapter.a=12", "adapter.b=8"]
TINY += ["prior.images=2", "prior.prompts=[a photo of a face]"]
HYPER = ["model.width=32", "model.heads=2", "model.iterations=2", "model.encoder.name=vit_tiny_patch16_224"]
HYPER += ["model.encoder.size=32", "model.encoder.patch=16", "model.encoder.depth=1", "model.encoder.weights=null"]
HYPER += ["validation=null", "prior_weight=0", "warmup=1", "levels=2"]
# in an order in which leaving out a split numbers the rest anew
PHOTOS = [
    ("zoe", "test"), ("ben", "train"), ("ada", "validation"), ("ben", "train"), ("cy", "train"), ("ada", "validation"),
    ("dan", "train"), ("eve", "validation"), ("cy", "train"), ("eve", "validation"), ("ben", "train"), ("zoe", "test"),
]  # fmt: skip
FIT = ["start=template", "fit.trained=all", "fit.optimizer=adamw", "fit.steps=2", "fit.levels=2", "fit.rate=0.1"]
FIT += ["fit.prior_weight=0", "batch=2"]
B_ALONE = ["start=average", "average.steps=2", "average.levels=2", "average.prior_rows=1", "by=person"]
B_ALONE += ["fit.trained=B", "fit.optimizer=sgd", "fit.views=2"]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> Path:
    """What `hyperdb preprocess` leaves of twelve photos."""
    folder = tmp_path_factory.mktemp("aligned")
    rng = np.random.default_rng(0)
    records = []
    for i, (identity, split) in enumerate(PHOTOS):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{i}.png")
        records.append({"file": f"{i}.png", "identity": identity, "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture(scope="module")
def base_words(tiny_base: Path) -> list[str]:
    return [f"diffusion.path={tiny_base}", *TINY]


def _precompute(base_words: list[str], aligned: Path, out: Path, *more: str) -> Path:
    words = [*base_words, f"data={aligned}", f"out={out}", *FIT, *more]
    return configuration.run("precompute", words)


@pytest.fixture(scope="module")
def stores(base_words, aligned, tmp_path_factory) -> dict[str, Path]:
    """Fits of every image and of every person, of all splits at once."""
    root = tmp_path_factory.mktemp("stores")
    how = {"image": ["fit.views=1"], "person": ["fit.views=2"]}
    return {by: _precompute(base_words, aligned, root / by, f"by={by}", *more) for by, more in how.items()}


def _taught(base_words, aligned, weights, out, monkeypatch, *more) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Train for some steps and return the conditioning images and the fits that they were compared with."""
    seen: list[torch.Tensor] = []
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward, compare = Hypernet.forward, weight_space.gauge_free

    def watched(self, images):
        seen.append(images.clone())
        return forward(self, images)

    def compared(lidb, predicted, fitted, scale):
        pairs.append((seen[-1], fitted.clone()))
        return compare(lidb, predicted, fitted, scale)

    with monkeypatch.context() as m:
        m.setattr(Hypernet, "forward", watched)
        m.setattr(weight_space, "gauge_free", compared)
        words = [*base_words, *HYPER, f"data={aligned}", f"weights={weights}", "weight_loss=gauge_free", f"out={out}"]
        configuration.run("train_hypernet", [*words, "batch=4", "steps=4", *more])
    return pairs


@pytest.mark.parametrize("by", ["image", "person"])
def test_a_photo_is_taught_its_own_fit(base_words, aligned, stores, tmp_path, monkeypatch, by):
    settings = configuration.load("precompute", [*base_words, *FIT, f"by={by}", f"fit.views={1 + (by == 'person')}"])
    base = settings.diffusion.load()
    lidb = settings.adapter.tokens(Layout.of(base.targets()))
    files = [torch.from_numpy(np.array(Image.open(aligned / f"{i}.png"))).permute(2, 0, 1) for i in range(len(PHOTOS))]

    def own(i: int) -> torch.Tensor:
        """Fit again what belongs to the photo of this number, by the manifest's names alone."""
        mine = [k for k, (name, _) in enumerate(PHOTOS) if name == PHOTOS[i][0]]
        views = [i] if by == "image" else [mine[k % len(mine)] for k in range(2)]
        moments = base.moments(torch.stack([files[k] for k in views])).half()
        return fit(base, lidb, moments[None], settings.fit)["tokens"][0]

    wanted = {i: own(i) for i, (_, split) in enumerate(PHOTOS) if split == "train"}
    every = torch.stack(list(wanted.values()))
    other = torch.cdist(every.flatten(1)[None], every.flatten(1)[None])[0]
    assert other[other > 0.01].min() > 1  # those of two people are told apart
    pairs = _taught(base_words, aligned, stores[by], tmp_path, monkeypatch, "alpha=0")
    used = set()
    for images, fits in pairs:
        assert len(images) == len(fits) == 4
        for image, tokens in zip(images, fits, strict=True):
            i = next(i for i in wanted if torch.equal(files[i], image))
            torch.testing.assert_close(tokens, wanted[i], atol=0.02, rtol=0)
            used.add(PHOTOS[i][0])
    assert used == {"ben", "cy", "dan"}


def test_fits_under_another_prompt_teach_no_hypernetwork_of_the_usual_one(base_words, aligned, tmp_path, monkeypatch):
    store = _precompute(base_words, aligned, tmp_path / "store", "fit.instance_prompt=a photo of a [V] face")
    assert json.loads((store / "index.json").read_text())["prompt"] == "a photo of a sks face"
    with pytest.raises(UserError, match="prompt"):
        _taught(base_words, aligned, store, tmp_path / "run", monkeypatch)


def test_a_photo_turned_round_is_taught_no_fit(base_words, aligned, stores, tmp_path, monkeypatch):
    more = ["flips=true", "fit_share=0.25", "prompt_dropout=0.5"]
    known = load_people(aligned, size=32).images[:]
    turned = 0
    for images, fits in _taught(base_words, aligned, stores["image"], tmp_path, monkeypatch, *more):
        straight = [bool((image == known).flatten(1).all(1).any()) for image in images]
        assert straight[0]  # drawn for its fit
        assert len(fits) == sum(straight)
        turned += 4 - sum(straight)
    assert turned > 0


def test_validation_weights_are_those_of_the_photos_shown(base_words, aligned, stores, tmp_path):
    validation = [f"validation={aligned}", f"validation_weights={stores['image']}", "validation_people=5", "steps=1"]
    words = [*base_words, *HYPER, f"data={aligned}", f"weights={stores['image']}", f"out={tmp_path}", *validation]
    configuration.run("train_hypernet", words)
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert any("validation/weights" in r for r in records)
    assert json.loads((tmp_path / "validation.json").read_text())["people"] == 2


def test_as_many_fits_as_photos_asked_for(base_words, aligned, stores, tmp_path):
    assert json.loads((stores["image"] / "index.json").read_text())["fits"] == len(PHOTOS)
    assert json.loads((stores["person"] / "index.json").read_text())["fits"] == 6
    words = ["by=image", "fit.views=1", "fit.steps=1", "photos=4", "split=train", "identities=null"]
    some = _precompute(base_words, aligned, tmp_path / "some", *words)
    assert json.loads((some / "index.json").read_text())["fits"] == 4
    layout = Layout.of(configuration.load("precompute", base_words).diffusion.load().targets())
    people = load_people(aligned, size=32)
    store = load_store(some, layout)
    assert store.rows_of(people.keys("image", torch.arange(len(people)))).tolist() == [0, 1, 2, 3, -1, -1]


def test_a_store_grows_by_any_number_and_never_shrinks(base_words, aligned, tmp_path):
    def made(name, count):
        words = [*base_words, *FIT, f"data={aligned}", "by=image", "fit.views=1", f"photos={count}"]
        return configuration.run("precompute", [*words, f"out={tmp_path / name}"])

    made("grown", 1)
    made("grown", 3)  # of the last file there was less
    files = [load_tensors(path)[0] for path in sorted(made("whole", 3).glob("fits-*"))]
    again = [load_tensors(path)[0] for path in sorted((tmp_path / "grown").glob("fits-*"))]
    assert [{k: v.tolist() for k, v in x.items()} for x in files] == [
        {k: v.tolist() for k, v in x.items()} for x in again
    ]
    count = load_json(tmp_path / "grown" / "index.json")["fits"]
    with pytest.raises(UserError, match=f"holds {count} fits, .* are asked for: choose another name"):
        made("grown", 1)
    assert load_json(tmp_path / "grown" / "index.json")["fits"] == count


def test_one_fit_that_diverges_stops_no_other(base_words, aligned, tmp_path, monkeypatch, capsys):
    def diverging(base, lidb, moments, *rest, **more):
        if len(moments) > 1 or moments.mean() == worst:
            raise NonFiniteError("the loss is nan")
        return fit(base, lidb, moments, *rest, **more)

    def broken(*_, **__):
        raise NonFiniteError("the loss is nan")

    words = [*base_words, *FIT, f"data={aligned}", "by=image", "fit.views=1", f"out={tmp_path / 'store'}"]
    seen = []
    monkeypatch.setattr(fitting, "fit", lambda *a, **k: seen.append(a[2].mean()) or fit(*a, **k))
    configuration.run("precompute", [*words[:-1], "batch=1", f"out={tmp_path / 'alone'}"])
    worst = seen[0]
    monkeypatch.setattr(fitting, "fit", diverging)
    out = configuration.run("precompute", words)
    assert "which is left out: the loss is nan" in capsys.readouterr().out
    wanted = load_json(tmp_path / "alone" / "index.json")["fits"] - 1
    assert load_json(out / "index.json")["fits"] == wanted
    assert configuration.run("precompute", words) == out  # and is not tried again
    lone = configuration.run("precompute", [*words[:-1], "batch=1", f"out={tmp_path / 'lone'}"])  # in its file
    assert load_json(lone / "index.json")["fits"] == wanted
    monkeypatch.setattr(fitting, "fit", broken)
    with pytest.raises(UserError, match=r"no fit in .*nobody has succeeded"):
        configuration.run("precompute", [*words[:-1], f"out={tmp_path / 'nobody'}"])


def test_a_store_of_other_photos_is_refused(base_words, aligned, stores, tmp_path):
    other = shutil.copytree(aligned, tmp_path / "other")
    words = [*base_words, *HYPER, f"weights={stores['image']}", "steps=1", f"out={tmp_path / 'out'}"]
    Image.new("RGB", (32, 32)).save(other / "0.png")  # of somebody who is not even trained on
    with pytest.raises(UserError, match=r"image holds fits of another data"):
        configuration.run("train_hypernet", [*words, f"data={other}"])
    more = ["by=image", "fit.views=1", "split=validation"]
    validation = _precompute(base_words, aligned, tmp_path / "validation", *more)
    words = [*base_words, *HYPER, f"weights={validation}", "steps=1", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"validation holds no fit of the people"):
        configuration.run("train_hypernet", [*words, f"data={aligned}"])
    assert not (tmp_path / "out" / "hypernet.safetensors").exists()


def test_fits_that_begin_at_the_average_share_its_A(base_words, aligned, tmp_path):
    """Only B is a person's own; more people, or the same command after a kill, leave the first ones as they were."""
    folder = _precompute(base_words, aligned, tmp_path / "few", *B_ALONE, "identities=2")
    layout = Layout.of(configuration.load("precompute", base_words).diffusion.load().targets())
    few = load_store(folder, layout)
    start, _ = load_tensors(folder / "start.safetensors")
    A, B = few.lidb.split(few.tokens[:])
    begun_A, begun_B = few.lidb.split(start["average"])
    assert torch.equal(A, begun_A.expand_as(A))
    assert begun_B.abs().max() > 0
    # one length a layer: the first step of gradient descent is as long in a layer as in any other
    moved = (B - begun_B).flatten(2).norm(dim=2)
    assert moved.min() > 0
    assert (moved[0] - moved[1]).abs().max() > 0
    (folder / "index.json").unlink()
    (folder / "fits-00000.safetensors").unlink()
    again = load_store(_precompute(base_words, aligned, folder, *B_ALONE, "identities=4"), layout)
    assert torch.equal(again.tokens[:2], few.tokens[:])
    assert torch.equal(again.moment, start["moment"])
    assert (start["moment"][few.lidb.mask] > 0).all()


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} | {
        "index.json": (folder / "index.json").read_bytes()
    }


def test_a_store_made_in_shards_is_that_of_one_job(base_words, aligned, tmp_path, capsys):
    """In any order, in one folder, whoever is last finishes it; what a job did not do another run does."""
    more = [*B_ALONE, "fit.prior_weight=0.25", "fit.prior_rows=1"]
    whole = _contents(_precompute(base_words, aligned, tmp_path / "whole", *more))
    assert {f"fits-0000{i}.safetensors" for i in range(3)} | {"start.safetensors", "prior.safetensors"} < set(whole)
    out = tmp_path / "shards"
    _precompute(base_words, aligned, out, *more, "shard=1", "num_shards=2")
    assert [p.name for p in out.glob("fits-*")] == ["fits-00001.safetensors"]
    assert "others are not" in capsys.readouterr().out
    assert status.examine(out)[0] == f"{'files of fits':20} 1 of 3 done, 2 missing; there is no index yet"
    assert not (out / "index.json").exists()
    stamp = (out / "fits-00001.safetensors").stat().st_mtime_ns
    _precompute(base_words, aligned, out, *more, "shard=0", "num_shards=2")
    assert _contents(out) == whole
    assert status.examine(out)[0] == f"{'files of fits':20} 3 of 3 done, 0 missing; the index is written"
    (out / "index.json").unlink()
    (out / "fits-00002.safetensors").unlink()
    _precompute(base_words, aligned, out, *more)
    assert _contents(out) == whole
    assert (out / "fits-00001.safetensors").stat().st_mtime_ns == stamp


def test_a_job_decodes_the_photos_that_it_fits_and_no_others(base_words, aligned, stores, tmp_path, monkeypatch):
    """On machines that share the store and no cache; whoever is last takes the others' word for theirs."""
    seen, read = set(), Pictures.read
    monkeypatch.setattr(Pictures, "read", lambda self, rows: seen.update(self.rows[rows].tolist()) or read(self, rows))
    out, mine = tmp_path / "shards", ({0, 1, 6, 7}, {2, 3, 8, 9}, {4, 5, 10, 11})
    for shard in (1, 0, 2):
        monkeypatch.setenv("HYPERDB_CACHE", str(tmp_path / f"cache{shard}"))
        seen.clear()
        _precompute(base_words, aligned, out, "by=image", "fit.views=1", f"shard={shard}", "num_shards=3")
        assert seen == mine[shard]
    assert _contents(out) == _contents(stores["image"])


def test_processes_of_a_launcher_divide_the_share_of_their_job(monkeypatch):
    config = configuration.load("precompute", ["shard=1", "num_shards=2"])
    assert config.share() == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        assert config.share() == (4 + rank, 8)
        assert configuration.load("precompute").share() == (rank, 4)


def test_of_jobs_that_make_the_start_at_once_the_first_counts(base_words, aligned, tmp_path, monkeypatch):
    from hyperdb.runtime import files
    from hyperdb.tuning import start

    out, gradients, first = tmp_path / "out", start._gradients, []

    def overtaken(*arguments):
        if not first:  # another job begins and ends while this one is busy
            first.append(None)
            _precompute(base_words, aligned, out, *B_ALONE, "shard=0", "num_shards=2")
            first[0] = load_tensors(out / "start.safetensors")
        return 2 * gradients(*arguments)

    monkeypatch.setattr(start, "_gradients", overtaken)
    _precompute(base_words, aligned, out, *B_ALONE, "shard=1", "num_shards=2")
    assert torch.equal(load_tensors(out / "start.safetensors")[0]["moment"], first[0][0]["moment"])
    assert load_store(out, Layout.of(configuration.load("precompute", base_words).diffusion.load().targets())).by
    monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    assert files.save_tensors(tmp_path / "x.safetensors", {}, first=True).is_file()


def test_fits_repeated_on_other_photos_and_noise_begin_at_the_same(base_words, aligned, tmp_path):
    once = _precompute(base_words, aligned, tmp_path / "once", *B_ALONE)
    again = _precompute(base_words, aligned, tmp_path / "again", *B_ALONE, "fit.first_view=1", "fit.seed=1")
    one, other = (load_tensors(folder / "start.safetensors")[0] for folder in (once, again))
    assert all(torch.equal(one[name], other[name]) for name in ("average", "moment"))


def test_fits_that_begin_at_a_hypernetworks_predictions(base_words, aligned, tmp_path):
    store = _precompute(base_words, aligned, tmp_path / "first", *B_ALONE)
    words = [*base_words, *HYPER, f"data={aligned}", f"weights={store}", "batch=4", "steps=3", "alpha=0"]
    trained = configuration.run("train_hypernet", [*words, "weight_loss=fisher", f"out={tmp_path / 'hyper'}"])
    begin = [*B_ALONE, f"start={trained}", "fit.rate=1e-9"]
    layout = Layout.of(configuration.load("precompute", base_words).diffusion.load().targets())
    second = load_store(_precompute(base_words, aligned, tmp_path / "second", *begin), layout)
    people, model = load_people(aligned, split=None, size=32), Hypernet.load(trained / "hypernet.safetensors")
    with torch.no_grad():
        each = [model(people.images[rows[torch.arange(2) % len(rows)]]).mean(0) for rows in people.photos]
    B = second.lidb.split(torch.stack(each))[1]
    torch.testing.assert_close(second.lidb.split(second.tokens[:])[1], B, atol=2e-3, rtol=0)
    # what all fits share is not predicted: A stays as it was in the fits that were learned from
    A = second.lidb.split(second.tokens[:])[0]
    shared = second.lidb.split(load_store(store, layout).tokens[:1])[0]
    torch.testing.assert_close(A, shared.expand_as(A), atol=1e-3, rtol=0)


def test_a_linear_map_is_trained_alone_and_then_refined(base_words, aligned, tmp_path):
    """With beta=0 the fits say where predictions begin, and that is all."""
    store = _precompute(base_words, aligned, tmp_path / "fits", *B_ALONE)
    words = [*base_words, *HYPER, f"data={aligned}", f"weights={store}", "beta=0", "batch=3", "steps=2"]
    linear = ["model.linear=true", "model.iterations=0", "rate=0", "matrix_rate=null", "linear_rate=1e4"]
    first = configuration.run("train_hypernet", [*words, *linear, f"out={tmp_path / 'linear'}"])
    layout = Layout.of(configuration.load("precompute", base_words).diffusion.load().targets())
    fits, alone = load_store(store, layout), Hypernet.load(first / "hypernet.safetensors")
    assert alone.config.iterations == 0
    assert alone.decoder.linear.abs().max() > 0
    torch.testing.assert_close(alone.centre, fits.tokens[:].mean(0), atol=2e-3, rtol=0)
    assert all("weights" not in json.loads(line) for line in (first / "journal.jsonl").read_text().splitlines())
    images = load_people(aligned, size=32).images[:3]
    with torch.no_grad():
        predicted = alone(images)
        assert torch.equal(fits.lidb.split(predicted)[0], fits.lidb.split(alone.centre.expand(3, -1, -1))[0])
    more = [f"init={first}/hypernet.safetensors", "linear_rate=null", "model.iterations=2", "rate=0.01"]
    second = configuration.run("train_hypernet", [*words, *more, f"out={tmp_path / 'refined'}"])
    refined = Hypernet.load(second / "hypernet.safetensors")
    assert refined.config.iterations == 2
    assert torch.equal(refined.decoder.linear, alone.decoder.linear)
    with torch.no_grad():
        assert not torch.equal(refined(images), predicted)
    more = [f"init={first}/hypernet.safetensors", *linear, "model.summary=2"]
    third = configuration.run("train_hypernet", [*words, *more, f"out={tmp_path / 'cut'}"])
    cut = Hypernet.load(third / "hypernet.safetensors")
    assert cut.config.summary == len(cut.decoder.linear) == 2
    more = [f"init={second}/hypernet.safetensors", "linear_rate=null", "model.iterations=1", "model.width=16"]
    more += ["rate=0", "matrix_rate=null"]
    fourth = configuration.run("train_hypernet", [*words, *more, "new_decoder=true", f"out={tmp_path / 'anew'}"])
    anew = Hypernet.load(fourth / "hypernet.safetensors")
    assert (anew.config.iterations, anew.config.width) == (1, 16)
    with torch.no_grad():
        assert torch.equal(anew(images), predicted)


def test_other_photos_of_the_same_people(base_words, aligned, tmp_path, monkeypatch):
    seen = []
    original = fitting.fit

    def watched(base, lidb, moments, *rest, **more):
        seen.append(moments.clone())
        return original(base, lidb, moments, *rest, **more)

    monkeypatch.setattr(fitting, "fit", watched)
    words = ["by=person", "fit.views=1", "fit.first_view=1", "split=train", "fit.steps=1"]
    folder = _precompute(base_words, aligned, tmp_path, *words)
    base = configuration.load("precompute", base_words).diffusion.load()
    people = load_people(aligned, size=32)
    second = torch.stack([rows[1] for rows in people.photos if len(rows) > 1])  # dan has one photo alone
    torch.testing.assert_close(torch.cat(seen)[:, 0], base.moments(people.images[second]).half())
    assert json.loads((folder / "index.json").read_text())["fits"] == len(second) == 2


def test_the_metric_of_gradients_needs_gradients(base_words, aligned, stores, tmp_path):
    words = [*base_words, *HYPER, f"data={aligned}", f"weights={stores['person']}", "weight_loss=fisher"]
    with pytest.raises(UserError, match="weight_loss=fisher needs the gradients"):
        configuration.run("train_hypernet", [*words, f"out={tmp_path}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start=nowhere"], "start=nowhere"),
        (["start=template"], "need start=average"),
        (["fit.optimizer=lion"], "optimizer='lion'"),
        (["fit.trained=A"], "fit.trained='A'"),
        (["fit.first_view=-1"], "fit.first_view=-1"),
        (["fit.logit_normal=[0,0]"], "logit_normal"),
        (["by=photo"], "by='photo'"),
        (["by=image", "fit.views=2"], "fit.views=2"),
        (["by=person", "photos=3"], "photos=3"),
        (["split=val"], "split='val'"),
        (["identities=0"], "identities=0"),
        (["first=-1"], "first=-1"),
        (["fit.views=0"], "fit.views=0"),
        (["num_shards=4"], r"num_shards=4 needs shard=NUMBER, 0 to 3; .*-m 'shard=range\(0,4\)'"),
        (["shard=4", "num_shards=4"], "shard=4 num_shards=4: expected 0"),
        (["shard=1"], "shard=1 num_shards=1"),
        (["num_shards=0"], "num_shards=0: expected at least 1"),
    ],
)
def test_settings_that_contradict(words, said):
    with pytest.raises(UserError, match=said):
        configuration.load("precompute", words)
