"""The README's figures are those of the results files, its commands exist, and the tree stays light."""

from __future__ import annotations

import re
from pathlib import Path

from hyperdb import config, options
from hyperdb.report.table import markdown
from hyperdb.runtime.files import load_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_results_files():
    results = load_json(ROOT / "experiments" / "embedded" / "likeness" / "results.json")
    assert markdown(results) in README
    assert markdown(results) in (ROOT / "hyperdb" / "embedded" / "MODEL_CARD.md").read_text()


def test_the_tables_of_memory_are_the_results_files():
    text = (ROOT / "docs" / "stable_diffusion.md").read_text()
    found = load_json(ROOT / "benchmarks" / "memory.json")
    measured = load_json(ROOT / "benchmarks" / "full_size.json")["runs"]
    for name, run in found["checked_on_cpu"].items():
        assert run["measured_gb"] == measured[name]["peak_gb"]
        assert f"| {name} | {run['expected_gb']:.1f} | {run['measured_gb']:.1f} |" in text
    for card, stages in found["by_card"].items():
        assert f"| {card} GB | {' | '.join(stages.values())} |" in text


def test_the_rows_of_the_study_of_guidance_are_its_results():
    rows = load_json(ROOT / "experiments" / "embedded" / "guidance" / "results.json")["rows"]
    figures = ("rank1", "rank1_styled", "style_accuracy", "copy_pose", "copy_background")
    named = {"40 of all, guidance 3": "ordinary guidance", "40 of 0-0.65, guidance 3 and 3": "the default**"}
    for name, label in named.items():
        rest = " | ".join(f"{rows[name][k]['mean']:.2f}" for k in figures)
        assert f"{label} | {rows[name]['cosine']['mean']:.3f} | {rest} |" in README


def test_every_command_named_is_a_stage_with_those_settings():
    lines = re.findall(r"^hyperdb ([a-z_]+)([^\n#]*)", README, flags=re.MULTILINE)
    assert lines
    for stage, rest in lines:
        assert stage in config.STAGES, stage
        keys = [w.partition("=")[0] for w in re.findall(r"[a-z_.]+=", rest)]
        known = {key for key, _ in options.settings(config.stage_module(stage).Config)} | {"experiment"}
        assert set(keys) <= known, (stage, keys)


def test_weights_in_the_tree_stay_light():
    files = list((ROOT / "hyperdb").rglob("*.safetensors")) + list((ROOT / "hyperdb").rglob("*.npz"))
    total = sum(f.stat().st_size for f in files)
    assert 10e6 < total < 80e6


def test_every_folder_of_the_tree_is_explained():
    packages = {p.name for p in (ROOT / "hyperdb").iterdir() if (p / "__init__.py").is_file()}
    assert all(f"{name}/" in README for name in packages)
