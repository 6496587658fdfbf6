"""How words of the command line are written: quoted text, and lists."""

from __future__ import annotations

import re
from typing import NamedTuple

from hyperdb.runtime.errors import UserError

CLOSING = {"[": "]", "(": ")", "{": "}"}


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
