"""The table of stages, and how `key=value` words become a stage's `Config`.

A stage is a module with a dataclass `Config` and `run(config) -> Path | None`; one with the setting `dry_run` has
`passes(config, sketch)` too, which measures what it would load (`hyperdb.tuning.memory`). A setting's value stands in
one place. What holds for every base is the default of its dataclass. What belongs to a base stands in that base's yaml
of a group (`conf/finetune/sd15.yaml`) or of the stage (`conf/train_hypernet/sd15.yaml`), all chosen by
`diffusion=sd15`; its dataclass has no default. Hydra composes, the dataclasses check.

Nothing heavy is imported here: Hydra inside the functions, a stage's module when that stage is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hyperdb import options
from hyperdb.runtime import output
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.lock import writing_into
from hyperdb.runtime.paths import expand, is_path
from hyperdb.runtime.share import Share, processes
from hyperdb.words import check_word, escaped, parsed, quoted, swept, unknown

STAGES: dict[str, tuple[str, str]] = {
    "doctor": ("hyperdb.stages.doctor", "what is installed, which device and models are at hand, what to do"),
    "demo": ("hyperdb.stages.demo", "personalise a rendered person and a real photo, show the pictures"),
    "web": ("hyperdb.web", "a page in the browser to try all this"),
    "personalize": ("hyperdb.stages.personalize", "one photo -> a small adapter that knows this face"),
    "generate": ("hyperdb.stages.generate", "an adapter and a prompt -> images"),
    "edit": ("hyperdb.stages.edit", "shift a person's attributes, mix people -> an adapter"),
    "merge": ("hyperdb.stages.merge", "several people of Custom Diffusion -> one adapter"),
    "cutmix": ("hyperdb.stages.cutmix", "photos of two people -> one adapter that draws them side by side"),
    "transfer": ("hyperdb.stages.transfer", "an adapter -> one for another version of its base"),
    "export": ("hyperdb.stages.export", "an adapter -> a LoRA file for ComfyUI, A1111, diffusers, PEFT"),
    "import": ("hyperdb.stages.import_", "a LoRA file of those tools -> an adapter"),
    "preprocess": ("hyperdb.stages.preprocess", "raw photos -> aligned faces and a manifest"),
    "render_heads": ("hyperdb.stages.render_heads", "procedural people -> images, captions, labels"),
    "train_autoencoder": ("hyperdb.stages.train_autoencoder", "the embedded base's autoencoder"),
    "train_base": ("hyperdb.stages.train_base", "the embedded base's text encoder and UNet"),
    "train_encoder": ("hyperdb.stages.train_encoder", "the hypernetwork's image encoder, on rendered people"),
    "train_judge": ("hyperdb.stages.train_judge", "judges of pictures: style and place, CLIP, VICReg, a verifier"),
    "train_xadapter": ("hyperdb.stages.train_xadapter", "an old base with its adapters steers a new one"),
    "precompute": ("hyperdb.stages.precompute", "faces -> their LiDB weights, the hypernetwork's targets"),
    "train_hypernet": ("hyperdb.stages.train_hypernet", "the hypernetwork: one photo -> LiDB weights"),
    "train_e4t": ("hyperdb.stages.train_e4t", "E4T's encoder: one photo -> where its training begins"),
    "weights": ("hyperdb.stages.weights", "many people's adapters: components, attributes, new people"),
    "evaluate": ("hyperdb.stages.evaluate", "measure likeness on unseen people -> results/NAME.json"),
    "report": ("hyperdb.stages.report", "results of evaluate -> tables and figures"),
    "status": ("hyperdb.stages.status", "how far runs are: done, running, failed, missing"),
}


# --- stages ------------------------------------------------------------------------------------------


def available() -> dict[str, str]:
    """Return name -> summary of the stages whose module exists; imports none of them."""
    return {name: text for name, (module, text) in STAGES.items() if importlib.util.find_spec(module)}


def stage_module(name: str) -> types.ModuleType:
    """Import the module of one stage."""
    if name not in available():
        hint = options.closest(name, available()) or "; `hyperdb --help` lists them"
        raise UserError(f"no stage {name!r}{hint}")
    return importlib.import_module(STAGES[name][0])


# --- composition -------------------------------------------------------------------------------------


def register(stage: str, schema: type) -> None:
    """Make the dataclasses known to Hydra.

    `STAGE_schema` for the stage; in each group `schema` for the field's own type and `NAME_schema` for each
    subclass `NAMEConfig` of it (so `conf/adapter/lora.yaml` begins with `defaults: [lora_schema]`).
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=f"{stage}_schema", node=schema)
    for path, kind in options.groups(schema).items():
        for member in options.family(kind):
            name = "schema" if member is kind else f"{member.__name__.removesuffix('Config').lower()}_schema"
            store.store(group=options.folder(path), name=name, node=member)


