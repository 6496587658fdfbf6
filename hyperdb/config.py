"""The table of stages, and how `key=value` words become a stage's `Config`.

A stage is a module with a dataclass `Config` and `run(config) -> Path | None`; one with the setting `dry_run` has
`passes(config, sketch)` too, which measures what it would load (`hyperdb.tuning.memory`). Its values stand in
`conf/STAGE.yaml`; a field that holds a dataclass and has a folder of its name under `conf/` is a *group*
(`diffusion=sd15` picks `conf/diffusion/sd15.yaml`). Hydra composes, the dataclasses check.

Nothing heavy is imported here: Hydra inside the functions, a stage's module when that stage is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hyperdb.runtime import output
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import expand, is_path
from hyperdb.words import Entry, entries, escaped, literal

STAGES: dict[str, tuple[str, str]] = {
    "doctor": ("hyperdb.stages.doctor", "what is installed, which device and models are at hand, what to do"),
    "demo": ("hyperdb.stages.demo", "personalise a rendered person and a real photo, show the pictures"),
    "personalize": ("hyperdb.stages.personalize", "one photo -> a small adapter that knows this face"),
    "generate": ("hyperdb.stages.generate", "an adapter and a prompt -> images"),
    "edit": ("hyperdb.stages.edit", "shift a person's attributes, mix people -> an adapter"),
    "export": ("hyperdb.stages.export", "an adapter -> a LoRA file for ComfyUI, A1111, diffusers, PEFT"),
    "import": ("hyperdb.stages.import_", "a LoRA file of those tools -> an adapter"),
    "preprocess": ("hyperdb.stages.preprocess", "raw photos -> aligned faces and a manifest"),
    "render_heads": ("hyperdb.stages.render_heads", "procedural people -> images, captions, labels"),
    "train_autoencoder": ("hyperdb.stages.train_autoencoder", "the embedded base's autoencoder"),
    "train_base": ("hyperdb.stages.train_base", "the embedded base's text encoder and UNet"),
    "train_encoder": ("hyperdb.stages.train_encoder", "the hypernetwork's image encoder, on rendered people"),
    "train_judge": ("hyperdb.stages.train_judge", "a classifier of style and place, to measure obedience with"),
    "precompute": ("hyperdb.stages.precompute", "faces -> their LiDB weights, the hypernetwork's targets"),
    "train_hypernet": ("hyperdb.stages.train_hypernet", "the hypernetwork: one photo -> LiDB weights"),
    "weights": ("hyperdb.stages.weights", "many people's adapters: components, attributes, new people"),
    "evaluate": ("hyperdb.stages.evaluate", "measure likeness on unseen people -> results/NAME.json"),
}

TEXT = (str, Path)
SCALARS = (int, float, bool)
EXPERIMENT = "experiment"  # the group of named overrides; every stage's yaml ends with `experiment: null`


# --- stages ------------------------------------------------------------------------------------------


def available() -> dict[str, str]:
    """Return name -> summary of the stages whose module exists; imports none of them."""
    return {name: text for name, (module, text) in STAGES.items() if importlib.util.find_spec(module)}


def stage_module(name: str) -> types.ModuleType:
    """Import the module of one stage."""
    if name not in available():
        hint = closest(name, available()) or "; `hyperdb --help` lists them"
        raise UserError(f"no stage {name!r}{hint}")
    return importlib.import_module(STAGES[name][0])


def conf_dir() -> Path:
    """Return the folder of yaml files: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """Return the names that can be chosen in a group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def closest(word: str, words: typing.Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the most similar word, else nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


# --- the tree of settings ----------------------------------------------------------------------------


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); anything else is (kind, False)."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(rest) < len(typing.get_args(kind)):
            return (rest[0] if len(rest) == 1 else typing.Union[tuple(rest)]), True  # noqa: UP007 (dynamic)
    return kind, False


def _family(schema: type) -> list[type]:
    """Return a dataclass and every subclass of it: the types that a group's options may have."""
    members = [schema]
    subclass: type
    for subclass in schema.__subclasses__():
        members += _family(subclass)
    return members


