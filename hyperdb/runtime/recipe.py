"""Which settings decide a result: one rule for going on with a training and for what a run may replace."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hyperdb.runtime.paths import is_path
from hyperdb.runtime.share import Share

# Where a run is, how it is called, watched, shown, saved and computed: none of these changes what comes out. Neither
# does a path, a variant or a revision, for what it leads to counts by its content.
AROUND = frozenset(
    {
        "attention",
        "checkpointing",
        "device",
        "dry_run",
        "name",
        "out",
        "preview",
        "private",
        "push_to_hub",
        "old_variant",
        "revision",
        "save_every",
        "to_revision",
        "to_variant",
        "tracker",
        "upload",
        "validate_every",
        "validation_people",
        "variant",
        "workers",
    }
)


def recipe(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration that decide its result, nested as they are.

    Paths are left out: the caller adds digests of what they lead to.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    # who does which part; `shard` of another stage is how many people are in a file
    divided = {field.name for field in dataclasses.fields(Share)} if isinstance(config, Share) else set()
    left_out = AROUND | divided
    if not hasattr(config, "out"):
        left_out -= {"name"}  # not a run's but a network's
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in left_out or is_path(hints[field.name]):
            continue
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        found[field.name] = recipe(value) if nested else value
    return found


def only_set(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that are null or empty, so that a later version's new one changes no digest."""
    kept = {key: only_set(value) if isinstance(value, Mapping) else value for key, value in found.items()}
    return {key: value for key, value in kept.items() if value not in (None, [], {})}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of what counts now and was otherwise then; both are compared as JSON has them."""
    return sorted(_differ(plain(then), plain(now)))


def plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _differ(then: Any, now: Any, prefix: str = "") -> Iterator[str]:
    for key in now:
        here, there = now[key], then.get(key)  # a setting that there was not was not set
        if isinstance(here, dict) and isinstance(there, dict):
            yield from _differ(there, here, f"{prefix}{key}.")
        elif here != there:
            yield prefix + key
