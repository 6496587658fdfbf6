"""The comparison with the public script of LoRA DreamBooth, whose place a stand-in of a few lines takes here."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hyperdb import config
from hyperdb.adapters import LoRAConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.targets import find_sites
from hyperdb.formats import lora
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json
from hyperdb.tuning.fit import FitConfig

ROOT = Path(__file__).parents[1]
FILE = ROOT / "experiments" / "tables" / "public_script.py"
PUBLIC = os.environ.get("PUBLIC_SCRIPT")  # where a copy of the script itself is
OPTIONS = (
    "pretrained_model_name_or_path", "instance_data_dir", "output_dir", "instance_prompt", "resolution", "seed", "rank",
    "mixed_precision", "train_batch_size", "max_train_steps", "learning_rate", "lr_scheduler", "lora_dropout",
    "adam_beta1", "adam_epsilon", "max_grad_norm", "with_prior_preservation", "center_crop",
)  # fmt: skip
# writes a LoRA that tells photos and seeds apart, at a layer of each network, and keeps how it was called
STAND_IN = (
    "import argparse, hashlib, json, os, sys\n"
    "import numpy as np\n"
    "from pathlib import Path\n"
    "from safetensors.numpy import save_file\n"
    "parser = argparse.ArgumentParser()\n"
    + "".join(f'parser.add_argument("--{name}")\n' for name in OPTIONS)
    + """
parser.add_argument("--adam_beta2", type=float, default=0.75)
parser.add_argument("--adam_weight_decay", type=float, default=1e-2)
parser.add_argument("--train_text_encoder", action="store_true")
args = parser.parse_args()
(photo,) = Path(args.instance_data_dir).iterdir()
with open(__file__ + ".calls", "a") as calls:
    calls.write(json.dumps([sys.argv[1:], os.environ["HF_HUB_OFFLINE"]]) + "\\n")
if args.rank == "3":
    sys.exit("much text\\nof this rank there is no LoRA")
