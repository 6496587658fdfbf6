"""Every yaml in conf/ composes to its dataclass, says what it is, and names only stages that exist.

    python tests/test_configs.py      writes bases.txt anew: what differs between the bases, stage by stage
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from hyperdb import config, options, words
from hyperdb.runtime.errors import UserError

CONF = options.conf_dir()
STAGES = list(config.available())
EXPERIMENTS = options.choices(options.EXPERIMENT)
BASES = options.choices("diffusion")
DIFFERENCES = Path(__file__).with_name("bases.txt")
HEAD = """\
What differs between the bases, stage by stage; written by `python tests/test_configs.py`.
The settings of a group stand once, at the first stage that has them."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of every leaf; what is missing is left out."""
    found = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], str):  # a text a line
            value = {str(i): one for i, one in enumerate(value)}
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return {key: value for key, value in found.items() if value != "???"}


def values(node: Any, resolve: bool = True) -> dict[str, Any]:
    return flat(OmegaConf.to_container(node, resolve=resolve))


def recipe_groups() -> list[str]:
    """Return the groups that have a yaml a base, chosen by `${diffusion}`."""
    return [path.name for path in sorted(CONF.iterdir()) if path.is_dir() and options.choices(path.name) == BASES]


def differences() -> str:
    """Return a table a stage: the settings that a base changes, with their values."""
    tables, above = [HEAD], set()
    for stage in STAGES:
        if "diffusion" not in options.groups(config.stage_module(stage).Config):
            continue
        found = [values(config.compose(stage, [f"diffusion={base}"])) for base in BASES]
        rows = [(key, *(shown(one.get(key)) for one in found)) for key in dict.fromkeys(k for f in found for k in f)]
        rows = [row for row in rows if len(set(row[1:])) > 1 and row not in above]
        above |= {row for row in rows if "." in row[0]}
        if rows:
            lines = [(stage, *BASES), *[(f"  {row[0]}", *row[1:]) for row in rows]]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            padded = (map(str.ljust, line, widths) for line in lines)
            tables.append("\n".join("  ".join(line).rstrip() for line in padded))
    return "\n\n".join(tables) + "\n"


def shown(value: Any) -> str:
    return json.dumps(value).strip('"')


@pytest.mark.parametrize("stage", STAGES)
def test_stage_composes(stage):
    raw = config.compose(stage)
    schema = config.stage_module(stage).Config
    assert dataclasses.is_dataclass(schema)
    assert raw._metadata.object_type is schema
    if "name" in raw:
        assert raw._get_node("out")._value() == f"runs/{stage}/${{name}}"


@pytest.mark.parametrize("stage", STAGES)
def test_values_in_force_are_accepted(stage):
    """What is not required must have a value that the dataclass accepts."""
    raw = config.compose(stage)
    missing = [f"{key}=x" for key, value in raw.items_ex(resolve=False) if value == "???"]
    assert isinstance(config.load(stage, missing), config.stage_module(stage).Config)


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_every_group_composes(stage):
    for group in options.groups(config.stage_module(stage).Config):
        assert options.choices(group), f"conf/{group} has no yaml"
        for name in options.choices(group):
            if group == "adapter" and name != "lidb" and stage in ("precompute", "train_hypernet"):
                with pytest.raises(UserError, match=f"conf/adapters/{name}.yaml: {stage} has no setting 'finetune'"):
                    config.compose(stage, [f"{group}={name}"])
                continue
            raw = config.compose(stage, [f"{group}={name}"])
            node = raw
            for part in group.split("/"):
                node = node[part]
            assert dataclasses.is_dataclass(node._metadata.object_type), f"{group}/{name}.yaml lacks a schema"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_accepted_by_a_stage(name):
    path = CONF / "experiment" / f"{name}.yaml"
    given = yaml.safe_load(path.read_text()) or {}
    stages = [stage for stage in STAGES if options.of_stage(given, config.stage_module(stage).Config)]
    assert stages, f"{path.name} has a key that no stage knows"
    composed = 0
    for stage in stages:
        try:
            raw = config.compose(stage, [f"experiment={name}"])
            missing = [f"{key}=x" for key, value in raw.items_ex(resolve=False) if value == "???"]
            config.load(stage, [f"experiment={name}", *missing])
            composed += 1
        except UserError as error:  # another stage of the same keys without one of its groups
            last = error
    assert composed, last


SWEPT = {name: options.swept(options.experiment(name)) for name in EXPERIMENTS}


@pytest.mark.parametrize("name", [name for name, params in SWEPT.items() if params])
def test_a_sweep_has_several_values_of_settings_of_one_stage(name):
    (stage,) = (s for s in STAGES if options.of_stage(options.experiment(name), config.stage_module(s).Config))
    for key, values in SWEPT[name].items():
        override = words.parsed(words.swept(config.stage_module(stage).Config, f"{key}={values}"))
        assert override.is_sweep_override()
        found = list(override.sweep_string_iterator())
        assert len(set(found)) == len(found) > 1
    for base in BASES:
        made = config.load(stage, [f"experiment={name}", f"diffusion={base}"])
        assert made.out == f"runs/{stage}/{made.name}"
        assert made.name == name.replace("/", "_")


