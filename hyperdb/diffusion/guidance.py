"""How the predictions of one step are weighed against each other, and the prompt without the person."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, ordinary or hybrid (Shrestha et al. 2025, arXiv 2511.03156).

    Ordinary, `subject` None: `e = u + text (p - u)`, the adapter in both. Hybrid:
    `e = u + text (b - u) + subject (p - b)` with u and b the base's own predictions, unconditional and for the prompt
    without the person, and p the personalised one. `blocks` are the rows that this needs, in the network's order: of
    equal weights or a text weight of 1 two remain, of both 1 one.
    """

    text: float
    subject: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("guidance", self.text), ("subject_guidance", self.subject)):
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name}={value}: expected a finite number")

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks of rows that are predicted, of u, b, p."""
        middle = () if self.subject in (None, self.text) else ("b",)
        return (*(() if self.text == 1 else ("u",)), *middle, "p")

    @property
    def plain(self) -> int:
        """How many blocks, the first ones, the adapter leaves alone."""
        return 0 if self.subject is None else len(self.blocks) - 1

    @property
    def adapted(self) -> int:
        """How many blocks the adapter acts on, after the plain ones."""
        return len(self.blocks) - self.plain

    # Shrestha et al. 2025; Ho and Salimans 2022
    def combine(self, out: Tensor) -> Tensor:
        """Weigh predictions `[blocks * B, ...]` to `[B, ...]`."""
        first, *rest = out.chunk(len(self.blocks))
        gains = [{"b": self.text, "p": self.text if self.subject is None else self.subject}[k] for k in self.blocks[1:]]
        combined, before = first, first
        for gain, block in zip(gains, rest, strict=True):
            combined, before = combined + gain * (block - before), block
        return combined


# --- the prompt of b ---------------------------------------------------------------------------------

# After these a name begins a phrase ("a photo of [V]"), and before these it ends one ("[V] in the snow").
_LINK = re.compile(
    "of|with|and|or|as|by|in|on|at|like|from|to|for|near|beside|behind|between|before|under|over|into|onto|through|is|"
    "was|are|who|that|while"
)
_DETERMINER = re.compile("an?|the|this|that|my|your|his|her|our|their|one")


def without_subject(prompt: str, names: Sequence[str], noun: str) -> str:
    """Return a prompt that speaks of anybody: "a [V] face" -> "a face", "[V] at the beach" -> "a face at the beach".

    `names` are the words for the person. Before a noun they are dropped, as a noun themselves replaced by `noun`;
    an article that then stands before another sound is corrected.
    """
    word = "|".join(re.escape(name) for name in names if name)
    pattern = re.compile(rf"(?P<before>(?:\S+\s+)?)(?<!\w)(?:{word})(?!\w)(?P<after>\s*)(?=(?P<next>['’\w-]*))", re.I)

    def spoken(match: re.Match[str]) -> str:
        before, after, following = match["before"], match["after"], match["next"].lower()
        last = before.strip().lower()
        named = not _DETERMINER.fullmatch(last)
        ends = not following or following[0] in "'’-" or _LINK.fullmatch(following)
        if ends or (named and following.endswith("ing")):
            opens = not last or _LINK.fullmatch(last) or not last[-1].isalnum()
            start = _article(noun) + " " if opens and named else ""
            text = start + noun + after
        else:
            text = ""
        if last in ("a", "an"):
            right = _article(text or following)
            before = (right.capitalize() if before[0].isupper() else right) + before[len(last) :]
        return before + text

    return pattern.sub(spoken, prompt)


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" and word else "a"
