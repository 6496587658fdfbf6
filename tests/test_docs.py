"""The documents' figures are those of the results files, their commands and diffs exist, and the tree stays light."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from hyperdb import config, options
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.targets import find_set
from hyperdb.report.table import markdown, read
from hyperdb.runtime.files import load_json
from hyperdb.tuning.trainable import numbers

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))


def test_the_table_is_the_results_files():
    table = markdown(load_json(ROOT / "experiments" / "embedded" / "likeness" / "results.json"))
    assert table.partition("\n\n")[0] in README
    assert table in (ROOT / "hyperdb" / "embedded" / "MODEL_CARD.md").read_text()


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 250


def test_the_page_of_stages_has_them_all():
    text = (ROOT / "docs" / "stages.md").read_text()
    assert [stage for stage in config.STAGES if f"| `{stage}` |" not in text and f" `{stage}` " not in text] == []


def test_the_tables_of_memory_are_the_results_files():
    text = (ROOT / "docs" / "stable_diffusion.md").read_text()
    found = load_json(ROOT / "benchmarks" / "memory.json")
    measured = load_json(ROOT / "benchmarks" / "full_size.json")["runs"]
    for name, run in found["checked_on_cpu"].items():
        assert run["measured_gb"] == measured[name]["peak_gb"]
        assert f"| {name} | {run['expected_gb']:.1f} | {run['measured_gb']:.1f} |" in text
    for card, stages in found["by_card"].items():
        assert f"| {card} GB | {' | '.join(stages.values())} |" in text


def test_a_table_under_its_command_is_what_that_prints():
    text = (ROOT / "experiments" / "tables" / "README.md").read_text()
    text += README
    commands = re.findall(r"^ *python -m hyperdb\.report\.table (\S+) (.+)$", text, flags=re.MULTILINE)
    assert len(commands) >= 3
    for file, figures in commands:
        assert read(file, figures.split(), ROOT).partition("\n\n")[0] in text, file


def test_the_table_of_the_rates_is_the_sweeps():
    folder = ROOT / "experiments" / "tables"
    table = runpy.run_path(str(folder / "sweeps.py"))["table"]
    assert table([load_json(file) for file in sorted((folder / "sweeps").glob("*.json"))]) in (
        folder / "README.md"
    ).read_text()


def test_the_tables_of_the_ablations_are_their_results():
    folder = ROOT / "experiments" / "tables"
    table = runpy.run_path(str(folder / "ablations.py"))["table"]
    text = (folder / "ablations" / "README.md").read_text()
    for file in sorted((folder / "ablations").glob("*/results.json")):
        assert table(load_json(file)) in text, file.parent.name
        assert f"]({file.parent.name}/over.png)" in text


def test_the_chosen_rates_are_those_of_the_tables():
    settings = config.load("evaluate", ["experiment=table1"])
    for file in sorted((ROOT / "experiments" / "tables" / "sweeps").glob("*.json")):
        fit = settings.methods[file.stem].fit(settings.finetune)
        assert fit is not None
        assert fit.rate == load_json(file)["rate"], file.stem


def test_what_the_judges_know_is_what_was_measured():
    folder = ROOT / "experiments" / "embedded" / "judges"
    lines = (folder / "README.md").read_text().splitlines()
    for name, label in (("verifier", "verifier"), ("vicreg", "VICReg"), ("clip", "CLIP")):
        found = load_json(folder / f"{name}.json")
        auc, rank = found["auc_renders"], found["rank1_renders"]["photo"]
        lowest = min(auc, key=auc.__getitem__)
        known = found.get("accuracy_renders", found.get("probe_renders", {}))
        (line,) = [line for line in lines if line.startswith(f"| {label},")]
        assert f"| {auc['photo']:.4f} | {auc[lowest]:.4f} ({lowest}) | {rank:.4f} |" in line
        assert all(f"| {known[what]:.4f} (" in line for what in ("style", "place") if known)


def test_the_rows_of_the_study_of_guidance_are_its_results():
    folder = ROOT / "experiments" / "embedded" / "base64" / "guidance"
    rows, text = load_json(folder / "results.json")["rows"], (folder / "README.md").read_text()
    figures = ("rank1", "rank1_styled", "style_accuracy", "copy_pose", "copy_background")
    named = {"40 of all, guidance 3": "ordinary guidance", "40 of 0-0.65, guidance 3 and 3": "the default**"}
    for name, label in named.items():
        rest = " | ".join(f"{rows[name][k]['mean']:.2f}" for k in figures)
        assert f"{label} | {rows[name]['cosine']['mean']:.3f} | {rest} |" in text


def test_the_table_of_adapters_is_their_yamls():
    for path in sorted((ROOT / "conf" / "adapters").glob("*.yaml")):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{path.stem}`"))
        if (recipe := yaml.safe_load(path.read_text()).get("finetune")) is not None:
            assert f"| {recipe['steps']} | {recipe['rate']:.1e} |".replace("e-0", "e-") in line


def test_the_numbers_of_each_adapter_are_those_that_it_trains():
    text = (ROOT / "docs" / "methods.md").read_text()
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768), CLIPTextModel(CLIPTextConfig(**clip))
    small = Base.sketch(DiffusionConfig())
    for path in sorted((ROOT / "conf" / "adapters").glob("*.yaml")):
        settings = config.load("personalize", ["image=x.png", f"adapter={path.stem}"]).adapter.bound([0], [0])
        cells = []
        for parts in ((small.unet, small.text_encoder), sd15):
            sites = {name: Site(name, module) for name, module in find_set(settings.where(), *parts).items()}
            layout = Layout.listing({name: site for name, site in sites.items() if site.kind in settings.kinds})
            cells.append(numbers(settings.build(layout)))
        predicted = ", as it is predicted" if path.stem == "lidb" else ""
        assert f"| `{path.stem}`{predicted} | {cells[0]:,} | {cells[1]:,} | {4 * cells[1]:,} |" in text


def test_every_method_is_described():
    text = (ROOT / "docs" / "methods.md").read_text()
    named = {path.stem for group in ("adapters", "methods") for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert {name for name in named if f"**`{name}`**" not in text} == set()


def test_the_table_of_sizes_is_the_benchmarks():
    text = (ROOT / "docs" / "formats.md").read_text()
    found = load_json(ROOT / "benchmarks" / "adapter_sizes.json")
    for precision in ("fp32", "fp16", "int8"):
        sizes = (found["bytes"][base][precision] for base in ("other", "embedded"))
        cells = [size[file] for size in sizes for file in ("lidb", "adapter")]
        assert f"| {precision} | {' | '.join(f'{size:,}' for size in cells)} | " in text


def test_the_arithmetic_of_scale_is_what_its_script_prints():
    script = ROOT / "benchmarks" / "scale.py"
    known = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=known, check=True, timeout=500)
    line, costs, growth = done.stdout.strip().split("\n\n")
    text = (ROOT / "docs" / "scale.md").read_text()
    assert f"\n\n{line}.\n\n{costs}\n\n" in text
    assert f"\n\n{growth}\n\n" in text


def test_the_diffs_shown_are_in_the_tree():
    """Each block of CONTRIBUTING.md, its lines in their order."""
    blocks = re.findall(r"^```diff\n(.*?)^```", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
    files = [part for block in blocks for part in re.split(r"^--- .*\n", block, flags=re.MULTILINE)[1:]]
    assert len(files) > 10
    for part in files:
        head, *lines = part.splitlines()
        there = iter((ROOT / head.removeprefix("+++ b/")).read_text().splitlines())
        for line in lines:
            assert line.startswith("@@") or line[1:] in there, f"{head}: {line}"


NAMES = ("cluster", "formats", "imports", "methods", "stable_diffusion", "stages", "web")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
DOCUMENTS = [
    page
    for pages in ("*.md", "data/*.md", *(f"{name}/**/*.md" for name in ("docs", "experiments", "hyperdb", "tests")))
    for page in sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pages))
]
STUDIES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "experiments").rglob("README.md"))]


@pytest.mark.parametrize("page", [*PAGES, *(page for page in STUDIES if "base64" not in page)])
def test_every_command_named_is_a_stage_with_those_settings(page):
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    lines = re.findall(r"^(?:    |      )?hyperdb ([a-z0-9_]+)([^\n#]*)", text, flags=re.MULTILINE)
    for stage, rest in lines:
        assert stage in config.STAGES, stage
        keys = [w[:-1] for w in re.findall(r"(?<=[\s\x27\"])[a-z][a-z_.]*=", rest) if not w.startswith("hydra")]
        known = {key for key, _ in options.settings(config.stage_module(stage).Config)} | {"experiment"}
        assert {key for key in keys if not key.startswith("methods.")} <= known, (stage, keys)
    assert lines or page in STUDIES


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_link_and_picture_is_there(page):
    here = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text())
    assert [t for t in targets if "://" not in t and not (here / t).exists()] == []


def test_weights_in_the_tree_stay_light():
    files = list((ROOT / "hyperdb").rglob("*.safetensors")) + list((ROOT / "hyperdb").rglob("*.npz"))
    total = sum(f.stat().st_size for f in files)
    assert 10e6 < total < 80e6


def test_every_folder_of_the_tree_is_explained():
    packages = {p.name for p in (ROOT / "hyperdb").iterdir() if (p / "__init__.py").is_file()}
    assert all(f"{name}/" in README for name in packages)