def test_every_method_has_as_many_rates_to_choose_from():
    found = {name.partition("/")[2]: params for name, params in SWEPT.items() if name.startswith("sweep/")}
    assert {"hyper_40", "no_hyper_40", "dreambooth", "textual_inversion", "lora", "dora", "svdiff"} < set(found)
    for method, params in found.items():
        ((key, values),) = params.items()
        rates = [float(value) for value in values.split(",")]
        assert (key, len(rates), sorted(rates)) == (f"methods.{method}.finetune.rate", 5, rates)
        assert all(2.9 < high / low < 3.4 for low, high in itertools.pairwise(rates))
        for base in BASES:
            own = config.load("evaluate", [f"experiment=sweep/{method}", f"diffusion={base}"])
            assert (own.rows, own.split) == ([method], "validation")
            assert rates[0] <= own.fit(method).rate < rates[-1]


@pytest.mark.parametrize(
    ("name", "stage", "folders"),
    [
        ("ablation/noise", "evaluate", ["finetune.noise=_0.0_0.5_", "finetune.noise=_0.0_0.65_",
                                        "finetune.noise=_0.0_0.8_", "finetune.noise=_0.0_0.9_",
                                        "finetune.noise=_0.0_1.0_"]),
        ("ablation/beta", "train_hypernet", ["beta=0.0", "beta=0.01", "beta=0.1", "beta=1.0"]),
        ("ablation/people", "train_hypernet", ["people=50", "people=250", "people=1000", "people=None"]),
    ],
)  # fmt: skip
def test_each_value_of_a_sweep_has_a_folder(name, stage, folders, in_tmp, monkeypatch):
    made = []
    monkeypatch.setattr(config, "execute", lambda _, settings: made.append(settings))
    config.sweep(stage, [f"experiment={name}"])
    parents = {Path(one.out).parent.as_posix() for one in made}
    assert parents == {f"runs/{stage}/{name.replace('/', '_')}"}
    assert [Path(one.out).name.partition("-")[0] for one in made] == folders
    assert len({one.out for one in made}) == len(made)


@pytest.mark.parametrize("stage", ["precompute", "evaluate"])
def test_shards_are_jobs_in_one_folder(stage, in_tmp, monkeypatch):
    made = []
    monkeypatch.setattr(config, "execute", lambda _, settings: made.append(settings))
    config.sweep(stage, ["shard=range(0,3)", "num_shards=3", "seed=0,1" if stage == "evaluate" else "by=person"])
    each = 2 if stage == "evaluate" else 1
    assert sorted(one.share() for one in made) == sorted([(0, 3), (1, 3), (2, 3)] * each)
    outs = [f"runs/evaluate/default/seed={seed}" for seed in (0, 1)] if each == 2 else ["runs/precompute/default"]
    assert sorted({one.out for one in made}) == outs


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.relative_to(CONF).as_posix())
def test_yaml_begins_with_what_it_is(path: Path):
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ")


def test_no_yaml_without_a_stage():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_value_stands_once(stage):
    """What a yaml sets has no default in the stage's dataclass, or the same one."""
    defaults = values(OmegaConf.structured(config.stage_module(stage).Config))
    composed = values(config.compose(stage))
    assert {key: composed[key] for key in defaults if key in composed} == defaults


@pytest.mark.parametrize("group", recipe_groups())
def test_bases_say_the_same_settings(group):
    """So none gets a value that was meant for another."""
    said = [set(flat(yaml.safe_load((CONF / group / f"{base}.yaml").read_text()))) for base in BASES]
    assert all(keys == said[0] for keys in said), [sorted(keys ^ said[0]) for keys in said]


def test_the_paper_s_training_has_its_two_losses_alone():
    ours = config.load("train_hypernet", ["experiment=paper"])
    assert (ours.weight_loss, ours.alpha > 0, ours.beta > 0) == ("plain", True, True)
    assert (ours.prior_weight, ours.identity_weight) == (0, 0)
    assert (ours.target_view, ours.target_style, ours.target_prompt) == ("same", "same", "instance")


def test_a_base_is_chosen_in_one_word():
    """Every stage takes from the groups of recipes what is of its base."""
    for path in CONF.glob("*.yaml"):
        for choice in yaml.safe_load(path.read_text())["defaults"]:
            for group, option in choice.items() if isinstance(choice, dict) else ():
                assert group == "diffusion" or group not in recipe_groups() or option == "${diffusion}", path


def test_a_base_has_its_own_recipe_of_an_adapter(tmp_path, monkeypatch):
    """Wherever the adapter is trained: alone, or as a row of an evaluation. Another base keeps the reference's."""
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "adapters" / "tuned").mkdir(exist_ok=True)
    (conf / "adapters" / "tuned" / "embedded_dora.yaml").write_text("# @package _global_\nfinetune:\n  rate: 0.0123\n")
    monkeypatch.setattr(options, "conf_dir", lambda: conf)
    for more, rate in ([], 0.0123), (["diffusion=sd15"], 1e-4):
        assert config.load("personalize", ["image=none", "adapter=dora", *more]).finetune.rate == rate
        assert config.load("evaluate", more).fit("dora").rate == rate


def test_bases_differ_in_what_is_written():
    """A change of a recipe shows here; `python tests/test_configs.py` writes the file anew."""
    assert differences() == DIFFERENCES.read_text()


if __name__ == "__main__":
    DIFFERENCES.write_text(differences())
