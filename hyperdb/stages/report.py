"""Tables and figures of what `hyperdb evaluate` measured, from its results files alone.

    hyperdb report results=runs/evaluate/likeness/results.json
    hyperdb report results=[a.json,b.json] name=both
    hyperdb report results=runs/evaluate/ablation_rank name=rank     # every results.json in a folder

Needs no model. The figures need matplotlib, but for the gallery.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.report.plot import PLANES
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve

if TYPE_CHECKING:
    from hyperdb.report.sweep import Axis

WRITES = ("table.md", "table.tex", "table.csv", "gallery.webp", "over.png", *(f"{name}.png" for name in PLANES))
PACKAGES = "% \\usepackage{booktabs, adjustbox}\n"


@dataclass
class Config:
    """Whose figures are shown.

    The tables have every row, the paired differences, the face cosine by what is known of the people (of rendered ones
    sex, age, skin and what they wear in the given photo), and the number of people and seeds. Markdown and LaTeX have
    tables for each file. The CSV has all files in one, every figure in full precision with the ends of its interval.

    A picture sets the likeness against something that it costs: seconds, bytes, copying of the photo, how varied a
    person's pictures are, obedience to the style or to the prompt. Every row is a point with its 95 % interval, and all
    files are in one picture. A row whose method differs between files in one number alone, such as its iterations or
    the strength of its adapter, is a line through its points.

    Files that differ in one setting, as those of an ablation or a sweep do, are in one further table over its values,
    which stands first, and in the picture `over.png`. Where they are of the same people, the table compares each value
    with the first one, person by person.

    `gallery.webp` shows the same people under the same prompts by every row. The pictures are those that `hyperdb
    evaluate` kept beside its results, in `rows`, of the first seed; results without them are not in it.
    """

    results: list[FilePath] = "???"  # type: ignore[assignment]
    """files of `hyperdb evaluate`; a folder stands for every results.json in it"""
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/report/default"  # folder that is written
    gallery_people: int = 3  # the first ones
    gallery_prompts: int = 6  # the plain one, and others evenly among the rest
    gallery_columns: int | None = None  # rows of the results side by side, further ones beneath; null: all side by side

    def __post_init__(self) -> None:
        if not self.results:
            raise UserError("results=[]: name a file of `hyperdb evaluate`, or several as [A,B]")
        for name in ("gallery_people", "gallery_prompts", "gallery_columns"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: expected at least 1")


def _files(name: str) -> list[str]:
    """Return a file, or the results in and below a folder. Raises `UserError` for a folder without any."""
    if not (folder := resolve(name)).is_dir():
        return [name]
    if not (found := sorted(map(str, folder.rglob("results.json")))):
        raise UserError(f"results={name}: this folder holds no results.json")
    return found


def _beside_the_first(named: Mapping[str, Mapping[str, Any]], along: Axis) -> dict[str, Any]:
    """Return the paired differences of each value's rows from the first's, of the same people, photos and seeds."""
    import numpy as np

    from hyperdb.metrics.score import paired

    every, (first, *others) = list(named.values()), along.order()
    found: dict[str, dict[str, Any]] = {"cosine": {}}

    def judged(results: Mapping[str, Any]) -> tuple[Any, ...]:
        told = results.get("settings", {})
        kept = told.get("given") or told.get("photos")
        return results.get("persons"), told.get("views"), told.get("reference"), kept

    for place in others:
        one, two = every[place], every[first]
        if one.get("persons") is None or judged(one) != judged(two):
            continue
        for row, figures in one.get("values", {}).items():
            before = two.get("values", {}).get(row, {})
            for figure in (name for name in figures if name in before):
                a, b = (np.asarray(x[figure], dtype=float).T for x in (figures, before))  # [I, S]
                if a.shape == b.shape:
                    found.setdefault(figure, {})[f"{row} {place}-{row} {first}"] = paired(a, b, 0)
    return {"paired": found.pop("cosine"), "paired_further": found}


def run(config: Config) -> Path:
    """Write the tables and those figures that the results have; return `out`."""
    from hyperdb.report.gallery import columns, draw_gallery
    from hyperdb.report.plot import draw, draw_over, points
    from hyperdb.report.results import load
    from hyperdb.report.sweep import axis, merged
    from hyperdb.report.table import comma_separated, latex, markdown
    from hyperdb.runtime.files import hash_files, save_text
    from hyperdb.runtime.output import claim

    named = {file: load(resolve(file)) for name in config.results for file in _files(name)}
    out = claim(config.out, WRITES, {"results": [hash_files([resolve(file)]) for file in named]})
    along = axis(named) if len(named) > 1 else None
    shown = named
    if along is not None:
        joined = {**merged(named, along), **_beside_the_first(named, along)}
        shown = {f"over {along.setting}": joined, **named}
    parts = [f"## {title}\n\n{markdown(results, brief=False)}\n" for title, results in shown.items()]
    typeset = [PACKAGES, *(latex(results, title) for title, results in shown.items())]
    written = [
        save_text(out / "table.md", "\n".join(parts)),
        save_text(out / "table.tex", "\n".join(typeset)),
        save_text(out / "table.csv", comma_separated(named)),
    ]
    at = {resolve(file): results for file, results in named.items()}
    kept, others = columns(at, along)
    if kept:
        size = config.gallery_people, config.gallery_prompts, config.gallery_columns
        written.append(draw_gallery(out / "gallery.webp", kept, at, along, *size))
    for file in others:
        print(f"gallery.webp is without {file}, whose people or prompts are others")
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: matplotlib is not installed; run `pip install -e '.[plots]'`")
    else:
        if along is not None:
            written.append(draw_over(out / "over.png", along, named))
        for name, plane in PLANES.items():
            lacking = [title for title, results in named.items() if not points(plane, results)]
            if len(lacking) < len(named):
                written.append(draw(out / f"{name}.png", plane, named))
            if lacking:
                what = "is left out" if len(lacking) == len(named) else f"is without {', '.join(lacking)}"
                print(f"{name}.png {what}: no row has {' and '.join(plane.figures)}")
    print(f"{', '.join(file.name for file in written)} in {out}")
    return out