def compose(stage: str, words: Sequence[str] = ()) -> Any:
    """Return a stage's composed configuration (an OmegaConf node) from its yaml and `key=value` words."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    schema = stage_module(stage).Config
    for word in words:
        check_word(stage, schema, word)
    register(stage, schema)
    overrides = [quoted(schema, word) for word in words]
    try:
        with initialize_config_dir(str(options.conf_dir().resolve()), version_base="1.3"):
            return hydra_compose(stage, overrides)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
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
    for key, hint in options.settings(schema, annotated=True):
        value, kind = OmegaConf.select(raw, key), options.without_none(hint)[0]
        listed = isinstance(value, ListConfig)
        for one in value if listed else [value]:
            if is_path(hint) and isinstance(one, str) and not one.strip() and getattr(schema, key, None) != one:
                raise UserError(f"{key} is empty: expected a file or a folder")
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"{key}={one}: expected a finite number")
            if isinstance(one, ListConfig) and (typing.get_args(kind) or (None,))[0] in options.SCALARS:
                raise UserError(f"{key}={value}: expected a list of numbers; several lists are a sweep, with -m")


def _expand(raw: Any) -> None:
    """Put the home folder for `~` in every setting that is a path."""
    from omegaconf import ListConfig, OmegaConf

    for key, hint in options.settings(raw._metadata.object_type, annotated=True):
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
    """Run a stage from `key=value` words. Raises `UserError` if they name an experiment that is a sweep."""
    settings = load(stage, words)
    for key, values in _swept(words).items():
        raise UserError(f"the experiment is a sweep of {key}={values}; add -m, or set {key} to one of them")
    return execute(stage, settings)


def _swept(words: Sequence[str]) -> dict[str, str]:
    """Return {setting: values} that the experiment among the words sweeps over, but for those that the words set."""
    named = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}
    name = named.get(options.EXPERIMENT)
    written = options.experiment(name) if name in options.choices(options.EXPERIMENT) else {}
    return {key: values for key, values in options.swept(written).items() if key not in named}


def execute(stage: str, settings: Any) -> Path | None:
    """Run a stage, whose `out` is looked at first and kept from other runs meanwhile.

    Of several processes of one run the first does so, or each for its share; stages that know of neither are refused.
    With `dry_run` only say what the stage would load, and how much memory it would take.
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
    number, of = settings.share() if isinstance(settings, Share) else (0, 1)
    process, count = processes()
    if of == 1 and count > 1 and not getattr(module, "TOGETHER", False):
        raise UserError(f"{stage} is a work of one process, and {count} were launched; start it without a launcher")
    if of == 1 and process > 0:
        return module.run(settings)
    with writing_into(out, f"{number}of{of}" if of > 1 else ""):
        try:
            return module.run(settings)
        except UserError:
            if of == 1:
                output.release(out)
            raise


def sweep(stage: str, words: Sequence[str]) -> None:
    """Run a stage once for every combination of values, through Hydra's launcher.

    Several values are written `seed=0,1`, of text `prompt=['a','b']`, or stand in the yaml of an experiment, under
    `hydra.sweeper.params`. Every job writes into a folder of its own, below `out`, called after its values; jobs that
    differ in their `shard` share one. A launcher plugin sends the jobs to a cluster: `hydra/launcher=submitit_slurm`.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = stage_module(stage).Config
    swept_over = _swept(words)
    words = [*words, *(f"{key}={values}" for key, values in swept_over.items())]
    for word in words:
        check_word(stage, schema, word, sweep=True)
    register(stage, schema)
    words = [swept(schema, word) for word in words]
    named = {word.partition("=")[0].lstrip("+") for word in words}
    # what is the same in all jobs, or is in `out` by itself
    readings = {word.partition("=")[0]: parsed(word) for word in words}
    apart = {key for key, override in readings.items() if override is None or not override.is_sweep_override()}
    apart |= {"out"} if "out" in named else {"name"}
    apart |= {"shard"} if issubclass(schema, Share) else set()

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
    if swept_over:
        quiet["hydra.sweeper.params"] = "null"  # they are among the words
    defaults = [f"{key}={value}" for key, value in quiet.items() if key not in named]
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["hyperdb", "--multirun", *defaults, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed and turned into exit(1)
    try:
        hydra.main(version_base="1.3", config_path=str(options.conf_dir().resolve()), config_name=stage)(task)()
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
            override = parsed(word)
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
        return file + unknown(stage, schema, key)
    if key:
        return f"{file}{key}: {str(root).strip().splitlines()[0]}"
    return " ".join(str(error).split())
