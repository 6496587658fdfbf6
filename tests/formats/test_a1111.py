"""A hypernetwork of A1111, converted as the documents say, does what the page does with it, and goes back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from hyperdb import config
from hyperdb.adapters import A1111Config
from hyperdb.diffusion import DiffusionConfig
from hyperdb.formats.a1111 import write
from hyperdb.formats.native import Part, Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_tensors
from hyperdb.tuning.trainable import trainable

DOCUMENT = Path(__file__).parents[2] / "docs" / "imports.md"
INTO, BACK = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
ACTIVATIONS = {name: getattr(nn, name) for name in ("ReLU", "Hardswish", "Mish", "GELU", "LogSigmoid", "Softshrink")}
ACTIVATIONS = {name.lower(): kind for name, kind in ACTIVATIONS.items()} | {"linear": None, "swish": nn.Hardswish}


@pytest.fixture
def base(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


def networks(widths, activation):
    """Return the modules {width: (of keys, of values)} as A1111 builds them, layers 1, 2, 1."""
    between = [] if ACTIVATIONS[activation] is None else [ACTIVATIONS[activation]()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            n: tuple(nn.Sequential(nn.Linear(n, 2 * n), *between, nn.Linear(2 * n, n)) for _ in "kv") for n in widths
        }


def pickled(path, made, activation, **more):
    """Write the file that A1111 keeps."""
    states = {n: tuple({f"linear.{k}": v for k, v in one.state_dict().items()} for one in pair)
              for n, pair in made.items()}  # fmt: skip
    settings = {"step": 7, "name": "ada", "activation_func": activation, "is_layer_norm": False, "use_dropout": True}
    torch.save({**states, **settings, "activate_output": False, **more}, path)
    return states


def imported(tiny_base, *words):
    path = ["path=ada.safetensors"] if not any(word.startswith("path=") for word in words) else []
    return config.run("import", [*path, f"diffusion.path={tiny_base}", "diffusion.size=32", "out=in", *words])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_does_what_the_page_does_and_goes_back(base, tiny_base, in_tmp, activation):
    made = networks((16, 32), activation)
    states = pickled("ada.pt", made, activation)
    exec(INTO, {})
    out = imported(tiny_base)
    person = Personalization.load(out / "adapter.safetensors")
    assert [part.kind for part in person.parts] == ["a1111"]
    layers = base.places("kv")
    assert set(person.changes()) == set(layers)
    assert {name.rsplit(".", 2)[1] for name in layers} == {"attn1", "attn2"}
    handle = person.apply(base, 0.5)
    for name, layer in layers.items():
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        network = made[layer.in_features]["kv".index(name[-1])]
        torch.testing.assert_close(layer(x), nn.functional.linear(x + 0.5 * network(x), layer.weight))
    handle.remove()
    exported = config.run("export", [f"adapter={out}", "format=a1111", "dtype=fp32", "name=ada", "out=out"])
    (in_tmp / "ada.pt").unlink()
    (exported / "ada.safetensors").replace("ada.safetensors")
    exec(BACK, {})
    found = torch.load("ada.pt", weights_only=True)
    assert (found["activation_func"], found["layer_structure"]) == (activation, [1.0, 2.0, 1.0])
    for n, pair in states.items():
        for ours, theirs in zip(found[n], pair, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_one_of_some_widths_leaves_the_other_contexts_alone(base, tiny_base, in_tmp):
    pickled("ada.pt", networks((32,), "linear"), None)  # as A1111 writes it where none was chosen
    exec(INTO, {})
    changes = Personalization.load(imported(tiny_base) / "adapter.safetensors").changes()
    assert set(changes) == {name for name, layer in base.places("kv").items() if layer.in_features == 32}


def test_a_pickle_is_refused_with_the_way_to_convert_it(tiny_base, in_tmp):
    pickled("ada.pt", networks((16,), "relu"), "relu")
    with pytest.raises(UserError, match=r"ada\.pt is a pickle of PyTorch.*convert it, .*docs/imports\.md"):
        imported(tiny_base, "path=ada.pt")
    assert not Path("in").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(activation_func="sine"), "the activation 'sine'"),
        (lambda t, m: m.pop("activation_func"), "counts activations among its layers"),
        (lambda t, m: m.update(is_layer_norm="True"), "layer normalisation"),
        (lambda t, m: m.update(activate_output="True"), "after its last layer"),
        (lambda t, m: m.update(activate_output="None"), "does not say activate_output"),
        (lambda t, m: m.pop("activate_output"), "does not say activate_output"),
        (lambda t, m: t.pop("16.k.linear.0.weight"), "a bias without its weight"),
        (lambda t, m: t.update({"16.k.linear.0.weight": torch.ones(16)}), "no matrix"),
        (lambda t, m: t.update({"16.k.linear.0.weight": torch.ones(4, 16)}), "several structures"),
        (lambda t, m: t.update({"16.k.linear.0.bias": torch.ones(5)}), "has shape"),
        (lambda t, m: t.update({"16.k.linear.0.bias": torch.full([32], torch.nan)}), "not finite"),
        (lambda t, m: t.update({f"20{k[2:]}": v.clone() for k, v in t.items() if "k" in k[:4]}), "several structures"),
    ],
)
def test_what_is_not_known_to_the_number_is_refused(tiny_base, in_tmp, change, message):
    pickled("ada.pt", networks((16,), "relu"), "relu")
    exec(INTO, {})
    tensors, told = load_tensors("ada.safetensors")
    change(tensors, told)
    save_tensors("ada.safetensors", tensors, told, check=False)
    with pytest.raises(UserError, match=f"ada.safetensors .*{message}"):
        imported(tiny_base)
    assert not Path("in/adapter.safetensors").exists()


def test_the_widths_that_a_base_does_not_have_are_named(tiny_base, in_tmp):
    pickled("ada.pt", networks((768,), "relu"), "relu")
    exec(INTO, {})
    with pytest.raises(UserError, match=r"contexts 768 wide, of which .* none but \[16, 32\]"):
        imported(tiny_base)


def test_a_multiple_that_makes_broken_widths_is_read_and_goes_back(base, tiny_base, in_tmp):
    """1.1 times 16 and 32 are 17.6 and 35.2, of which A1111 takes 17 and 35."""
    made = {n: tuple(nn.Sequential(nn.Linear(n, k), nn.Linear(k, n)) for _ in "kv") for n, k in ((16, 17), (32, 35))}
    states = pickled("ada.pt", made, "linear", layer_structure=[1, 1.1, 1])
    exec(INTO, {})
    out = imported(tiny_base)
    config.run("export", [f"adapter={out}", "format=a1111", "dtype=fp32", "name=ada", "out=out"])
    tensors, told = load_tensors("out/ada.safetensors")
    multiples = json.loads(told["layer_structure"])
    for n, k in ((16, 17), (32, 35)):
        assert [int(n * m) for m in multiples] == [n, k, n]
        assert torch.equal(tensors[f"{n}.v.linear.1.weight"], states[n][1]["linear.1.weight"])


def test_a_file_that_is_no_residual_network_is_named(tiny_base, in_tmp):
    odd = {16: tuple(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)) for _ in "kv")}
    pickled("ada.pt", odd, "linear")
    exec(INTO, {})
    with pytest.raises(UserError, match=r"ada\.safetensors is no hypernetwork: structure=\[0\.5, "):
        imported(tiny_base)


def test_one_that_feeds_more_than_keys_and_values_is_not_written(base, tmp_path):
    settings, adapter = trainable(base, A1111Config(sites="attention"))
    part = Part(settings, adapter.layout, adapter.init(1))
    with pytest.raises(UserError, match=r"feeds .*to_q too.* adapter\.sites=kv"):
        write(tmp_path / "ada.safetensors", part, {})
