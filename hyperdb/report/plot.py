"""Figures from results: likeness against what it costs. matplotlib is asked for only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from hyperdb.report.results import is_figure
from hyperdb.report.sweep import Axis, own_axis
from hyperdb.report.table import COLUMNS
from hyperdb.runtime.files import atomic

MARKERS = "os^Dv<>P*X"  # one a results file
OVER = (  # drawn over a setting's values, where known
    *("cosine", "cosine_changed", "rank1_styled", "rank1_styled_verifier"),
    *("style_accuracy", "clip_t", "copy_pose"),
)

ACROSS = 4  # panels beside each other in the picture over a setting's values
Spread = tuple[float, float, float]  # a mean, and how far its 95 % interval goes below and above


class Plane(NamedTuple):
    """What is to the right: the mean of `figures`, on an axis that is called `label`."""

    figures: tuple[str, ...]
    label: str
    log: bool = False


LIKENESS = "cosine_changed", "cosine"  # the first that all have: plain portraits can be copies
PLANES = {  # upwards is the likeness
    "seconds": Plane(("seconds",), "seconds a person", log=True),
    "bytes": Plane(("bytes",), "bytes a person", log=True),
    "copying": Plane(("copy_pose", "copy_background"), "copying: mean of pose and backdrop"),
    "diversity": Plane(("diversity",), "diversity of a person's pictures"),
    "style": Plane(("style_accuracy",), "style obeyed"),
    "prompt": Plane(("clip_t",), "prompt obeyed: CLIP-T"),
}


def _spread(value: Any) -> Spread:
    """Return a figure with the lengths of its interval; a number has none."""
    if not isinstance(value, dict):
        return value, 0.0, 0.0
    mean = value["mean"]
    return mean, max(0.0, mean - value["lo"]), max(0.0, value["hi"] - mean)  # rounding may put an end past the mean


def _point(plane: Plane, row: Mapping[str, Any], likeness: str) -> tuple[Spread, Spread] | None:
    """Return where a row stands, if it has all the figures; the mean of several figures has no interval."""
    if not all(is_figure(row.get(figure)) for figure in plane.figures):
        return None
    each = [_spread(row[figure]) for figure in plane.figures]
    x = each[0] if len(each) == 1 else (sum(mean for mean, _, _ in each) / len(each), 0.0, 0.0)
    return x, _spread(row[likeness])


def likeness_of(every: Sequence[Mapping[str, Any]]) -> str:
    """Return by which figure the likeness of several results is shown: under changed prompts, if all rows have that."""
    rows = [row for results in every for row in results["rows"].values()]
    return next(name for name in LIKENESS if all(is_figure(row.get(name)) for row in rows))


def points(plane: Plane, results: Mapping[str, Any], likeness: str = "cosine") -> list[tuple[str, Spread, Spread]]:
    """Return (label, x, y) of the rows that have all the figures; y is the figure `likeness`."""
    found = {name: _point(plane, row, likeness) for name, row in results["rows"].items()}
    return [(_label(results, name), *point) for name, point in found.items() if point is not None]


def _label(results: Mapping[str, Any], name: str) -> str:
    row = results["rows"][name]
    few = row.get("people", results.get("people"))
    of = f" ({few} people)" if few != results.get("people") else ""
    return " ".join(row.get("label", name).split()) + of


def draw(path: Path, plane: Plane, named: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a picture of the rows of several results, some of which have points there.

    `named` says what each results file is called. A label has the same colour in all files, and a file one marker. But
    a row whose method differs between the files in one number, such as its iterations or its strength, is one line
    through its points, with that number beside each.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    every = list(named.values())
    likeness = likeness_of(every)
    rows = dict.fromkeys(name for results in every for name in results["rows"])
    joined = {name: own for name in rows if (own := own_axis(named, name)) is not None}
    curves: list[tuple[str, str, list[tuple[str, Spread, Spread]]]] = []  # label, marker, (number, x, y)
    for name, (titles, along) in joined.items():
        known = [(along.text(i), _point(plane, named[title]["rows"][name], likeness)) for i, title in enumerate(titles)]
        if there := [(number, *point) for number, point in known if point is not None]:
            curves.append((f"{_called(name, every)}, by {along.setting}", ".-", there))
    markers = {}
    for marker, (title, results) in zip(cycle(MARKERS), named.items(), strict=False):
        rest = {name: row for name, row in results["rows"].items() if name not in joined}
        if alone := points(plane, {"rows": rest}, likeness):
            curves += [(label, marker, [("", x, y)]) for label, x, y in alone]
            markers[title] = marker
    labels = list(dict.fromkeys(label for label, _, _ in curves))
    palette = colormaps["tab20" if len(labels) <= 20 else "turbo"]
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    legend: dict[str, Any] = {}
    for label, marker, there in curves:
        numbers, xs, ys = zip(*there, strict=True)
        (x, *wide), (y, *high) = zip(*xs, strict=True), zip(*ys, strict=True)
        colour = palette(labels.index(label) / len(labels))
        bars = axes.errorbar(x, y, xerr=wide, yerr=high, fmt=marker, capsize=2, elinewidth=1, color=colour)
        legend.setdefault(label, bars)
        for number, right, up in zip(numbers, x, y, strict=True):
            axes.annotate(number, (right, up), (3, 3), textcoords="offset points", fontsize="x-small", color=colour)
    for title, marker in markers.items() if len(named) > 1 else ():
        legend[title] = axes.plot([], [], marker, color="grey")[0]
    if plane.log:  # what costs nothing stands at 0, left of the power of ten below the least that something costs
        costs = [x for _, _, there in curves for _, (x, _, _), _ in there if x > 0]
        axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(min(costs, default=1))), linscale=0.5)
    axes.set(xlabel=plane.label, ylabel=f"likeness: {COLUMNS[likeness].label}")
    box = axes.legend(legend.values(), legend, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    for text in box.get_texts():
        text.set_parse_math(False)  # a $ in a label is a $
    return _write(figure, path, dpi=150, bbox_inches="tight")


def draw_over(path: Path, along: Axis, named: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a picture of several results that differ in one setting: its values to the right, a line a row.

    There is a panel for each figure of OVER that some row has. Values that are no numbers stand side by side.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    every, order = list(named.values()), along.order()
    rows = list(dict.fromkeys(name for results in every for name in results["rows"]))
    many = colormaps["tab20" if len(rows) <= 20 else "turbo"]
    colours = {row: f"C{i}" if len(rows) <= 10 else many(i / len(rows)) for i, row in enumerate(rows)}
    figures = [x for x in OVER if any(is_figure(row.get(x)) for results in every for row in results["rows"].values())]
    places = [along.values[i] for i in order] if along.is_number else list(range(len(order)))
    down, across = -(-len(figures) // ACROSS), min(ACROSS, len(figures))
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.8), layout="constrained")
    legend: dict[str, Any] = {}
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(figures) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, figures, strict=False):
        for row in rows:
            known = [(x, every[i]["rows"].get(row, {}).get(name)) for x, i in zip(places, order, strict=True)]
            spread = [(x, *_spread(value)) for x, value in known if is_figure(value)]
            if spread:
                x, y, below, above = zip(*spread, strict=True)
                bars = axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=2, color=colours[row])
                legend.setdefault(_called(row, every), bars)
        if along.is_number and min(places) > 0 and max(places) >= 8 * min(places):
            axes.set_xscale("log")
        axes.set_xticks(places, [along.text(i) for i in order])
        axes.minorticks_off()
        axes.set(xlabel=along.setting, ylabel=COLUMNS[name].label)
    box = figure.legend(legend.values(), legend, loc="outside lower center", ncols=2, fontsize="small")
    for text in (*box.get_texts(), *(tick for axes in figure.axes for tick in axes.get_xticklabels())):
        text.set_parse_math(False)
    return _write(figure, path, dpi=100)


def _write(figure: Any, path: Path, **how: Any) -> Path:
    """Write a figure as the path's ending says; pixels in so few colours that they take a third of the bytes."""
    with atomic(path) as temporary:
        figure.savefig(temporary, **how)
        if path.suffix == ".png":
            with Image.open(temporary) as drawn:
                few = drawn.convert("RGB").quantize(128)
            few.save(temporary, format="png", optimize=True)
    return path


def _called(row: str, every: Sequence[Mapping[str, Any]]) -> str:
    """Return what people read of a row, or its name where that changes with the setting."""
    labels = {_label(results, row) for results in every if row in results["rows"]}
    return labels.pop() if len(labels) == 1 else row
