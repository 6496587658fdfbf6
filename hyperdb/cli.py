"""The command line: `hyperdb STAGE key=value ...`.

Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 the user's input (one line), 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import inspect
import io
import os
import sys
import textwrap
import traceback
import typing
import warnings
from collections.abc import Sequence
from typing import Any

from hyperdb import config, options
from hyperdb.runtime.errors import UserError, first_line
from hyperdb.runtime.files import load_text
from hyperdb.runtime.share import processes
from hyperdb.runtime.stop import Terminated, ending
from hyperdb.runtime.version import __version__

USAGE = """\
usage: hyperdb STAGE [key=value ...]      run a stage
       hyperdb STAGE --help               its settings, their values, the experiments
       hyperdb STAGE [...] --cfg job      print the composed settings, run nothing
       hyperdb STAGE -m seed=0,1          one run for each value, each with a folder of its own below out
       hyperdb STAGE --ray num_shards=64  every shard a task of a Ray cluster
       hyperdb --version

Text is taken as it is written: prompt='a [V] face, on the beach'. A list is written [a,b], an entry with commas in
quotes: "preview_styles=['a sketch, by night',a cartoon of a [V] face]"; after -m that gives a text several values:
"prompt=['a [V] face, smiling','a sketch of a [V] face']".
"""

INDENT = " " * 6
# what the disk or its owner refuses: the user's to mend
THE_DISKS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
}


def overview() -> str:
    """Return the text of `hyperdb --help`."""
    stages = config.available()
    width = max(map(len, stages))
    lines = [f"  {name:{width}}  {summary}" for name, summary in stages.items()]
    return USAGE + "\nstages:\n" + "\n".join(lines)


# --- help of one stage -------------------------------------------------------------------------------


def field_docs(schema: type) -> dict[str, str]:
    """Return what the source says of each field: the string below it, else the comment beside or above it."""
    try:
        source = textwrap.dedent(inspect.getsource(schema))
    except OSError:
        return {}
    lines, docs = source.splitlines(), {}
    definition = ast.parse(source).body[0]
    body = getattr(definition, "body", [])
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        doc = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            doc = str(after.value.value)
        elif node.end_lineno is not None and node.end_col_offset is not None:
            line = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            doc = line.partition("#")[2]
            above = node.lineno - 2
            while not line.strip() and above >= 0 and lines[above].lstrip().startswith("#"):
                doc = lines[above].lstrip(" #") + " " + doc
                above -= 1
        docs[node.target.id] = " ".join(doc.split())
    return docs


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _describe(schema: type, values: Any, prefix: str = "") -> list[str]:
    """Return one line a setting: key, type, value in force, what it means."""
    from omegaconf import DictConfig

    lines = []
    hints = typing.get_type_hints(schema)
    docs: dict[str, str] = {}
    for member in reversed(schema.__mro__[:-1]):
        docs |= {key: doc for key, doc in field_docs(member).items() if doc}
    for key, value in values.items_ex(resolve=False):
        if isinstance(value, DictConfig) and isinstance(value._metadata.object_type, type) and value:
            kind = value._metadata.object_type
            if hasattr(kind, "__dataclass_fields__"):
                lines += _describe(kind, value, f"{prefix}{key}.")
                continue
        if isinstance(value, DictConfig) and hasattr(value._metadata.element_type, "__dataclass_fields__"):
            value = f"{', '.join(map(str, value))}; --cfg job shows them"
        shown = "required" if value == "???" else f"= {'null' if value is None else value!s}"
        head = f"  {prefix}{key}: {_type_name(hints.get(str(key), Any))} {shown}"
        doc = docs.get(str(key), "")
        lines += [head, *textwrap.wrap(doc, 100, initial_indent=INDENT, subsequent_indent=INDENT)]
    return lines


def stage_help(stage: str) -> str:
    """Return the text of `hyperdb STAGE --help`."""
    module = config.stage_module(stage)
    schema, raw = module.Config, config.compose(stage)
    usage = f"usage: hyperdb {stage} [key=value ...]   (`hyperdb --help` says how text and lists are written)"
    parts = [inspect.getdoc(module) or config.STAGES[stage][1], usage]
    settings = _describe(schema, raw)
    if settings:
        doc = inspect.getdoc(schema) or ""
        if doc and not doc.startswith(f"{schema.__name__}("):  # not the one that @dataclass makes up
            parts.append(doc)
        parts.append("settings and their values:\n" + "\n".join(settings))
    choices = [f"  {path}={' | '.join(options.choices(path))}" for path in options.groups(schema)]
    if choices:
        parts.append("groups:\n" + "\n".join(choices))
    experiments = _experiments(schema)
    if experiments:
        parts.append("experiments:\n" + "\n".join(experiments))
    return "\n\n".join(parts)


def _experiments(schema: type) -> list[str]:
    """Return the experiments whose every key is a setting of this stage, with their first comment line."""
    lines = []
    for name in options.choices(options.EXPERIMENT):
        path = options.conf_dir() / options.EXPERIMENT / f"{name}.yaml"
        if options.of_stage(options.experiment(name), schema):
            comments = [line.lstrip("# ") for line in load_text(path).splitlines() if line.startswith("#")]
            said = next((c for c in comments if c and not c.startswith("@package")), "")
            lines.append(f"  {options.EXPERIMENT}={name}  {said}".rstrip())
    return lines


# --- running -----------------------------------------------------------------------------------------


def dispatch(argv: Sequence[str]) -> None:
    """Do what the words ask."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] == "--version":
        print(f"hyperdb {__version__}")
        return
    stage, *words = argv
    if stage.startswith("-"):
        raise UserError(f"unknown option {stage}; `hyperdb --help` shows the usage")
    config.stage_module(stage)  # an unknown stage is said before anything else
    if {"-h", "--help"} & set(words):
        print(stage_help(stage))
        return
    words, show = _take_cfg(words)
    many, shards = {"-m", "--multirun"} & set(words), {"--ray"} & set(words)
    words = [word for word in words if word not in many | shards]
    if show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config.compose(stage, words)), end="")
    elif many and shards:
        raise UserError("-m and --ray both divide the work; choose one of them")
    elif shards:
        from hyperdb import cluster

        cluster.run(stage, words)
    elif many:
        config.sweep(stage, words)
    else:
        config.run(stage, words)


