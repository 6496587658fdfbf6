"""What decides a result: the settings of every stage that count, and those that do not."""

from __future__ import annotations

import dataclasses

import pytest

from hyperdb import config, options
from hyperdb.runtime.paths import is_path
from hyperdb.runtime.recipe import AROUND, differences, only_set, recipe


def test_what_is_around_a_training_does_not_count():
    one = config.load("train_hypernet")
    more = {"name": "b", "out": "b", "save_every": 7, "validate_every": 7, "validation_people": 3, "dry_run": True}
    more |= {"data": "elsewhere", "validation": None, "init": "x", "weights": "x", "validation_weights": "x"}
    other = dataclasses.replace(one)
    for name, value in {**more, "tracker": "wandb"}.items():
        setattr(other, name, value)
    device = {"device": "cuda", "attention": "eager", "checkpointing": True, "path": "moved"}
    other.diffusion = dataclasses.replace(one.diffusion, **device)
    assert recipe(one) == recipe(other)


@pytest.mark.parametrize("changed", [{"rate": 1.0}, {"seed": 1}, {"steps": 9}, {"batch": 3}, {"alpha": 2.0}])
def test_what_counts(changed):
    one = config.load("train_hypernet")
    assert differences(recipe(one), recipe(dataclasses.replace(one, **changed))) == list(changed)
    other = dataclasses.replace(one, diffusion=dataclasses.replace(one.diffusion, size=256))
    assert differences(recipe(one), recipe(other)) == ["diffusion.size"]
    encoder = dataclasses.replace(one.model.encoder, name="resnet18")
    other = dataclasses.replace(one, model=dataclasses.replace(one.model, encoder=encoder))
    assert differences(recipe(one), recipe(other)) == ["model.encoder.name"]


def test_differences_are_those_of_json():
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert differences({"gone": 1}, {}) == []
    assert differences({}, {"new": 1, "unset": None}) == ["new"]
    assert differences({"a": 1}, {"a": {"b": 1}}) == ["a"]


def test_a_setting_that_was_not_set_changes_nothing():
    had = {"diffusion": {"size": 128, "guidance": 0.0}, "changed": ["a"], "seed": 0}
    unset = {"given": None, "styled": [], "group": {"new": None}}
    now = {**had, **unset, "diffusion": {**had["diffusion"], "quantise": None}}
    assert only_set(now) == had == only_set(had)


def test_every_name_that_does_not_count_is_a_setting():
    names = {key.rpartition(".")[2] for stage in config.available()
             for key, _ in options.settings(config.stage_module(stage).Config)}  # fmt: skip
    assert names >= AROUND


def test_every_setting_that_names_a_place_is_a_path():
    """`~` is expanded in them, and they do not count."""
    places = {"adapter", "config", "data", "default_hypernet", "directions", "hypernet", "identity_file", "image",
              "init", "out", "path", "results", "source", "unseen", "vae", "validation", "validation_weights",
              "weights"}  # fmt: skip
    for stage in config.available():
        schema = config.stage_module(stage).Config
        for (key, annotated), (_, plain) in zip(
            options.settings(schema, annotated=True), options.settings(schema), strict=True
        ):
            if key.rpartition(".")[2] in places and not dataclasses.is_dataclass(plain):
                assert is_path(annotated), f"{stage}: {key}"
