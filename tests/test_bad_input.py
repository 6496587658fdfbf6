"""Bad input through the real command line: exit code 2, one line that names the file, nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

from hyperdb import cli
from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.formats.native import Personalization
from hyperdb.runtime.files import save_json, save_tensors


def _photo(path, size, mode="RGB", **options):
    Image.new(mode, size, 128).save(path, **options)


MORE = [Image.new("P", (64, 64))]
PHOTOS = {
    "missing.png": lambda path: None,
    "text.jpg": lambda path: path.write_text("not a picture"),
    "empty.png": lambda path: path.write_bytes(b""),
    "pixel.png": lambda path: _photo(path, (1, 1)),
    "wide.png": lambda path: _photo(path, (20_000, 40)),
    "faceless cmyk.tiff": lambda path: _photo(path, (64, 64), "CMYK"),
    "faceless (1).gif": lambda path: _photo(path, (64, 64), "P", save_all=True, append_images=MORE),
}


def _cut(path):
    _photo(path, (200, 200))
    path.write_bytes(path.read_bytes()[:-40])


PHOTOS["cut.png"] = _cut
PHOTOS["half a face.png"] = lambda path: Image.fromarray(skimage.data.astronaut()[:300, 230:]).save(path)


def _says(capsys, words, *said):
    """Run and check the exit code and that the error is one line with every `said` in it."""
    assert cli.main(words) == 2, words
    lines = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert len(lines) == 1, lines
    assert all(x in lines[0] for x in said), lines


@pytest.mark.filterwarnings("ignore:.*several frames.*:UserWarning")
@pytest.mark.parametrize("name", PHOTOS)
def test_photos(in_tmp, tiny_base, capsys, name):
    PHOTOS[name](in_tmp / name)
    before = sorted(in_tmp.iterdir())
    words = [f"diffusion.path={tiny_base}", "diffusion.size=32", "hypernet=null", f"image={name}"]
    _says(capsys, ["personalize", *words], name)
    assert sorted(in_tmp.iterdir()) == before


def _of_another_layout(path):
    layout = Layout((Layer("tall", (40, 12)), Layer("flat", (9, 30))))
    lidb = LiDBConfig(a=10, b=5).build(layout)
    Personalization(layout, torch.zeros(*lidb.mask.shape), lidb.config).save(path)


def _cut_short(path):
    _of_another_layout(path)
    path.write_bytes(path.read_bytes()[:-40])


ADAPTERS = {
    "missing": (lambda path: None, "missing"),
    "text": (lambda path: path.write_bytes(b"not a tensor file"), "safetensors"),
    "foreign": (lambda path: save_tensors(path, {"weight": torch.zeros(3)}), "not"),
    "cut": (_cut_short, "safetensors"),
    "of another layout": (_of_another_layout, "made for another model"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(in_tmp, tiny_base, capsys, name):
    write, said = ADAPTERS[name]
    path = in_tmp / f"{name}.safetensors"
    write(path)
    before = sorted(in_tmp.iterdir())
    words = [f"diffusion.path={tiny_base}", "diffusion.size=32", "prompt=a [V] face", f"adapter={path.name}"]
    _says(capsys, ["generate", *words], path.name, said)
    assert sorted(in_tmp.iterdir()) == before


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_damaged_base(in_tmp, tiny_base, capsys, part):
    path = shutil.copytree(tiny_base, in_tmp / "base") / part
    path.write_bytes(path.read_bytes()[:-100])
    _photo(in_tmp / "a.png", (64, 64))
    words = ["diffusion.path=./base", "diffusion.size=32", "hypernet=null", "image=a.png", "align=false"]
    _says(capsys, ["personalize", *words], part.partition("/")[0], "./base")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diffusion.device=xpu"], "diffusion.device='xpu': expected auto, cpu, cuda or mps"),
        (["finetune.steps=20", "finetune.rate=1e20"], "lower the rate (1e+20)"),
    ],
)
def test_a_personalisation_that_cannot_be(in_tmp, tiny_base, capsys, words, said):
    _photo(in_tmp / "a.png", (64, 64))
    more = [f"diffusion.path={tiny_base}", "diffusion.size=32", "hypernet=null", "image=a.png", "align=false"]
    _says(capsys, ["personalize", *more, "prior.images=2", "preview=false", "finetune.prior_weight=0", *words], said)
    assert not list(in_tmp.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diffusion.device=xpu"], "expected auto, cpu, cuda or mps"),
        (["diffusion.device=cuda:99"], "PyTorch sees no such device here"),
        (["seed=18446744073709551615", "num_images=2"], "seed=18446744073709551615"),
        (["guidance=1e39"], "NaN, infinite"),
        (["guidance=1e10"], "larger than any picture"),
        (["diffusion.path=model.ckpt"], "model.ckpt is a pickle"),
        (["diffusion.path=runwayml/stable-diffusion-v1-5"], "set diffusion.path=stable-diffusion-v1-5/"),
    ],
)
def test_pictures_that_cannot_be(in_tmp, tiny_base, capsys, words, said):
    (in_tmp / "model.ckpt").write_bytes(b"anything")
    _says(capsys, ["generate", f"diffusion.path={tiny_base}", "diffusion.size=32", "steps=2", *words], said)
    assert not list(in_tmp.rglob("*.png"))


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("train_base", ["channels=[64,128]"], "expected as many heads, one for each level"),
        ("train_base", ["vae=."], "no autoencoder at ."),
        ("train_base", ["save_every=0"], "save_every=0"),
        ("train_autoencoder", ["crop=64", "held_out=3"], "crop=64: the pictures of"),
        ("train_autoencoder", ["held_out=0"], "held_out=0"),
        ("train_encoder", ["held_out=0"], "held_out=0"),
        ("evaluate", ["images=0"], "images=0"),
        ("demo", ["person=5000000"], "person=5000000"),
    ],
)
def test_numbers_and_folders_that_cannot_be(in_tmp, rendered, tiny_base, capsys, stage, words, said):
    of_a_base = [f"diffusion.path={tiny_base}", "hypernet=null", "rows=[floor]"]
    more = {"evaluate": of_a_base, "demo": []}.get(stage, [f"data={rendered}", "device=cpu"])
    _says(capsys, [stage, *more, *words], said)


def _foreign_people(folder):
    save_json(folder / "index.json", {"config": {"split": "train", "size": 32, "shard": 2}, "shards": 1})
    save_tensors(folder / "shard-00000.safetensors", {"image": torch.zeros(3)})


def _broken_manifest(folder):
    (folder / "manifest.jsonl").write_text('{"file": "none.png", "identity": "a", "split": "train"}\n')


@pytest.mark.parametrize("make", [_foreign_people, _broken_manifest])
def test_damaged_people(in_tmp, tiny_base, capsys, make):
    (in_tmp / "people").mkdir()
    make(in_tmp / "people")
    words = [f"diffusion.path={tiny_base}", "diffusion.size=32", "data=people", "weights=null", "validation=null"]
    _says(capsys, ["train_hypernet", *words], "people is damaged")


def test_a_foreign_weight_store(in_tmp, tiny_base, rendered, capsys):
    save_json(in_tmp / "fits" / "index.json", {"shards": 1})
    words = [f"diffusion.path={tiny_base}", "diffusion.size=32", f"data={rendered}", "weights=fits", "validation=null"]
    _says(capsys, ["train_hypernet", *words], "fits is not a store of fits")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["personalize", "imag=a.png"], "imag"),
        (["personalize", "image=a.png", "finetune.steps=many"], "finetune.steps"),
        (["personalize", "image=a.png", "diffusion=none"], "none"),
        (["personalize", "image=a.png", "diffusion.path=/nowhere"], "a.png"),
        (["train_hypernet", "data=nowhere"], "nowhere"),
        (["train_hypernet", "prior_rows=0"], "prior_weight=0.25 needs prior_rows of at least 1"),
        (["train_hypernet", "alpha=0", "weights=x"], "prior_weight concern the diffusion loss: set alpha > 0"),
        (["train_hypernet", "model.encoder.frozen=true", "encoder_rate=1e-5"], "set model.encoder.frozen=false"),
        (["train_hypernet", "new_decoder=true"], "new_decoder=true is for the hypernetwork of init"),
        (["train_hypernet", "model.linear=true"], "model.linear=true and linear_rate need each other"),
        (["train_hypernet", "linear_rate=1e4"], "model.linear=true and linear_rate need each other"),
        (["precompute", "fit.prior_weight=0.5"], "prior_weight=0.5 needs prior_rows of at least 1"),
    ],
)
def test_settings(in_tmp, capsys, words, said):
    _says(capsys, words, said)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "adapter=a", "name=Zo\udceb"], "name has characters that are not UTF-8"),
        (["personalize", "image=a.png", "diffusion.rare_token=\udceb"], "diffusion.rare_token has characters"),
        (["edit", "-m", "adapter=a", "name=['\udceb','b']"], "name has characters"),
        (["edit", "adapter=a", "out=Zo\udceb"], "is not UTF-8"),
        (["personalize", "image="], "image is empty"),
        (["personalize", "image=a.png", "start="], "start is empty"),
        (["personalize", "image=a.png", "adapter=textual_inversion", "start=b"], "begins at the class word, not at"),
        (["personalize", "image=a.png", "adapter=e4t", "start=b"], "leave out start, or choose one"),
        (["edit", "adapter=[a,'']"], "adapter is empty"),
        (["personalize", "image=a.png", "finetune.rate=nan"], "finetune.rate=nan: expected a finite number"),
        (["edit", "adapter=[a,b]", "shares=[inf,0]"], "shares=inf: expected a finite number"),
        (["edit", "adapter=[a,b]", "shares=[[0.5,0.5],[0.3,0.7]]"], "expected a list of numbers"),
        (["edit", "adapter=a,b", "age=1"], "several are written as a list, [a,b]"),
        (["export", "adapter=a", "name="], "expected the name of a file"),
        (["export", "adapter=a", "name=."], "expected the name of a file"),
        (["export", "adapter=a", "name=b/"], "expected the name of a file"),
    ],
)
def test_values_that_mean_nothing(in_tmp, capsys, words, said):
    _says(capsys, words, said)
    assert not [path for path in in_tmp.rglob("*") if path.is_file() and path.name != "multirun.yaml"]


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("experiments/tables/orders.py", [], "name one or several results files"),
        ("experiments/tables/equal_copying.py", ["nowhere.json"], "nowhere.json"),
        ("experiments/tables/sweeps.py", ["lora", "people=few"], "people=few: expected a number"),
        ("benchmarks/iteration.py", ["rate=1"], "rate"),
        ("benchmarks/scale.py", ["card=abacus"], "abacus.json"),
    ],
)
def test_scripts_end_as_the_command_line_does(tmp_path, script, words, said):
    root = Path(__file__).parents[1]
    known = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, root / script, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=known)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
