"""What can be set: the tree of settings under a dataclass, and the groups of yamls in `conf/`.

A field that holds a dataclass and has a folder of its name under `conf/` is a *group*: `diffusion=sd15` picks
`conf/diffusion/sd15.yaml`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hyperdb.runtime.errors import UserError

TEXT = (str, Path)
SCALARS = (int, float, bool)
FOLDERS = {"adapter": "adapters"}  # `adapter=FILE` of other stages would be a choice of the group to Hydra
EXPERIMENT = "experiment"  # the group of named overrides; every stage's yaml ends with `experiment: null`


def conf_dir() -> Path:
    """Return the folder of yaml files: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def folder(group: str) -> str:
    """Return the folder of a group, of the same name but for `FOLDERS`."""
    return FOLDERS.get(group, group)


def choices(group: str) -> list[str]:
    """Return the names that can be chosen in a group; experiments may stand in folders: `ablation/rank`."""
    root = conf_dir() / folder(group)
    found = root.rglob("*.yaml") if group == EXPERIMENT else root.glob("*.yaml")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in found)


def experiment(name: str) -> dict[str, Any]:
    """Return the yaml of an experiment as it is written. Raises `UserError` for one that is no yaml of settings."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = conf_dir() / EXPERIMENT / f"{name}.yaml"
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as yaml ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path} does not hold settings, a name: and a value each")
    return typing.cast(dict[str, Any], found)


def swept(written: Mapping[str, Any]) -> dict[str, str]:
    """Return {setting: its values} that the yaml of an experiment sweeps over, under `hydra.sweeper.params`."""
    inner: Any = written
    for key in ("hydra", "sweeper", "params"):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return {str(key): str(values) for key, values in inner.items()} if isinstance(inner, Mapping) else {}


def of_stage(written: Mapping[str, Any], schema: type) -> bool:
    """Whether everything that the yaml of an experiment sets or sweeps over is a setting of a stage."""
    try:
        for key in {*written, *swept(written)} - {"defaults", "hydra"}:
            type_of(schema, key)
    except KeyError:
        return False
    return True


def closest(word: str, words: typing.Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the most similar word, else nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def without_none(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); anything else is (kind, False)."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(rest) < len(typing.get_args(kind)):
            return (rest[0] if len(rest) == 1 else typing.Union[tuple(rest)]), True  # noqa: UP007 (dynamic)
    return kind, False


def family(schema: type) -> list[type]:
    """Return a dataclass and every subclass of it: the types that a group's options may have."""
    members = [schema]
    subclass: type
    for subclass in schema.__subclasses__():
        members += family(subclass)
    return members


def settings(schema: type, prefix: str = "", annotated: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every setting under a dataclass, branches before their leaves.

    `annotated` keeps `FilePath` apart from other text.
    """
    seen = set()
    for kind in family(schema):
        hints = typing.get_type_hints(kind, include_extras=annotated)
        for field in dataclasses.fields(kind):
            if field.name in seen:
                continue
            seen.add(field.name)
            key, hint = prefix + field.name, hints[field.name]
            yield key, hint
            inner = without_none(hint)[0]
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from settings(inner, key + ".", annotated)


def groups(schema: type) -> dict[str, type]:
    """Return path -> dataclass of the settings that have a folder in `conf/`."""
    found = {}
    for key, hint in settings(schema):
        kind, path = without_none(hint)[0], key.replace(".", "/")
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and (conf_dir() / folder(path)).is_dir():
            found[path] = kind
    return found


def type_of(schema: type, key: str) -> Any:
    """Return the type of a dotted key; raises KeyError if there is no such setting."""
    known = dict(settings(schema))
    if key in known:
        return known[key]
    parent, _, _ = key.rpartition(".")
    kind = without_none(type_of(schema, parent))[0] if parent else None
    if typing.get_origin(kind) in (dict, list):  # an entry of a dict[str, X] or list[X]
        return typing.get_args(kind)[-1]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and key not in known:  # inside such an entry
        return dict(settings(kind, f"{parent}."))[key]
    if kind in (Any, dict, list):
        return Any
    raise KeyError(key)
