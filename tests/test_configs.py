"""Every yaml in conf/ composes to its dataclass, says what it is, and names only stages that exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from hyperdb import config

CONF = config.conf_dir()
STAGES = list(config.available())
EXPERIMENTS = config.options(config.EXPERIMENT)


def of_stage(raw: dict, stage: str) -> bool:
    """Whether every key of an experiment is a setting of this stage."""
    known = {key for key, _ in config.settings(config.stage_module(stage).Config)}
    return set(raw) - {"defaults"} <= known


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
    for group in config.groups(config.stage_module(stage).Config):
        assert config.options(group), f"conf/{group} has no yaml"
        for name in config.options(group):
            raw = config.compose(stage, [f"{group}={name}"])
            node = raw
            for part in group.split("/"):
                node = node[part]
            assert dataclasses.is_dataclass(node._metadata.object_type), f"{group}/{name}.yaml lacks a schema"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_accepted_by_a_stage(name):
    path = CONF / "experiment" / f"{name}.yaml"
    given = yaml.safe_load(path.read_text()) or {}
    stages = [stage for stage in STAGES if of_stage(given, stage)]
    assert stages, f"{path.name} has a key that no stage knows"
    composed = 0
    for stage in stages:
        try:
            raw = config.compose(stage, [f"experiment={name}"])
            missing = [f"{key}=x" for key, value in raw.items_ex(resolve=False) if value == "???"]
            config.load(stage, [f"experiment={name}", *missing])
            composed += 1
        except config.UserError as error:  # another stage of the same keys without one of its groups
            last = error
    assert composed, last


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.relative_to(CONF).as_posix())
def test_yaml_begins_with_what_it_is(path: Path):
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ")


def test_no_yaml_without_a_stage():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(STAGES)
