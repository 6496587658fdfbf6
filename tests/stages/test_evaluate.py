"""Adapters side by side in an evaluation: each row is what `personalize` makes of that photo."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from hyperdb import config, options
from hyperdb.data.people import load_people
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.tuning import methods
from hyperdb.tuning.draw import draw
from hyperdb.tuning.personalizer import Personalizer

KINDS = {
    "dreambooth": "full", "lora": "lora", "dora": "dora", "foura": "foura", "svdiff": "svdiff",
    "textual_inversion": "token",
}  # fmt: skip
TINY = ["diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "prior.images=2", "prior.levels=2"]
FIT = ["steps=3", "rate=0.05", "levels=2"]
PEOPLE = 3


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    out = tmp_path_factory.mktemp("test") / "heads"
    words = ["identities=3", "views=4", "photo_views=4", "size=32", "workers=1", "split=test"]
    return config.run("render_heads", [*words, f"out={out}"])


@pytest.fixture(scope="module")
def words(tiny_base, people):
    found = [f"diffusion.path={tiny_base}", *TINY, "hypernet=null", f"data={people}", f"people={PEOPLE}", "views=2"]
    return [*found, "images=2", "batch=2", *(f"methods.{row}.finetune.{word}" for row in KINDS for word in FIT)]


@pytest.fixture(scope="module")
def evaluated(words, tmp_path_factory):
    """Every adapter in one table, and its folder."""
    out = tmp_path_factory.mktemp("evaluated")
    config.run("evaluate", [*words, f"rows=[floor,{','.join(KINDS)}]", f"out={out}"])
    return out


def pictures(folder, row):
    return load_tensors(folder / "rows" / f"{row}.safetensors")[0]["images"]


@pytest.mark.parametrize("row", KINDS)
def test_a_row_is_what_personalize_makes(row, evaluated, words, people):
    told = load_json(evaluated / "results.json")["rows"][row]
    assert (told["adapter"], told["start"], told["steps"]) == (KINDS[row], None, 3)
    assert told["label"].endswith(", 3 iterations")
    found = pictures(evaluated, row)
    assert found.shape == (PEOPLE, 2, 3, 32, 32)
    moved = (found.float() - pictures(evaluated, "floor").float()).abs().mean()
    shared = [word for word in words if word.startswith(("diffusion.", "prior.", "hypernet="))]
    shared += [f"finetune.{word}" for word in FIT]
    settings = config.load("personalize", [*shared, f"adapter={row}", "image=x.png", f"out={evaluated}"])
    model = Personalizer(settings)
    photo = load_people(people, split="test").images[0].permute(1, 2, 0).numpy()[None]
    changes = model.trainable.changes(model.finetune(photo, None))
    own = draw(model.base, changes, 1, [model.base.config.instance_prompt] * 2, [0, 1])
    # people in one pass round otherwise than one alone
    assert (found[:1].float() - own.float()).abs().mean() < 0.1 * moved
    assert told["bytes"] == 4 * sum(x[0].numel() for x in model.finetune(photo, None).values())


def test_people_are_drawn_together_as_far_as_their_adapters_fit(evaluated, words, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "HELD", 1)
    config.run("evaluate", [*words, "rows=[svdiff]", f"out={tmp_path}"])
    apart, together = pictures(tmp_path, "svdiff"), pictures(evaluated, "svdiff")
    assert apart.shape == together.shape
    assert (apart.float() - together.float()).abs().max() <= 2


def test_a_row_is_added_to_what_is_there(evaluated, words, tmp_path):
    stamps = {p.name: p.stat().st_mtime_ns for p in (evaluated / "rows").iterdir()}
    before = load_json(evaluated / "results.json")
    mine = "methods.lora.adapter.rank=2"
    rows = ["floor", *KINDS, "copy"]
    with pytest.raises(UserError, match=r"rows/lora\.safetensors of a run with other adapter\.rank"):
        config.run("evaluate", [*words, mine, f"rows=[{','.join(rows)}]", f"out={evaluated}"])
    config.run("evaluate", [*words, f"rows=[{','.join(rows)}]", f"out={evaluated}"])
    after = load_json(evaluated / "results.json")
    assert list(after["rows"]) == rows
    assert {row: after["values"][row] for row in before["values"]} == before["values"]
    assert all((evaluated / "rows" / name).stat().st_mtime_ns == then for name, then in stamps.items())


def test_a_new_row_is_a_yaml_and_a_line(words, tmp_path, monkeypatch):
    conf = shutil.copytree(options.conf_dir(), tmp_path / "conf")
    label = '"SVDiff on the prediction, {steps} iterations"'
    lines = ["# Beginnings meet.", "defaults:", "  - /adapters@both: svdiff", "  - _self_"]
    lines += ["both:", f"  label: {label}", "  start: own", "  finetune:", "    steps: 2"]
    (conf / "methods" / "both.yaml").write_text("\n".join(lines))
    stage = conf / "evaluate.yaml"
    stage.write_text(stage.read_text().replace("      - svdiff\n", "      - svdiff\n      - both\n"))
    monkeypatch.setattr(options, "conf_dir", lambda: conf)
    found = config.load("evaluate", [*words, "rows=[both]"])
    assert found.methods["both"].start == "own"
    assert found.methods["both"].adapter == found.methods["svdiff"].adapter
    assert found.fit("both") == replace(found.fit("svdiff"), steps=2, rate=1e-3, levels=1)


def test_rows_that_begin_at_a_prediction_need_a_hypernetwork(words, tmp_path):
    with pytest.raises(UserError, match=r"rows='hyper_40' begins at a prediction.*hypernet=FOLDER"):
        config.run("evaluate", [*words, "rows=[floor,hyper_40]", f"out={tmp_path}"])
