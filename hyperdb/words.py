"""How words of the command line are written, and what Hydra is given for them.

Text is taken as it is written and a list is `[a,'b, c']`; other values keep Hydra's grammar. `quoted` and `swept` write
a word so that Hydra reads just that.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from typing import Any, NamedTuple

from hyperdb import options
from hyperdb.options import EXPERIMENT, SCALARS, TEXT, type_of, without_none
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import is_path

CLOSING = {"[": "]", "(": ")", "{": "}"}

# --- text and lists ---------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One entry of a list, as text."""

    text: str
    quoted: bool


def literal(text: str) -> str:
    """Quote a text so that Hydra's and OmegaConf's grammars both give it back unchanged."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=escaped(text), quote=Quote.single).with_quotes()


def escaped(text: str) -> str:
    """Return a text in which OmegaConf sees no interpolation."""
    # `${` would be one; only backslashes right before it need doubling
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)


def entries(word: str) -> list[Entry] | None:
    """Return the entries of `[a, 'b, c', d (1, 2)]`; None for a text that is not written as a list.

    Commas separate entries, but not inside brackets that close or inside quotes around a whole entry; a backslash
    keeps a quote from closing. So `[V] face of [V]` is no list, and an apostrophe is an apostrophe. Raises `UserError`
    for an entry that is empty without quotes.
    """
    if len(word) < 2 or word[0] != "[" or word[-1] != "]":
        return None
    inside, found, i = word[1:-1], [], 0
    while True:
        entry, i = _entry(inside, i)
        if i < len(inside) and inside[i] == "]":  # the first bracket closes before the end
            return None
        found.append(entry)
        if i >= len(inside):
            break
        i += 1
    if found == [Entry("", False)]:
        return []
    if Entry("", False) in found:
        raise UserError(f"{word!r} has an empty entry; write '' for an empty text")
    return found


def _entry(text: str, start: int) -> tuple[Entry, int]:
    """Return the entry that begins at `start`, and where it ends: at a comma, a bracket too many, or the end."""
    start += len(text[start:]) - len(text[start:].lstrip())
    quote = text[start : start + 1]
    if quote in ("'", '"'):
        for found in re.finditer(quote, text[start + 1 :]):
            close = start + 1 + found.start()
            before = text[start + 1 : close]
            escapes = len(before) - len(before.rstrip("\\"))
            end = close + 1 + len(text[close + 1 :]) - len(text[close + 1 :].lstrip())
            if escapes % 2 == 0 and (end == len(text) or text[end] == ","):
                inner = re.sub(rf"(\\+)(?={quote}|$)", lambda m: m[1][: len(m[1]) // 2], before)
                return Entry(inner, True), end
    i = start
    while i < len(text) and text[i] not in ",]":
        i = _closed(text, i) + 1
    return Entry(text[start:i].strip(), False), i


def _closed(text: str, start: int) -> int:
    """Return where the bracket at `start` closes; `start` itself for another character or one that never closes."""
    opening, depth = text[start], 0
    closing = CLOSING.get(opening)
    for i in range(start, len(text) if closing else start):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i
    return start


# --- what Hydra is given -----------------------------------------------------------------------------


def parsed(word: str) -> Any:
    """Return Hydra's reading of a word, or None if its grammar refuses it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _kind(schema: type, key: str) -> tuple[Any, bool]:
    """Return a setting's type and whether it may be null; (None, False) for a group's or Hydra's own."""
    try:
        return without_none(type_of(schema, key.lstrip("+")))
    except KeyError:
        return None, False


def _of_text(kind: Any) -> bool:
    return typing.get_origin(kind) is list and typing.get_args(kind)[0] in TEXT


def _added(schema: type, word: str) -> str:
    """Return a word that sets an entry of a mapping of anything, whether it has that entry already or not."""
    parent = word.partition("=")[0].rpartition(".")[0]
    return f"++{word}" if parent and word[0] != "+" and _kind(schema, parent)[0] == dict[str, Any] else word


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


