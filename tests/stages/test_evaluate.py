"""Adapters side by side in an evaluation: each row is what `personalize` makes of that photo."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from hyperdb import config, options
from hyperdb.data.people import load_people
from hyperdb.faces.image import save_png
from hyperdb.heads.captions import vocabulary
from hyperdb.heads.captions import words as words_of
from hyperdb.metrics import judge
from hyperdb.metrics.score import paired
from hyperdb.report.gallery import columns
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.stages import status
from hyperdb.tuning import draw as drawing
from hyperdb.tuning import methods
from hyperdb.tuning.draw import draw
from hyperdb.tuning.personalizer import Personalizer

KINDS = {
    "dreambooth": "full", "lora": "lora", "dora": "dora", "foura": "foura", "svdiff": "svdiff",
    "textual_inversion": "token", "custom_diffusion": "custom", "e4t": "e4t", "a1111": "a1111", "lorax": "lorax",
    "plus": "plus",
}  # fmt: skip
TINY = ["diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "prior.images=2", "prior.levels=2"]
FIT = ["steps=3", "rate=0.05", "levels=2"]
PEOPLE = 3


@pytest.fixture(scope="module")
def words(tiny_base, people, e4t):
    found = [f"diffusion.path={tiny_base}", *TINY, "hypernet=null", f"data={people}", f"people={PEOPLE}", "views=2"]
    found += ["diffusion.subject_guidance=3"]  # as the text's: how many are drawn at once then changes no bit
    found += [f"methods.e4t.adapter.encoder={e4t}"]
    return [*found, "images=2", "batch=2", *(f"methods.{row}.finetune.{word}" for row in KINDS for word in FIT)]


@pytest.fixture(scope="module")
def evaluated(words, tmp_path_factory):
    """Every adapter in one table, and its folder."""
    out = tmp_path_factory.mktemp("evaluated")
    config.run("evaluate", [*words, f"rows=[floor,{','.join(KINDS)}]", f"out={out}"])
    return out


def pictures(folder, row):
    return load_tensors(folder / "rows" / f"{row}.safetensors")[0]["images"]


def test_what_is_everybodys_is_drawn_once(words, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "draw", lambda *a, **k: drawn.append(a[2]) or draw(*a, **k))
    config.run("evaluate", [*words, "rows=[floor]", f"out={tmp_path}"])
    assert drawn == [1] * len(drawn)
    images = pictures(tmp_path, "floor")
    assert len(images) == PEOPLE
    assert (images == images[:1]).all()


@pytest.mark.parametrize("row", KINDS)
def test_a_row_is_what_personalize_makes(row, evaluated, words, people, e4t):
    told = load_json(evaluated / "results.json")["rows"][row]
    assert (told["adapter"], told["start"], told["steps"]) == (KINDS[row], None, 3)
    assert told["label"].endswith(", 3 iterations")
    found = pictures(evaluated, row)
    assert found.shape == (PEOPLE, 2, 3, 32, 32)
    moved = (found.float() - pictures(evaluated, "floor").float()).abs().mean()
    shared = [word for word in words if word.startswith(("diffusion.", "prior.", "hypernet="))]
    shared += [f"finetune.{word}" for word in FIT] + ([f"adapter.encoder={e4t}"] if row == "e4t" else [])
    settings = config.load("personalize", [*shared, f"adapter={row}", "image=x.png", f"out={evaluated}"])
    model = Personalizer(settings)
    photo = load_people(people, split="test").images[0].permute(1, 2, 0).numpy()[None]
    changes = model.trainable.changes(model.finetune(photo, None))
    own = draw(model.base, changes, 1, [model.base.config.instance_prompt] * 2, [0, 1])
    # people in one pass round otherwise than one alone
    assert (found[:1].float() - own.float()).abs().mean() < 0.1 * moved
    assert told["bytes"] == 4 * sum(x[0].numel() for x in model.finetune(photo, None).values()) == 4 * told["trained"]


def test_a_row_may_learn_from_more_photos_and_be_drawn_by_ordinary_guidance(words, tmp_path):
    words = [*words, "views=1", "rows=[lora]", "methods.lora.finetune.steps=2"]

    def made(name, *more):
        out = tmp_path / name
        told = load_json(config.run("evaluate", [*words, *more, f"out={out}"]))
        return pictures(out, "lora"), told["methods"]["lora"], told["rows"]["lora"]["cosine"]

    one, how, _ = made("one", "given=2")
    assert "photos" not in how
    two, how, judged = made("two", "given=2", "methods.lora.photos=2")
    assert how["photos"] == 2
    whole, _, same = made("whole", "photos=2")
    assert torch.equal(two, whole)
    assert judged == same
    with pytest.raises(UserError, match="of a run with other photos"):
        made("whole")
    assert not torch.equal(one, two)
    ordinary, how, _ = made("ordinary", "given=2", "methods.lora.hybrid=false")
    assert how["hybrid"] is False
    assert torch.equal(ordinary, made("base", "given=2", "diffusion.subject_guidance=null")[0])
    assert not torch.equal(ordinary, one)
    with pytest.raises(UserError, match="given=1: 2 photos are learned from; expected at least as many"):
        made("few", "methods.lora.photos=2")


def test_people_are_drawn_together_as_far_as_their_adapters_fit(evaluated, words, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "HELD", 1)
    config.run("evaluate", [*words, "rows=[svdiff]", f"out={tmp_path}"])
    apart, together = pictures(tmp_path, "svdiff"), pictures(evaluated, "svdiff")
    assert apart.shape == together.shape
    assert (apart.float() - together.float()).abs().max() <= 2


def test_shards_of_a_row_are_put_together(words, tmp_path, capsys):
    """Of three people in batches of two each share has a batch; the row lora has one, which is of the second share."""
    rows = ["rows=[floor,lora,copy,ceiling]", "methods.lora.people=2", "seeds=2"]
    then = load_json(config.run("evaluate", [*words, *rows, f"out={tmp_path / 'whole'}"]))
    out = tmp_path / "shards"
    asked = [*words, *rows, f"out={out}"]
    config.run("evaluate", [*asked, "shard=1", "num_shards=2"])
    assert "then the same without both" in capsys.readouterr().out
    names = ["ceiling-0-1of2", "copy-0-1of2", "floor-0-1of2", "floor-1-1of2", "lora-0-1of2", "lora-1-1of2"]
    assert sorted(p.stem for p in (out / "rows").iterdir()) == names
    assert len(pictures(out, "floor-0-1of2")) == 1
    told = "0 of 2 done, 2 missing; 1 of 2 shards of seed 0, 1 of 2 shards of seed 1"
    assert status.examine(out)[:2] == [f"{row:20} {told}" for row in ("row floor", "row lora")]
    config.run("evaluate", [*asked, "shard=0", "num_shards=2"])
    assert not (out / "results.json").exists()
    (out / "rows" / "copy-0-0of2.safetensors").unlink()  # drawn by whoever puts it together
    now = load_json(config.run("evaluate", asked))
    assert {p.name for p in (out / "rows").iterdir()} == {p.name for p in (tmp_path / "whole" / "rows").iterdir()}
    for path in (out / "rows").iterdir():
        apart, together = pictures(out, path.stem), pictures(tmp_path / "whole", path.stem)
        assert (apart.float() - together.float()).abs().max() <= 2
    for line, (row, seeds) in zip(status.examine(out), [("floor", 2), ("lora", 2), ("copy", 1)], strict=False):
        assert line == f"{f'row {row}':20} {seeds} of {seeds} done, 0 missing"
    alone = config.run("evaluate", [*words, "rows=[floor]", "seed=1", f"out={tmp_path / 'alone'}"])
    assert torch.equal(pictures(alone.parent, "floor"), pictures(out, "floor-1"))
    assert not torch.equal(pictures(alone.parent, "floor"), pictures(out, "floor"))
    stamps = {p: p.stat().st_mtime_ns for p in (out / "rows").iterdir()}
    config.run("evaluate", [*asked, "shard=1", "num_shards=2"])  # all is there
    assert {p: p.stat().st_mtime_ns for p in (out / "rows").iterdir()} == stamps
    assert now["settings"] == then["settings"]
    assert now["methods"] == then["methods"]
    assert now["made_from"] == then["made_from"]
    for row, told in then["rows"].items():
        assert now["rows"][row].keys() == told.keys()
        assert now["rows"][row]["people"] == told["people"]
        assert now["values"][row]["copy_pose"] == [pytest.approx(x, abs=0.05) for x in then["values"][row]["copy_pose"]]


def test_a_row_is_added_to_what_is_there(evaluated, words, tmp_path):
    evaluated = shutil.copytree(evaluated, tmp_path / "evaluated")  # others read what is there
    stamps = {p.name: p.stat().st_mtime_ns for p in (evaluated / "rows").iterdir()}
    before = load_json(evaluated / "results.json")
    mine = "methods.lora.adapter.rank=2"
    rows = ["floor", *KINDS, "copy"]
    with pytest.raises(UserError, match=r"rows/lora\.safetensors of a run with other adapter\.rank"):
        config.run("evaluate", [*words, mine, f"rows=[{','.join(rows)}]", f"out={evaluated}"])
    # as after a memory that did not suffice
    config.run("evaluate", [*words, "batch=1", f"rows=[{','.join(rows)}]", f"out={evaluated}"])
    after = load_json(evaluated / "results.json")
    assert list(after["rows"]) == rows
    assert {row: after["values"][row] for row in before["values"]} == before["values"]
    assert all((evaluated / "rows" / name).stat().st_mtime_ns == then for name, then in stamps.items())


def test_what_is_kept_of_the_rows_is_a_gallery(evaluated, tmp_path):
    out = config.run("report", [f"results={evaluated / 'results.json'}", f"out={tmp_path}", "gallery_people=2"])
    assert (out / "gallery.webp").stat().st_size <= 300_000
    shown, left_out = columns({evaluated / "results.json": load_json(evaluated / "results.json")}, None)
    assert [column.row for column in shown] == ["floor", *KINDS]
    assert {column.people for column in shown} == {PEOPLE}
    assert left_out == []


def test_a_slow_row_is_of_the_first_people_alone(evaluated, words, tmp_path, capsys):
    few = ["rows=[floor,lora,copy,ceiling]", "methods.lora.people=2", "methods.lora.against=[floor]"]
    result = load_json(config.run("evaluate", [*words, *few, f"out={tmp_path}"]))
    assert re.search(r"fine-tuning: [^\r]*/3 \[", capsys.readouterr().err)  # a bar of the iterations
    assert torch.equal(pictures(tmp_path, "lora"), pictures(evaluated, "lora")[:2])
    counts = {row: told["people"] for row, told in result["rows"].items()}
    assert counts == {"floor": 3, "lora": 2, "copy": 3, "ceiling": 3}
    values, whole = result["values"], load_json(evaluated / "results.json")["values"]
    assert values["lora"] == {name: [x[:2] for x in seeds] for name, seeds in whole["lora"].items()}
    floor = np.array(values["floor"]["cosine"]).T[:2]
    assert result["paired"] == {"lora-floor": paired(np.array(values["lora"]["cosine"]).T, floor, 0)}
    assert all(sum(part.get("lora of", 0) for part in words.values()) == 2 for words in result["slices"].values())
    with pytest.raises(UserError, match=r"rows/lora\.safetensors of a run with other people"):
        config.run("evaluate", [*words, few[0], f"out={tmp_path}"])


def test_a_row_is_drawn_at_a_strength_of_its_adapter(evaluated, words, tmp_path):
    asked, whole = [*words, "rows=[lora]", f"out={tmp_path}"], pictures(evaluated, "lora").float()
    base = pictures(evaluated, "floor").float()
    for strength in ("0", "0.1"):
        shutil.rmtree(tmp_path)
        result = load_json(config.run("evaluate", [*asked, f"methods.lora.strength={strength}"]))
        assert result["methods"]["lora"]["strength"] == float(strength)
        found = pictures(tmp_path, "lora").float()
        if strength == "0":
            assert torch.equal(found, base)
    little, full = (found - base).abs().mean(), (whole - base).abs().mean()
    assert 0.02 * full < little < 0.8 * full
    with pytest.raises(UserError, match=r"rows/lora\.safetensors of a run with other strength"):
        config.run("evaluate", [*asked, "results=whole.json"])


def test_judges_are_added_to_what_is_drawn(words, people, tiny_judges, tmp_path):
    further = "changed=['a photo of a [V] face, on the beach']"
    words = [*words, "rows=[floor,lora,copy,ceiling]", further, f"out={tmp_path}"]
    with pytest.raises(UserError, match=r"judges\.dino=.*there is no such folder"):
        config.run("evaluate", [*words, f"judges.dino={tmp_path / 'nothing'}"])
    assert not list(tmp_path.glob("rows/*"))  # said before the long work
    config.run("evaluate", words)
    before = load_json(tmp_path / "results.json")
    assert before["judges"] == {}
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    config.run("evaluate", [*words, *(f"judges.{name}={folder}" for name, folder in tiny_judges.items())])
    after = load_json(tmp_path / "results.json")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()} == stamps
    new = {row: set(after["values"][row]) - set(values) for row, values in before["values"].items()}
    all_of = {figure + kind for figure in ("dino", "vicreg", "clip_i", "clip_t") for kind in ("", "_plain", "_changed")}
    varied = {"dino_diversity", "vicreg_diversity", "clip_diversity"}
    all_of |= {"clip_r", *varied}
    photos = all_of - {"clip_t", "clip_t_changed", "clip_r"}  # which were made under no prompt
    assert new == {"floor": all_of, "lora": all_of, "copy": photos, "ceiling": photos - varied}
    assert all(after["values"][row].items() >= values.items() for row, values in before["values"].items())
    # the figures are those of the pictures, of the photos that judge, and of the prompts without the person
    found = load_people(people, split="test")
    judging = torch.stack([found.unlike(rows[:1], rows[1:])[:2] for rows in found.photos])
    views = found.images[judging].flatten(0, 1)
    drawn = pictures(tmp_path, "lora").flatten(0, 1)
    dino, clip = (judge(name, str(tiny_judges[name]), torch.device("cpu")) for name in ("dino", "clip"))
    values = {name: torch.tensor(x[0]) for name, x in after["values"]["lora"].items()}
    likeness = torch.einsum("ikc,ilc->ikl", dino(drawn).view(PEOPLE, 3, -1), dino(views).view(PEOPLE, 2, -1)).mean(-1)
    assert torch.allclose(values["dino_plain"], likeness[:, :2].mean(1), atol=1e-5)
    assert torch.allclose(values["dino"], (likeness[:, :2].mean(1) + likeness[:, 2]) / 2, atol=1e-5)
    said = clip.words(["a face", "a photo of a face, on the beach"])
    obeyed = clip(drawn).view(PEOPLE, 3, -1) @ said.T
    assert torch.allclose(values["clip_t_plain"], obeyed[:, :2, 0].mean(1), atol=1e-5)
    assert torch.allclose(values["clip_t_changed"], obeyed[:, 2, 1], atol=1e-5)
    one, two = dino(drawn).view(PEOPLE, 3, -1)[:, :2].unbind(1)
    assert torch.allclose(values["dino_diversity"], 1 - (one * two).sum(-1), atol=1e-5)
    assert torch.equal(values["clip_r"], (obeyed[:, 2, 1] > obeyed[:, 2, 0]).float())
    assert set(after["judges"]) == {"dino", "vicreg", "clip"}
    with pytest.raises(UserError, match=r"would be lost \(clip, dino, vicreg\)"):
        config.run("evaluate", words)


def test_the_verifier_is_a_recogniser_with_weights(words, tiny_judges, tmp_path):
    words, missing = [*words, "rows=[floor,copy]", f"out={tmp_path}"], tmp_path / "nothing"
    asked = [*words, "recognisers=[sface,verifier]"]
    with pytest.raises(UserError, match=r"recognisers='verifier' needs judges\.verifier=.*train_judge judge=verifier"):
        config.run("evaluate", asked)
    with pytest.raises(UserError) as told:
        config.run("evaluate", [*asked, f"judges.verifier={missing}"])
    assert "there is no such folder" in str(told.value)
    assert "such as `hyperdb train_judge judge=verifier` writes, or take it out of recognisers" in str(told.value)
    assert "\n" not in str(told.value)
    asked.append(f"judges.verifier={tiny_judges['vicreg']}")  # of the same kind
    config.run("evaluate", asked)
    found = load_json(tmp_path / "results.json")
    assert set(found["judges"]) == {"verifier"}
    assert found["rows"]["floor"]["detected_verifier"] == 1  # it looks for no face
    figures = {"floor": pictures(tmp_path, "floor"), "copy": pictures(tmp_path, "copy")}
    verifier = judge("verifier", str(tiny_judges["vicreg"]), torch.device("cpu"))
    people = load_people(next(w for w in words if w.startswith("data=")).removeprefix("data="), split="test")
    judging = torch.stack([people.unlike(rows[:1], rows[1:])[:2] for rows in people.photos])
    views = verifier(people.images[judging].flatten(0, 1)).view(PEOPLE, 2, -1).mean(1)
    for row, images in figures.items():
        cosine = torch.cosine_similarity(verifier(images.flatten(0, 1)).view(PEOPLE, 2, -1), views[:, None], dim=-1)
        assert torch.allclose(torch.tensor(found["values"][row]["cosine_verifier"][0]), cosine.mean(1), atol=1e-5)
    assert set(found["paired_further"]) >= {"cosine_verifier", "rank1_verifier"}
    with pytest.raises(UserError, match=r"would be lost \(verifier\)"):
        config.run("evaluate", words)


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


TABLES = ["table1", "table2", "table3"]
CONTROLS = {"floor", "shuffled_40", "mean_40", "hyper_40", "copy", "ceiling"}


@pytest.mark.parametrize("base", options.choices("diffusion"))
def test_the_papers_tables_share_people_prompts_and_pictures(base):
    found = [config.load("evaluate", [f"experiment={name}", f"diffusion={base}"]) for name in TABLES]
    prompts = [*found[0].styled, *found[0].changed]
    assert len(set(prompts)) == len(prompts) == 30
    for table, settings in zip(TABLES, found, strict=True):
        assert set(settings.rows) > CONTROLS
        assert settings.results == f"{table}.json"
        alike = {"rows": found[0].rows, "results": found[0].results}
        assert replace(settings, **alike) == found[0]


def test_the_prompts_of_the_embedded_base_are_in_words_that_it_knows():
    found = config.load("evaluate", ["experiment=table1"])
    assert len(found.styled) == len(found.changed) == 15
    assert {word for text in found.changed for word in words_of(text.replace("[V]", "sks"))} <= set(vocabulary())


def test_rows_that_begin_at_nothing_need_no_hypernetwork():
    found = [config.load("evaluate", [f"experiment=sweep/{row}", "diffusion=sd15"]) for row in ("lora", "hyper_40")]
    assert [one.hypernet for one in found] == [None, "default"]
    assert config.load("evaluate", ["experiment=sweep/lora"]).hypernet == "default"  # it is there, and is told


def test_a_table_is_made_of_photographs(tiny_base, tiny_judges, tmp_path):
    """An aligned folder knows no styles, places or accessories, and none are asked for."""
    rng, folder, records = np.random.default_rng(0), tmp_path / "aligned", []
    for i, (who, split) in enumerate([("ben", "test"), ("ada", "train"), ("cy", "test"), ("ben", "test")] * 3):
        save_png(folder / f"{i}.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        records.append({"file": f"{i}.png", "identity": who, "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    told = ["experiment=table2", "diffusion=sd15", f"diffusion.path={tiny_base}", *TINY, "hypernet=null"]
    told += [f"data={folder}", "views=1", "images=1", "recognisers=[sface]"]
    told.append("methods.dreambooth_agg_2.finetune.steps=1")
    told += [f"judges.{name}={path}" for name, path in tiny_judges.items()]
    file = config.run("evaluate", [*told, "rows=[floor,dreambooth_agg_2,copy,ceiling]", f"out={tmp_path / 'out'}"])
    result = load_json(file)
    assert (file.name, result["people"], result["slices"]) == ("table2.json", 2, {})
    row = result["rows"]["dreambooth_agg_2"]
    assert {"dino_changed", "clip_i_changed", "clip_t_changed", "cosine_changed"} <= set(row)
    assert not [name for name in row if name.endswith("styled") or name in ("style_accuracy", "place_accuracy")]
    assert pictures(tmp_path / "out", "dreambooth_agg_2").shape == (2, 31, 3, 32, 32)