def settings(schema: type, prefix: str = "", annotated: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every setting under a dataclass, branches before their leaves.

    `annotated` keeps `FilePath` apart from other text.
    """
    seen = set()
    for kind in _family(schema):
        hints = typing.get_type_hints(kind, include_extras=annotated)
        for field in dataclasses.fields(kind):
            if field.name in seen:
                continue
            seen.add(field.name)
            key, hint = prefix + field.name, hints[field.name]
            yield key, hint
            inner = _without_none(hint)[0]
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from settings(inner, key + ".", annotated)


def groups(schema: type) -> dict[str, type]:
    """Return path -> dataclass of the settings that have a folder of their name in `conf/`."""
    found = {}
    for key, hint in settings(schema):
        kind, path = _without_none(hint)[0], key.replace(".", "/")
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and (conf_dir() / path).is_dir():
            found[path] = kind
    return found


def _type_of(schema: type, key: str) -> Any:
    """Return the type of a dotted key; raises KeyError if there is no such setting."""
    known = dict(settings(schema))
    if key in known:
        return known[key]
    parent, _, _ = key.rpartition(".")
    kind = _without_none(_type_of(schema, parent))[0] if parent else None
    if typing.get_origin(kind) in (dict, list):  # an entry of a dict[str, X] or list[X]
        return typing.get_args(kind)[-1]
    if kind in (Any, dict, list):
        return Any
    raise KeyError(key)


# --- words of the command line -----------------------------------------------------------------------


def _parsed(word: str) -> Any:
    """Return Hydra's reading of a word, or None if its grammar refuses it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def quoted(schema: type, word: str) -> str:
    """Quote the value of `key=value` if that setting is text, so that it means what it says.

    `str` and `Path` take everything literally; with `| None` the word null is None. `list[str]` takes what is written
    as a list (`hyperdb.words.entries`), and anything else as its only element. Other types keep Hydra's grammar.
    """
    key, _, value = word.partition("=")
    kind, optional = _kind(schema, key)
    if kind is None or (optional and value == "null"):
        return word
    if kind in TEXT:
        return f"{key}={literal(value)}"
    if _of_text(kind):
        return f"{key}={_text_list(key, value)}"
    override = _parsed(word)
    if override is None:
        raise UserError(f"{key}: cannot read the value {value!r}")
    if override.is_sweep_override():
        as_list = f"; a list is written {key}=[{value}]" if typing.get_origin(kind) is list else ""
        raise UserError(f"{key}: {value!r} is several values; add -m to run one after the other{as_list}")
    return word


def swept(schema: type, word: str) -> str:
    """Quote the value of `key=value` for a sweep: text is literal there too, and a list of it is several values.

    A list of a setting that is a list is several values if all its entries are lists. Other types keep Hydra's
    grammar, in which commas separate values, and may be written as a list as well.
    """
    key, _, value = word.partition("=")
    kind, optional = _kind(schema, key)
    listed = _entries(key, value)
    if listed is None or not (kind in TEXT or kind in SCALARS or typing.get_origin(kind) is list):
        return quoted(schema, word) if kind in TEXT or _of_text(kind) else word
    if typing.get_origin(kind) is list:
        several = bool(listed) and all(not one.quoted and entries(one.text) is not None for one in listed)
        lists = [one.text for one in listed] if several else [value]
        choices = [_text_list(key, one) for one in lists] if _of_text(kind) else lists
    elif len(listed) == 1 and not listed[0].quoted:  # `[V]`
        choices = [literal(value) if kind in TEXT else listed[0].text]
    else:
        bare = [not one.quoted and (kind in SCALARS or (optional and one.text == "null")) for one in listed]
        choices = [one.text if as_is else literal(one.text) for one, as_is in zip(listed, bare, strict=True)]
    return f"{key}={','.join(choices)}"


def _kind(schema: type, key: str) -> tuple[Any, bool]:
    """Return a setting's type and whether it may be null; (None, False) for a group's or Hydra's own."""
    try:
        return _without_none(_type_of(schema, key.lstrip("+")))
    except KeyError:
        return None, False


def _of_text(kind: Any) -> bool:
    return typing.get_origin(kind) is list and typing.get_args(kind)[0] in TEXT


def _entries(key: str, value: str) -> list[Entry] | None:
    try:
        return entries(value)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _text_list(key: str, value: str) -> str:
    """Return Hydra's writing of a list of text."""
    listed = _entries(key, value)
    texts = [value] if listed is None else [one.text for one in listed]
    return f"[{','.join(map(literal, texts))}]"


def check_word(stage: str, schema: type, word: str, sweep: bool = False) -> None:
    """Raise `UserError` for a word that is not `key=value` of this stage."""
    key, equals, value = word.partition("=")
    if not equals or not key or word[0] in "-~":
        raise UserError(f"{word!r} is not key=value; `hyperdb {stage} --help` lists the settings")
    key = key.lstrip("+")
    if re.match(r"hydra[./]", key):
        if not sweep:
            raise UserError(f"{key} concerns sweeps only; add -m")
        return
    branches = groups(schema)
    if key == EXPERIMENT or key in branches:
        names = options(key)
        optional = key == EXPERIMENT or _without_none(_type_of(schema, key.replace("/", ".")))[1]
        other = (value == "null" and optional) or value[:1] in ("[", "{")  # left to Hydra's grammar
        if not (sweep or other or value in names):
            listed = ", ".join(names) or "none"
            raise UserError(f"no {key} {value!r}{closest(value, names)}; there is: {listed}")
        return
    try:
        _type_of(schema, key)
    except KeyError:
        raise UserError(_unknown(stage, schema, key)) from None
    # names of files may be of any bytes; text goes into headers and tokenizers
    if re.search(r"[\ud800-\udfff]", value) and not is_path(dict(settings(schema, annotated=True)).get(key)):
        raise UserError(f"{key} has characters that are not UTF-8 text; type it again")


def _unknown(stage: str, schema: type, key: str) -> str:
    names = [name for name, _ in settings(schema) if name != key] + [EXPERIMENT]
    hint = closest(key, names)
    if not hint:  # the right name without its branch: `path` for `diffusion.path`
        same = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"; did you mean {same[0]!r}?" if same else ""
    return f"{stage} has no setting {key!r}{hint or f'; `hyperdb {stage} --help` lists them'}"


# --- composition -------------------------------------------------------------------------------------


def register(stage: str, schema: type) -> None:
    """Make the dataclasses known to Hydra.

    `STAGE_schema` for the stage; in each group `schema` for the field's own type and `NAME_schema` for each
    subclass `NAMEConfig` of it (so `conf/adapter/lora.yaml` begins with `defaults: [lora_schema]`).
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import MISSING, OmegaConf

    store = ConfigStore.instance()
    node = OmegaConf.structured(schema)
    for path, kind in groups(schema).items():
        if len(_family(kind)) > 1:  # which of them, the defaults list says: the default's type would refuse the others
            OmegaConf.update(node, path.replace("/", "."), MISSING)
    store.store(name=f"{stage}_schema", node=node)
    for path, kind in groups(schema).items():
        for member in _family(kind):
            name = "schema" if member is kind else f"{member.__name__.removesuffix('Config').lower()}_schema"
            store.store(group=path, name=name, node=member)


def compose(stage: str, words: Sequence[str] = ()) -> Any:
    """Return a stage's composed configuration (an OmegaConf node) from its yaml and `key=value` words."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    schema = stage_module(stage).Config
    for word in words:
        check_word(stage, schema, word)
    register(stage, schema)
    overrides = [quoted(schema, word) for word in words]
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            return hydra_compose(stage, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(stage, schema, error)) from error


def build(stage: str, raw: Any) -> Any:
    """Turn a composed configuration into the stage's `Config`; a ValueError of its checks is the user's."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        if not OmegaConf.missing_keys(raw):  # said first
            _check_values(raw)
        _expand(raw)
        return OmegaConf.to_object(raw)
    except MissingMandatoryValue as error:
        raise UserError(f"{stage} needs {error.full_key}=...; see `hyperdb {stage} --help`") from error
    except OmegaConfBaseException as error:
        raise UserError(_explain(stage, type(raw), error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_values(raw: Any) -> None:
    """Raise `UserError` for what no setting can mean: no path at all, a number that is none, a list in a list."""
    from omegaconf import ListConfig, OmegaConf

    schema = raw._metadata.object_type
    for key, hint in settings(schema, annotated=True):
        value, kind = OmegaConf.select(raw, key), _without_none(hint)[0]
        listed = isinstance(value, ListConfig)
        for one in value if listed else [value]:
            if is_path(hint) and isinstance(one, str) and not one.strip() and getattr(schema, key, None) != one:
                raise UserError(f"{key} is empty: expected a file or a folder")
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"{key}={one}: expected a finite number")
            if isinstance(one, ListConfig) and (typing.get_args(kind) or (None,))[0] in SCALARS:
                raise UserError(f"{key}={value}: expected a list of numbers; several lists are a sweep, with -m")


def _expand(raw: Any) -> None:
    """Put the home folder for `~` in every setting that is a path."""
    from omegaconf import ListConfig, OmegaConf

    for key, hint in settings(raw._metadata.object_type, annotated=True):
        if is_path(hint):
            value = OmegaConf.select(raw, key)
            if isinstance(value, ListConfig):
                for i, one in enumerate(value):
                    value[i] = escaped(expand(one))
            elif value is not None and (expanded := expand(value)) != value:
                OmegaConf.update(raw, key, escaped(expanded))


def load(stage: str, words: Sequence[str] = ()) -> Any:
    """Return a stage's `Config` from `key=value` words, as the command line would build it."""
    return build(stage, compose(stage, words))


def run(stage: str, words: Sequence[str] = ()) -> Path | None:
    """Run a stage from `key=value` words."""
    return execute(stage, load(stage, words))


def execute(stage: str, settings: Any) -> Path | None:
    """Run a stage, whose `out` is looked at first.

    With `dry_run` only say what it would load, and how much memory it would take.
    """
    module = stage_module(stage)
    if getattr(settings, "dry_run", False):
        from hyperdb.tuning.memory import report

        report(stage, module.passes, settings)
        return None
    out = getattr(settings, "out", None)
    if out is None:
        return module.run(settings)
    output.check(out, getattr(module, "WRITES", ()))
    try:
        return module.run(settings)
    except UserError:
        output.release(out)
        raise


def sweep(stage: str, words: Sequence[str]) -> None:
    """Run a stage once for every combination of values, through Hydra's launcher.

    Several values are written `seed=0,1`, of text `prompt=['a','b']`. Every job writes into a folder of its own, below
    `out`, called after its values. A launcher plugin sends the jobs to a cluster: `hydra/launcher=submitit_slurm`.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = stage_module(stage).Config
    for word in words:
        check_word(stage, schema, word, sweep=True)
    register(stage, schema)
    words = [swept(schema, word) for word in words]
    named = {word.partition("=")[0].lstrip("+") for word in words}
    # what is the same in all jobs, or is in `out` by itself
    parsed = {word.partition("=")[0]: _parsed(word) for word in words}
    apart = {key for key, override in parsed.items() if override is None or not override.is_sweep_override()}
    apart |= {"out"} if "out" in named else {"name"}

    def task(raw: Any) -> str | None:
        if "out" in raw and (job := job_name(apart)):
            OmegaConf.update(raw, "out", escaped(f"{raw.out}/{job}"))
        result = execute(stage, build(stage, raw))
        return None if result is None else str(result)

    quiet = {  # stages make their own folders; only the sweep's own record is kept
        "hydra.output_subdir": "null",
        "hydra.run.dir": ".",
        "hydra.sweep.dir": f"multirun/{stage}",
        "hydra.sweep.subdir": ".",
        "hydra/job_logging": "none",
    }
    defaults = [f"{key}={value}" for key, value in quiet.items() if key not in named]
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["hyperdb", "--multirun", *defaults, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed and turned into exit(1)
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name=stage)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(stage, schema, error)) from error
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def job_name(apart: Collection[str]) -> str:
    """Return a folder's name for the running job of a sweep: its values, but those of the settings in `apart`."""
    from hydra.core.hydra_config import HydraConfig

    parts = []
    for word in HydraConfig.get().overrides.task:
        key, _, value = word.partition("=")
        if key not in apart:
            override = _parsed(word)
            parts.append(f"{key.lstrip('+')}={value if override is None else override.value()}")
    text = "+".join(parts)  # a comma would separate the entries of a list
    names = [re.sub(r"[^\w.=-]+", "_", part) for part in parts]
    short = "+".join(names)[:60]
    if short == text:
        return short
    # what was left out tells jobs apart as well
    return f"{short}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _explain(stage: str, schema: type, error: BaseException) -> str:
    """Say in one line what Hydra or OmegaConf found wrong, and in which file."""
    from hydra.errors import HydraException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    file, root = "", error
    inner: BaseException | None = error
    while isinstance(inner, HydraException | OmegaConfBaseException):
        root = inner if getattr(inner, "full_key", None) else root
        found = re.match(r"In '([^']+)'", str(inner))
        file = f"conf/{found[1]}.yaml: " if found and found[1] != stage else file
        inner = inner.__cause__ or inner.__context__
    key = getattr(root, "full_key", None)
    if key and isinstance(root, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(schema):
        return file + _unknown(stage, schema, key)
    if key:
        return f"{file}{key}: {str(root).strip().splitlines()[0]}"
    return " ".join(str(error).split())
