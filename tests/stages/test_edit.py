"""Adapters as vectors: shifted, mixed, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hyperdb import config as configuration
from hyperdb import heads
from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.base import delta
from hyperdb.adapters.layout import Layout
from hyperdb.formats.directions import ATTRIBUTES, DIRECTIONS
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import save_tensors
from hyperdb.stages.weights import _looks
from hyperdb.tuning.draw import draw
from hyperdb.tuning.personalizer import Personalizer
from hyperdb.tuning.space import ridge


def person(seed, relaxed=True, lidb=None):
    layout = Layout.of({"unet.a": torch.nn.Linear(12, 8), "unet.b": torch.nn.Linear(6, 10)})
    g = torch.Generator().manual_seed(seed)
    settings = lidb or LiDBConfig(4, 3)
    tokens = torch.randn(settings.build(layout).mask.shape, generator=g)
    factors = {
        x.name: (torch.randn(1, 2, x.in_, generator=g), torch.randn(1, x.out, 2, generator=g)) for x in layout.layers
    }
    return Personalization(layout, tokens, settings, relaxed=factors if relaxed else {})


@pytest.fixture
def two(tmp_path):
    people = [person(0), person(1)]
    return people, [str(p.save(tmp_path / f"{i}.safetensors")) for i, p in enumerate(people)]


def edit(tmp_path, *words):
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    configuration.run("edit", [*words, f"out={out}"])
    return Personalization.load(out / "adapter.safetensors")


def test_shares_weigh_the_numbers_and_the_relaxed_residuals(two, tmp_path):
    (a, b), files = two
    mixed = edit(tmp_path, f"adapter=[{files[0]},{files[1]}]", "shares=[0.75,0.25]")
    assert torch.allclose(mixed.tokens, 0.75 * a.tokens + 0.25 * b.tokens, atol=1e-6)
    for name in a.layout.names:
        expected = 0.75 * delta(*a.relaxed[name]) + 0.25 * delta(*b.relaxed[name])
        assert torch.allclose(delta(*mixed.relaxed[name]), expected, atol=1e-5)


def test_without_shares_people_count_alike_and_one_alone_is_unchanged(two, tmp_path):
    (a, b), files = two
    assert torch.allclose(edit(tmp_path, f"adapter=[{files[0]},{files[1]}]").tokens, (a.tokens + b.tokens) / 2)
    alone = edit(tmp_path, f"adapter={files[0]}")
    assert torch.equal(alone.tokens, a.tokens)
    assert torch.equal(alone.relaxed["unet.a"][0], a.relaxed["unet.a"][0])


def test_a_prediction_and_a_fine_tuned_person_mix(tmp_path):
    a, b = person(0), person(1, relaxed=False)
    files = [a.save(tmp_path / "a.safetensors"), b.save(tmp_path / "b.safetensors")]
    mixed = edit(tmp_path, f"adapter=[{files[0]},{files[1]}]")
    assert torch.allclose(delta(*mixed.relaxed["unet.b"]), delta(*a.relaxed["unet.b"]) / 2, atol=1e-6)


def test_the_rank_of_mixtures_of_mixtures_has_an_end(two, tmp_path):
    (a, b), files = two
    most = {layer.name: min(layer.out, layer.in_) for layer in a.layout.layers}
    for count in range(8):
        mixed = edit(tmp_path, f"adapter=[{files[-1]},{files[-2]}]")
        wanted = {name: (delta(*x.relaxed[name]) + delta(*y.relaxed[name])) / 2 for x, y in [(a, b)] for name in most}
        for name, (down, _) in mixed.relaxed.items():
            assert down.shape[1] <= most[name]
            assert torch.allclose(delta(*mixed.relaxed[name]), wanted[name], atol=1e-4)
        files.append(mixed.save(tmp_path / f"mixed{count}.safetensors"))
        a, b = b, mixed


def test_shifts_add_directions_and_nothing_else(two, tmp_path):
    (a, _), files = two
    g = torch.Generator().manual_seed(2)
    steps = torch.randn(len(ATTRIBUTES), a.lidb.numbers, generator=g)
    text = {"kind": DIRECTIONS, "lidb": a.lidb.fingerprint, "attributes": " ".join(ATTRIBUTES)}
    path = save_tensors(tmp_path / "directions.safetensors", {"directions": steps}, text)
    shifted = edit(tmp_path, f"adapter={files[0]}", "age=2", "hair=-0.5", f"directions={path}")
    moved = a.lidb.pack(shifted.tokens) - a.lidb.pack(a.tokens)
    expected = 2 * steps[ATTRIBUTES.index("age")] - 0.5 * steps[ATTRIBUTES.index("hair")]
    assert torch.allclose(moved, expected, atol=1e-5)
    assert torch.equal(shifted.relaxed["unet.b"][1], a.relaxed["unet.b"][1])


def test_a_shift_of_age_makes_everybody_look_older(tmp_path):
    """To a reader of photos who was taught by the youngest and the oldest of known people, 0 and 1."""
    model = Personalizer(configuration.load("personalize", ["image=none", "diffusion.dtype=fp32"]))

    def photos(people):
        drawn = np.random.default_rng(0)
        views = [heads.sample_view(drawn, style="photo", place="plain", accessory="none") for _ in people]
        images = np.stack([heads.render(one, view) for one, view in zip(people, views, strict=True)])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    known = sorted(map(heads.Identity, range(160)), key=lambda one: one.age)
    shown, old = _looks(model.hypernet, photos([*known[:32], *known[-32:]])), torch.arange(64)[:, None] >= 32
    weight, offset = ridge(shown, old.float(), penalty=10)

    with torch.no_grad():
        predicted = model.hypernet(photos([heads.Identity(seed) for seed in heads.SPLITS["validation"][:6]]))
    files = [model.wrap(one[None]).save(tmp_path / f"{i}.safetensors") for i, one in enumerate(predicted)]

    def age(*shift):
        people = [edit(tmp_path, f"adapter={file}", *shift) for file in files]
        factors = model.lidb.factors({"tokens": torch.stack([one.tokens for one in people])})
        images = draw(model.base, factors, len(people), [model.base.config.instance_prompt] * 2, [0, 1], steps=5)
        return (_looks(model.hypernet, images.flatten(0, 1)) @ weight + offset).view(len(people), 2).mean(1)

    plain, older, blonder = age(), age("age=2"), age("hair=2")
    assert (older - plain > 0.2).all()
    assert (older - plain).mean() > 2 * (blonder - plain).mean()


def test_what_cannot_be_is_refused_and_writes_nothing(two, tmp_path):
    (a, _), files = two
    other = person(3, lidb=LiDBConfig(4, 3, seed=1)).save(tmp_path / "other.safetensors")
    renamed = dataclasses.replace(person(4), rare_token="xyz").save(tmp_path / "renamed.safetensors")
    wrong = save_tensors(tmp_path / "wrong.safetensors", {"x": torch.zeros(1)})
    text = {"kind": DIRECTIONS, "lidb": a.lidb.fingerprint, "attributes": "age"}
    short = save_tensors(tmp_path / "short.safetensors", {"directions": torch.zeros(1, 3)}, text)
    far = save_tensors(tmp_path / "far.safetensors", {"directions": torch.ones(1, a.lidb.numbers)}, text)
    for words, message in (
        (["adapter=[]"], "name an adapter"),
        ([f"adapter=[{files[0]},{files[1]}]", "shares=[1.0]"], "need as many"),
        ([f"adapter=[{files[0]},{files[1]}]", "shares=[0.5,0.4]"], "sum to 1"),
        ([f"adapter=[{files[0]},{files[1]}]", "shares=[nan,1.0]"], "finite number"),
        ([f"adapter={files[0]}", "age=inf"], "finite"),
        ([f"adapter={files[0]}", "age=1e39", f"directions={far}"], "too large"),
        ([f"adapter=[{files[0]},{other}]"], "do not mix"),
        ([f"adapter=[{files[0]},{renamed}]"], "rare_token"),
        ([f"adapter={files[0]}", "age=1"], "other LiDB bases"),  # those of the embedded base
        ([f"adapter={files[0]}", "age=1", f"directions={wrong}"], "not a file of directions"),
        ([f"adapter={files[0]}", "age=1", f"directions={short}"], "damaged"),
        ([f"adapter={files[0]}", "age=1", f"directions={tmp_path}/none"], "no directions"),
    ):
        with pytest.raises(UserError, match=message):
            edit(tmp_path, *words)
    assert not (tmp_path / "out").exists()
