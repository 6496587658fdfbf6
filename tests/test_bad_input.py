"""Bad input through the real command line: exit code 2, one line that names the file, nothing half-written."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from hyperdb import cli
from hyperdb.runtime.files import save_tensors


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


ADAPTERS = {
    "missing": (None, "missing"),
    "text": (b"not a tensor file", "safetensors"),
    "foreign": ({"weight": torch.zeros(3)}, "not"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(in_tmp, tiny_base, capsys, name):
    content, said = ADAPTERS[name]
    path = in_tmp / f"{name}.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_tensors(path, content)
    before = sorted(in_tmp.iterdir())
    words = [f"diffusion.path={tiny_base}", "diffusion.size=32", "prompt=a [V] face", f"adapter={path.name}"]
    _says(capsys, ["generate", *words], path.name, said)
    assert sorted(in_tmp.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["personalize", "imag=a.png"], "imag"),
        (["personalize", "image=a.png", "finetune.steps=many"], "finetune.steps"),
        (["personalize", "image=a.png", "diffusion=none"], "none"),
        (["personalize", "image=a.png", "diffusion.path=/nowhere"], "a.png"),
        (["train_hypernet", "data=nowhere"], "nowhere"),
    ],
)
def test_settings(in_tmp, capsys, words, said):
    _says(capsys, words, said)
    assert list(in_tmp.iterdir()) == []