g = np.random.default_rng(list(photo.read_bytes() + args.seed.encode()))
layers = ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora"]
layers += ["text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer"] * args.train_text_encoder
shapes = {"down": (int(args.rank), 32), "up": (32, int(args.rank))}
made = {f"{x}.{k}.weight": g.normal(size=s).astype(np.float32) for x in layers for k, s in shapes.items()}
Path(args.output_dir).mkdir()
save_file(made, args.output_dir + "/pytorch_lora_weights.safetensors")
"""
)
SETTINGS = FitConfig(steps=7, levels=1, rate=0.002, seed=5)


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def module():
    return load(FILE)


@pytest.fixture
def stand_in(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(STAND_IN)
    return file


@pytest.fixture(scope="module")
def words(tiny_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("validation") / "heads"
    small = ["identities=2", "views=3", "photo_views=3", "size=32", "workers=1", "split=validation"]
    config.run("render_heads", [*small, f"out={out}"])
    found = [f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", f"data={out}", "views=2"]
    return [*found, "images=2", "changed=['a photo of a [V] face , on the beach']", "steps=2", "rate=0.05", "rank=2"]


def test_the_command_says_what_is_alike_and_nothing_else(module, stand_in):
    base = DiffusionConfig(path="some/base", size=64, dtype="fp32", rare_token="zwx")
    told = module.command(stand_in, base, LoRAConfig(rank=3), SETTINGS, text=True)
    assert told[1:] == [
        str(stand_in), "--pretrained_model_name_or_path=some/base", "--instance_data_dir={photo}", "--output_dir={out}",
        "--instance_prompt=a zwx face", "--resolution=64", "--mixed_precision=no", "--train_batch_size=1",
        "--max_train_steps=7", "--learning_rate=0.002", "--rank=3", "--seed=5", "--train_text_encoder",
    ]  # fmt: skip
    assert module.command(stand_in, replace(base, dtype="bf16"), LoRAConfig(rank=3), SETTINGS, text=False)[1:] == [
        "--mixed_precision=bf16" if word == "--mixed_precision=no" else word for word in told[1:-1]
    ]


def test_the_words_are_those_of_the_row(module):
    whole, adapter, settings = module.read(["rate=3e-3", "people=5", "seed=2"])
    recipe = config.load("evaluate").fit("lora")
    assert settings == replace(recipe, rate=3e-3, seed=recipe.seed + 2)
    assert (whole.people, whole.split, adapter) == (5, "validation", config.load("evaluate").methods["lora"].adapter)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"^no script at .*none\.py: fetch examples/dreambooth/\S+ of github.com/huggingface/diffusers, tag v\d"),
        ("<!DOCTYPE html>\n<html>", "is not Python .line 1.: fetch the file itself"),
        ('parser.add_argument("--rank")', "knows no --pretrained_model_name_or_path: is it examples/dreambooth/"),
    ],
)
def test_what_is_not_the_script_is_refused_in_one_line(module, tmp_path, text, said):
    file = tmp_path / "none.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        module.main(["--script", str(file), "data=nowhere"])
    assert "\n" not in str(refused.value)


def test_a_script_that_fails_is_told_by_its_last_line(module, stand_in, words, tmp_path):
    with pytest.raises(UserError, match=r"script\.py has failed: of this rank there is no LoRA \(all .*log\.txt\)$"):
        module.main(["--script", str(stand_in), "--runs", str(tmp_path / "runs"), *words, "rank=3"])
    stand_in.write_text(STAND_IN.replace("save_file(", "print('ended well') if True else ("))
    with pytest.raises(UserError, match=r"script\.py has failed: ended well \("):
        module.main(["--script", str(stand_in), "--runs", str(tmp_path / "again"), *words])


def test_each_person_is_drawn_with_their_own_lora(module, stand_in, words, tmp_path, monkeypatch):
    drawn = []

    def draw(base, changes, *rest):
        drawn.append((base, changes))
        return plain(base, changes, *rest)

    plain = module.draw
    monkeypatch.setattr(module, "draw", draw)
    out, runs = tmp_path / "out.json", tmp_path / "runs"
    told = ["--script", str(stand_in), "--runs", str(runs), "--out", str(out), *words, "seeds=2"]
    module.main(told)
    calls = [json.loads(line) for line in Path(f"{stand_in}.calls").read_text().splitlines()]
    assert [offline for _, offline in calls] == ["1"] * 4
    given = [dict(word[2:].split("=", 1) for word in words if "=" in word) for words, _ in calls]
    assert [one["seed"] for one in given] == ["0", "0", "1", "1"]  # two people, then two people
    base, files = drawn[0][0], [Path(one["output_dir"]).with_name("lora.safetensors") for one in given]
    made = [lora.read(file).factors(find_sites(base.unet, base.text_encoder), "base") for file in files]
    assert [changes is None for _, changes in drawn] == [True, *[False] * 4] * 2
    for seed, theirs in enumerate((drawn[1][1], drawn[6][1])):
        assert len(theirs) == 2
        for person, one in enumerate(made[2 * seed : 2 * seed + 2]):
            for name, pair in one.items():
                assert all(torch.equal(a[person], b[0]) for a, b in zip(theirs[name], pair, strict=True))
    for changes in (drawn[k][1] for k in (2, 3, 7, 8)):  # hyperdb's at the same places, trained
        assert changes.keys() == made[0].keys()
        assert all(pair.up.abs().max() > 0 for pair in changes.values())
    assert any(not torch.equal(drawn[2][1][name].down, drawn[3][1][name].down) for name in made[0])

    found = load_json(out)
    assert list(found["rows"]) == ["base", "script", "alike", "places", "lora"]
    sizes = {row: (one["layers"], one["numbers"]) for row, one in found["rows"].items() if row != "base"}
    assert sizes["script"] == sizes["alike"] == (2, 2 * 2 * (32 + 32))
    assert sizes["lora"] > sizes["script"]
    assert [len(of_seed) for of_seed in found["values"]["script"]["cosine"]] == [2, 2]
    mean = {row: sum(map(sum, found["values"][row]["cosine"])) / 4 for row in found["rows"]}
    assert found["paired"]["cosine"]["lora-script"]["mean"] == pytest.approx(mean["lora"] - mean["script"], abs=1e-6)
    pairs = {"script-base", "alike-script", "places-alike", "lora-places", "lora-script", "lora-base"}
    assert found["paired"].keys() == {"cosine", "cosine_changed"}
    assert all(one.keys() == pairs for one in found["paired"].values())
    assert found["differs"]["betas"] == {"script": [None, 0.75], "hyperdb": [0.9, 0.99]}
    assert found["script"]["sha256"] == module.hashlib.sha256(stand_in.read_bytes()).hexdigest()
    assert "--instance_data_dir={photo}" in found["script"]["options"]
    assert found["versions"].keys() >= {"diffusers", "peft", "accelerate", "torch"}

    module.main(told)  # again: what the script has made is kept
    assert len(Path(f"{stand_in}.calls").read_text().splitlines()) == 4
    assert load_json(out)["values"] == found["values"]
    module.main([*told, "--unet-only", "seeds=1"])
    assert load_json(out)["rows"]["script"]["layers"] == 1
    assert load_json(out)["settings"]["text_encoder"] is False


def test_alike_begins_as_peft_begins(module, tiny_base):
    base = DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()
    names = list(base.targets())
    adapter, begin = module.alike(base, LoRAConfig(rank=4), names, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = inject_adapter_in_model(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["0"]),
            nn.Sequential(nn.Linear(4096, 8)),
        )
    wanted = theirs[0].lora_A["default"].weight.std().item()
    downs = [value for name, value in begin.params.items() if name.endswith(".down")]
    for width in {value.shape[-1] for value in downs}:
        found = torch.cat([value[:1].flatten() for value in downs if value.shape[-1] == width])
        assert found.std().item() == pytest.approx(wanted, rel=0.1)
    assert adapter.layout.names == tuple(names)
    assert not any(value.any() for name, value in begin.params.items() if name.endswith(".up"))


def test_the_tables_are_the_results_file():
    text, found = FILE.with_name("README.md").read_text(), load_json(FILE.with_suffix(".json"))
    for row, figures in found["rows"].items():
        means = " | ".join(f"{figures[name]['mean']:.3f}" for name in ("cosine", "cosine_changed"))
        each = ", ".join(f"{x:.3f}" for x in found["values"][row]["cosine"][0])
        assert f" | {each} | {means} | {figures['copy_pose']['mean']:.2f} |" in text
    for name in found["paired"]["cosine"]:
        c, changed = (
            f"{x['mean']:+.3f} [{x['lo']:+.3f}, {x['hi']:+.3f}]"
            for x in (one[name] for one in found["paired"].values())
        )
        assert f"| {name.replace('-', ' - ')} | {c} | {changed} |" in text


def test_people_an_hour_are_those_of_three_ways_in_turns(stand_in, tiny_base, tmp_path, monkeypatch):
    """Of `hyperdb` in this process, of the script in one for each person."""
    fits = load(ROOT / "benchmarks" / "fits.py")
    people = ["identities=2", "views=5", "photo_views=5", "size=32", "workers=1", "split=validation"]
    data = config.run("render_heads", [*people, f"out={tmp_path / 'heads'}"])
    asked, told = [], fits.told

    def here(command):
        if command[1:3] != ["-m", "hyperdb"]:
            return told(command)
        asked.append(command[4:])
        config.run(command[3], command[4:])
        return 1.0 if command[-1].startswith("shard=") else 3.0

    monkeypatch.setattr(fits, "told", here)
    words = [
        f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "adapter.a=12",
        "adapter.b=8", f"data={data}", "split=validation", "start=average", "fit.trained=all", "fit.optimizer=adamw",
        "fit.levels=1", "fit.views=1", "fit.rate=0.1", "average.levels=1", "average.prior_weight=0",
    ]  # fmt: skip
    everything = ["--quick", "--script", str(stand_in), "--work", str(tmp_path / "work"), *words]
    with monkeypatch.context() as stopped:
        stopped.setattr(fits.lora, "read", None)  # as the script has run for everybody
        with pytest.raises(TypeError):
            fits.main(everything)
    kept = load_json(tmp_path / "work" / "measured.json")["found"]
    assert list(kept)[-1] == "script, 2 steps, turn 1, person 2, seconds"
    begun = (tmp_path / "work" / "store" / "start.safetensors").read_bytes()
    found = fits.main(everything)
    assert load_json(tmp_path / "work" / "measured.json")["found"].items() >= kept.items()
    assert (tmp_path / "work" / "store" / "start.safetensors").read_bytes() == begun
    rows = found["rows"]
    assert list(rows) == ["precompute", "precompute, batch=1", "script"]
    assert [one[-1] for one in asked] == ["shard=2", "shard=2", *["batch=16", "batch=1"] * 2]
    for row in ("precompute", "precompute, batch=1"):  # two people in 3 seconds, of which 1 is the start
        assert (rows[row]["people_an_hour"], rows[row]["people_an_hour_without_start"]) == (2400, 3600)
        assert rows[row]["cosine"] == pytest.approx(rows["precompute"]["cosine"], abs=0.02)
    calls = [json.loads(line)[0] for line in Path(f"{stand_in}.calls").read_text().splitlines()]
    steps = [int(word.partition("=")[2]) for words in calls for word in words if word.startswith("--max_train_steps")]
    last = rows["script"]["steps"]
    assert steps == [2, 2, *[3, 3] * (last == 3), 1, last]
    assert list(found["ladder"]) == [str(step) for step in (2, 3) if step <= last]
    assert rows["script"]["as_like"] == (rows["script"]["cosine"] >= rows["precompute"]["cosine"] - 0.005)
    assert not found["within"]["script"] or rows["script"]["as_like"]
    assert [len(one["whole"]) for one in found["seconds"].values()] == [2, 2, 3]

    fits.main(everything)  # again: nothing is measured twice
    assert len(asked) == 6
    with pytest.raises(UserError, match=r"measured\.json has measurements of another recipe; choose another --work"):
        fits.main([*everything, "fit.rate=0.2"])


@pytest.mark.slow
@pytest.mark.skipif(PUBLIC is None, reason="PUBLIC_SCRIPT=FILE names a copy of diffusers' train_dreambooth_lora.py")
def test_the_script_itself(module, words, tmp_path):
    out = tmp_path / "out.json"
    module.main(["--script", str(PUBLIC), "--runs", str(tmp_path / "runs"), "--out", str(out), *words])
    found = load_json(out)
    assert found["rows"]["script"]["numbers"] == found["rows"]["alike"]["numbers"] > 0
    assert found["script"]["asks_for_diffusers"]
    assert all(found["script"]["left_as_it_has_them"][name] for name in ("adam_beta2", "lr_scheduler", "max_grad_norm"))
    assert found["values"]["script"]["diversity"] != found["values"]["base"]["diversity"]