def quoted(schema: type, word: str) -> str:
    """Quote the value of `key=value` if that setting is text, so that it means what it says.

    `str` and `Path` take everything literally; with `| None` the word null is None. `list[str]` takes what is written
    as a list (`entries`), and anything else as its only element. Other types keep Hydra's grammar.
    """
    key, _, value = word.partition("=")
    if key in options.FOLDERS and key in options.groups(schema):
        return f"{options.folder(key)}={value}"
    kind, optional = _kind(schema, key)
    if kind is None or (optional and value == "null"):
        return word
    if kind in TEXT:
        return f"{key}={literal(value)}"
    if _of_text(kind):
        return f"{key}={_text_list(key, value)}"
    override = parsed(word)
    if override is None:
        raise UserError(f"{key}: cannot read the value {value!r}")
    if override.is_sweep_override():
        as_list = f"; a list is written {key}=[{value}]" if typing.get_origin(kind) is list else ""
        raise UserError(f"{key}: {value!r} is several values; add -m to run one after the other{as_list}")
    return _added(schema, word)


def swept(schema: type, word: str) -> str:
    """Quote the value of `key=value` for a sweep: text is literal there too, and a list of it is several values.

    A list of a setting that is a list is several values if all its entries are lists. Other types keep Hydra's
    grammar, in which commas separate values, and may be written as a list as well.
    """
    key, _, value = word.partition("=")
    if key in options.FOLDERS and key in options.groups(schema):
        return quoted(schema, word)
    kind, optional = _kind(schema, key)
    listed = _entries(key, value)
    if listed is None or not (kind in TEXT or kind in SCALARS or typing.get_origin(kind) is list):
        return quoted(schema, word) if kind in TEXT or _of_text(kind) else _added(schema, word)
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


# --- what a user is told to type ---------------------------------------------------------------------


def typed(key: str, value: object) -> str:
    """Return a word of the command line as a shell takes it."""
    return shlex.quote(f"{key}={value}")


def chosen(group: str, settings: Any, default: str = "embedded") -> str:
    """Return the words that give such settings of a group, as a shell takes them, each after a space; "" for none.

    That is the choice of which the fewest settings differ, unless it is the one that stands without a word, and those.
    """
    from omegaconf import OmegaConf

    schema, told = dataclasses.asdict(type(settings)()), dataclasses.asdict(settings)
    differing: dict[str, list[str]] = {}
    for name in sorted(options.choices(group), key=lambda name: name != default):
        written = OmegaConf.to_container(OmegaConf.load(options.conf_dir() / options.folder(group) / f"{name}.yaml"))
        assert isinstance(written, dict)
        there = schema | {str(key): value for key, value in written.items()}
        differing[name] = [key for key, value in told.items() if value != there[key]]
    name = min(differing, key=lambda name: len(differing[name]))
    words = [] if name == default else [f"{group}={name}"]
    for key in differing[name]:
        value = told[key]
        words.append(f"{group}.{key}={'null' if value is None else value}")
    return "".join(f" {shlex.quote(word)}" for word in words)


# --- what is refused ---------------------------------------------------------------------------------


def unknown(stage: str, schema: type, key: str) -> str:
    """Say that a stage has no such setting, and which one may have been meant."""
    names = [name for name, _ in options.settings(schema) if name != key] + [EXPERIMENT]  # key: of another choice
    hint = options.closest(key, names)
    if not hint:  # the right name without its branch: `path` for `diffusion.path`
        same = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"; did you mean {same[0]!r}?" if same else ""
    return f"{stage} has no setting {key!r}{hint or f'; `hyperdb {stage} --help` lists them'}"


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
    branches = options.groups(schema)
    if key == EXPERIMENT or key in branches:
        names = options.choices(key)
        optional = key == EXPERIMENT or without_none(type_of(schema, key.replace("/", ".")))[1]
        other = (value == "null" and optional) or value[:1] in ("[", "{")  # left to Hydra's grammar
        if not (sweep or other or value in names):
            listed = ", ".join(names) or "none"
            raise UserError(f"no {key} {value!r}{options.closest(value, names)}; there is: {listed}")
        return
    try:
        type_of(schema, key)
    except KeyError:
        raise UserError(unknown(stage, schema, key)) from None
    # names of files may be of any bytes; text goes into headers and tokenizers
    if re.search(r"[\ud800-\udfff]", value) and not is_path(dict(options.settings(schema, annotated=True)).get(key)):
        raise UserError(f"{key} has characters that are not UTF-8 text; type it again")
