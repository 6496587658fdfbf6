"""The figures of an evaluation: likeness, the person in a style, obedience and copying of pictures, row by row.

A row is one way to make pictures of I people, a figure a value a person and seed, `[I, S]`. A row may be of the first J
people alone: then they are told from all I, and compared with other rows by what both have of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperdb.metrics import copying
from hyperdb.metrics.feature import Feature, TextFeature
from hyperdb.metrics.likeness import galleries, middle
from hyperdb.metrics.obedience import Judge
from hyperdb.metrics.score import bootstrap, cosine, paired, rank1

Scores = dict[str, dict[str, NDArray[Any]]]  # row: figure: [I, S]
RATES = ("rank1", "detected")  # figures that are summarised by their mean alone


@dataclass
class Standard:
    """What people's pictures are measured against.

    `given [I, V, 3, H, W]` are the photos of each that could be learned from, and a row has learned from the first
    `photos[row]` of them, from one if it is not named; `views [I, K, 3, H, W]` are further ones. The last pictures of a
    person are drawn in `styles`, one each; `styled` has views of everybody in each style. Those before them, one for
    each of `changed`, are photos under other prompts than the plain one: in the place that is named, or in none (None).

    `encoders` judge whole pictures by two figures, both over all prompts of a person, each of which counts once: the
    plain pictures are of one prompt, so their mean is one value. Beside them stands each kind of prompt alone, with
    `_plain`, `_changed` or `_styled` behind its name.

    - Likeness, `dino`, `vicreg` and `clip_i`: the mean cosine of a picture with each of the `views`, as DreamBooth
      (Ruiz et al. 2023) has it. The views are always photos, so a picture in a style loses by it: compare rows, not
      prompts. The given photos are not among them.
    - Fidelity, `clip_t`: the cosine of a picture with its prompt, from which the identifier is taken out, for it means
      nothing to CLIP. Textual Inversion (Gal et al. 2022) does so too ("a photo of on the moon"); DreamBooth does not
      say. The noun stays: "a photo of a [V] face" is compared with "a photo of a face".
    - R-precision, `clip_r` (Park et al. 2021): how often a picture under another prompt than the plain one is nearer
      to its own prompt than to any other, the plain one among them. CLIP-T has no known zero, this has chance.
    - Variety, `dino_diversity`, `vicreg_diversity`, `clip_diversity`: 1 minus the mean cosine of two plain pictures of
      a person, as `diversity` is the distance of their pixels.
    """

    recognisers: Sequence[Feature]  # the figures of the first have no suffix
    judge: Judge | None  # of styles; None: whether a style is obeyed is not asked
    given: Tensor
    views: Tensor
    styles: list[str]
    styled: Mapping[str, Tensor]
    changed: list[str | None] = field(default_factory=list)
    encoders: list[Feature] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # one a picture, without [V]; only encoders read them
    photos: Mapping[str, int] = field(default_factory=dict)  # of those given, by the row

    @cached_property
    def _seen(self) -> dict[str, Tensor]:
        """The views as each recogniser sees them, `[I, K, C]`; NaN where it finds no face."""
        return {r.name: _each(r, self.views) for r in self.recognisers}

    @property
    def faceless(self) -> dict[str, int]:
        """In how many of the photos that judge each recogniser finds no face; the others of the person judge alone."""
        return {name: int((~x.isfinite().all(-1)).sum()) for name, x in self._seen.items()}

    @cached_property
    def _galleries(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The people as each recogniser sees them: in the views, and in each style."""
        return [
            (middle(self._seen[r.name]), {k: galleries(r, v) for k, v in self.styled.items()}) for r in self.recognisers
        ]

    @cached_property
    def _known(self) -> list[tuple[Tensor, Tensor | None]]:
        """The people and the prompts as each encoder sees them: the mean over the views `[I, C]`, words `[K, C]`."""
        read = [e.words(self.prompts) if isinstance(e, TextFeature) else None for e in self.encoders]
        return [(_each(e, self.views).mean(1), words) for e, words in zip(self.encoders, read, strict=True)]

    def measure(self, pictures: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return {row: {figure: `[J]`}} of each row's pictures `[J, K, 3, H, W]` uint8, of all people or the first."""
        from tqdm import tqdm

        return {
            row: self._likeness(images) | self._further(images, self.photos.get(row, 1)) | self._whole(images)
            for row, images in tqdm(pictures.items(), desc="judging", unit="row", dynamic_ncols=True)
        }

    def _apart(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split pictures `[I, K, ...]` into plain ones of the person, those under changed prompts, those in styles."""
        plain = images.shape[1] - len(self.changed) - len(self.styles)
        photo, changed, styled = images.split([plain, len(self.changed), len(self.styles)], 1)
        return photo, changed, styled

    def _likeness(self, images: Tensor) -> dict[str, Tensor]:
        score: dict[str, Tensor] = {}
        for number, (recogniser, (gallery, styled)) in enumerate(zip(self.recognisers, self._galleries, strict=True)):
            suffix = f"_{recogniser.name}" if number else ""
            photo, changed, rest = self._apart(_each(recogniser, images))
            mine = gallery[: len(images), None]
            for kind, faces in (("", photo), ("_changed", changed)):
                if faces.shape[1]:
                    score[f"cosine{kind}{suffix}"] = torch.as_tensor(cosine(faces, mine)).mean(1)
                    score[f"detected{kind}{suffix}"] = faces.isfinite().all(-1).float().mean(1)
                    score[f"rank1{kind}{suffix}"] = _first(faces, gallery)
            if self.styles:
                hits = [_first(rest[:, i, None], styled[name]) for i, name in enumerate(self.styles)]
                score[f"rank1_styled{suffix}"] = torch.stack(hits).mean(0)
                score[f"detected_styled{suffix}"] = rest.isfinite().all(-1).float().mean(1)
        return score

    def _further(self, images: Tensor, photos: int) -> dict[str, Tensor]:
        score: dict[str, Tensor] = {}
        photo, changed, rest = self._apart(images)
        for name, what in (("background", copying.background), ("pose", copying.pose)):
            drawn, given, others = (_each(what, x) for x in (photo, self.given[:, :photos], self.views))
            score[f"copy_{name}"] = copying.similarity(drawn, given, others)
        if photo.shape[1] > 1:
            score["diversity"] = copying.diversity(photo)
        for figure, label, pictures, words in (
            ("style_accuracy", "style", rest, self.styles),
            ("place_accuracy", "place", changed, self.changed),
        ):
            if self.judge is None or not any(words):
                continue
            asked = {i: self.judge.words[label].index(word) for i, word in enumerate(words) if word is not None}
            wanted = torch.tensor(list(asked.values()))
            drawn = self.judge(pictures[:, list(asked)].flatten(0, 1))[label].view(-1, len(asked))
            score[figure] = (drawn == wanted).float().mean(1)
        return score

    # the mean of cosines with several unit vectors is the product with their mean
    def _whole(self, images: Tensor) -> dict[str, Tensor]:
        score: dict[str, Tensor] = {}
        for encoder, (photos, words) in zip(self.encoders, self._known, strict=True):
            seen = _each(encoder, images)  #                                        [J, K, C]
            alike, *others = self._apart(seen)
            asked, first = torch.cat(others, 1), alike.shape[1]
            if first > 1:  # 1 - the mean cosine of two plain pictures
                whole = alike.sum(1).square().sum(-1)
                score[f"{encoder.name}_diversity"] = 1 - (whole - first) / (first * (first - 1))
            found = {encoder.name: (seen * photos[: len(images), None]).sum(-1)}  # [J, K]
            if words is not None:
                found = {f"{encoder.name}_i": found[encoder.name], f"{encoder.name}_t": (seen * words).sum(-1)}
                if asked.shape[1]:
                    known = torch.cat([words[:1], words[first:]]).float()
                    nearest = (asked.float() @ known.T).argmax(-1)
                    score[f"{encoder.name}_r"] = (nearest == torch.arange(1, len(known))).float().mean(1)
            for figure, values in found.items():
                plain, changed, styled = self._apart(values)
                plain = plain.mean(1, keepdim=True)
                score[figure] = torch.cat([plain, changed, styled], 1).mean(1)
                for kind, some in (("plain", plain), ("changed", changed), ("styled", styled)):
                    if some.shape[1]:
                        score[f"{figure}_{kind}"] = some.mean(1)
        return score


def _each(feature: Any, images: Tensor) -> Tensor:
    """Return a feature of every picture, `[I, K, 3, H, W]` -> `[I, K, C]`."""
    return feature(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def _first(faces: Tensor, gallery: Tensor) -> Tensor:
    """Return how often each person of `[J, K, C]` comes first among all of `gallery [I, C]`, `[J]`."""
    absent = faces.new_full((len(gallery) - len(faces), *faces.shape[1:]), torch.nan)
    return torch.as_tensor(rank1(torch.cat([faces, absent]), gallery))[: len(faces)]


def _common(*values: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the values of the people whom all rows have, the first ones."""
    return [x[: min(map(len, values))] for x in values]


def summary(score: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return mean and interval of every figure, `[I, S]` or `[I]`, of the rates the mean alone."""
    return {
        name: round(float(values.mean()), 4) if name.startswith(RATES) else bootstrap(values, seed)
        for name, values in score.items()
    }


def differences(scores: Scores, against: Mapping[str, Sequence[str]], figure: str, seed: int) -> dict[str, Any]:
    """Return `{a-b: mean and interval}` of the figure of each row a minus that of each row b that it is set against.

    Rows without the figure are left out. The people are those whom both rows have.
    """
    known = {row: score[figure] for row, score in scores.items() if figure in score}
    pairs = [(a, b) for a, rows in against.items() for b in rows if a in known and b in known]
    both = {f"{a}-{b}": _common(known[a], known[b]) for a, b in pairs}
    return {name: paired(a, b, seed) for name, (a, b) in both.items()}


def closed(scores: Scores, low: str, high: str) -> dict[str, float]:
    """Return which part of the way from the row `low` to the row `high` every other goes, by mean face cosine.

    Nothing where one of the two is missing or `high` is not above `low`.
    """
    found: dict[str, float] = {}
    for row, score in scores.items() if {low, high} <= scores.keys() else ():
        ends = (scores[low]["cosine"], scores[high]["cosine"])
        begin, end, mean = (float(x.mean()) for x in _common(*ends, score["cosine"]))
        if row not in (low, high) and end > begin:
            found[row] = round((mean - begin) / (end - begin), 4)
    return found


def sliced(scores: Scores) -> str:
    """Return the figure of slices: the likeness under changed prompts, where all rows have that."""
    return "cosine_changed" if all("cosine_changed" in score for score in scores.values()) else "cosine"


def slices(known: Sequence[Mapping[str, Any]], scores: Scores) -> dict[str, Any]:
    """Return the mean face cosine by what is known of the people: {attribute: {word: {people: n, row: x}}}.

    It is `sliced(scores)`. `known` has the attributes of each person, in the order of the scores. Of a row that has the
    first people alone, `"ROW of": n` says how many of those are counted.
    """
    found: dict[str, Any] = {}
    figure = sliced(scores)
    for name in known[0] if known else ():
        for word in sorted({str(person[name]) for person in known}):
            mine = np.array([person[name] == word for person in known])
            part: dict[str, float] = {"people": int(mine.sum())}
            for row, score in scores.items():
                if len(some := score[figure][mine[: len(score[figure])]]):
                    part[row] = round(float(some.mean()), 4)
                    part |= {f"{row} of": len(some)} if len(score[figure]) < len(known) else {}
            found.setdefault(name, {})[word] = part
    return found