def _take_cfg(words: list[str]) -> tuple[list[str], bool]:
    """Take `--cfg job` or `--cfg=job` out of the words."""
    rest, show = [], False
    for word in words:
        if word in ("--cfg", "--cfg=job", "-c"):
            show = True
        elif not (show and word == "job"):
            rest.append(word)
    return rest, show


def _after_interruption(argv: Sequence[str]) -> str:
    """Say what the same command would do after the stage was interrupted."""
    module = config.stage_module(argv[0]) if argv and argv[0] in config.available() else None
    kept = getattr(module, "KEPT", None)
    return f"run the same command to continue ({kept})" if kept else "the same command begins again"


def _without_memory(argv: Sequence[str]) -> str:
    """Say what a stage may be given that needs less memory of the card."""
    known = {field.name for field in dataclasses.fields(config.stage_module(argv[0]).Config)}
    ways = {"batch": "a smaller batch", "diffusion": "diffusion.checkpointing=true"}
    less = [way for name, way in ways.items() if name in known]
    told = ["the card has too little memory"]
    told += ["the same command with dry_run=true says how much is needed"] if "dry_run" in known else []
    told += [f"{' or '.join(less)} needs less"] if less else []
    return "; ".join(told)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"hyperdb: warning: {message}\n"  # one line, no source path
    argv = sys.argv[1:] if argv is None else argv
    try:
        with ending():
            dispatch(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"hyperdb: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if processes()[0] == 0:
            print(f"\n{'terminated' if terminated else 'interrupted'}; {_after_interruption(argv)}", file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError:
        # the reader (head, less) went away; keep the interpreter's last flush from complaining
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in THE_DISKS:
            traceback.print_exc()
            return 1
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"hyperdb: error: {where}{error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:
        kind = type(error)
        if kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"):  # which is not imported here
            print(f"hyperdb: error: {_without_memory(argv)} ({first_line(error)})", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    return 0
