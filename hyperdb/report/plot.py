"""Figures from results: likeness against what it costs. matplotlib is asked for only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from hyperdb.report.results import is_figure
from hyperdb.runtime.files import atomic

MARKERS = "os^Dv<>P*X"  # one a results file


Spread = tuple[float, float, float]  # a mean, and how far its 95 % interval goes below and above


class Plane(NamedTuple):
    """What is to the right: the mean of `figures`, on an axis that is called `label`."""

    figures: tuple[str, ...]
    label: str
    log: bool = False


PLANES = {  # upwards is the likeness
    "seconds": Plane(("seconds",), "seconds a person", log=True),
    "bytes": Plane(("bytes",), "bytes a person", log=True),
    "copying": Plane(("copy_pose", "copy_background"), "copying: mean of pose and backdrop"),
    "style": Plane(("style_accuracy",), "style obeyed"),
}


def _spread(value: Any) -> Spread:
    """Return a figure with the lengths of its interval; a number has none."""
    if not isinstance(value, dict):
        return value, 0.0, 0.0
    mean = value["mean"]
    return mean, max(0.0, mean - value["lo"]), max(0.0, value["hi"] - mean)  # rounding may put an end past the mean


def points(plane: Plane, results: Mapping[str, Any]) -> list[tuple[str, Spread, Spread]]:
    """Return (label, x, y) of the rows that have all the figures.

    The mean of several figures has no interval: the results have none of it.
    """
    found = []
    for name, row in results["rows"].items():
        if all(is_figure(row.get(figure)) for figure in plane.figures):
            each = [_spread(row[figure]) for figure in plane.figures]
            x = each[0] if len(each) == 1 else (sum(mean for mean, _, _ in each) / len(each), 0.0, 0.0)
            found.append((" ".join(row.get("label", name).split()), x, _spread(row["cosine"])))
    return found


def draw(path: Path, plane: Plane, named: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a picture of the rows of several results, some of which have points there.

    `named` says what each results file is called. A label has the same colour in all files, and a file one marker.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    files = {title: points(plane, results) for title, results in named.items()}
    labels = list(dict.fromkeys(label for found in files.values() for label, _, _ in found))
    palette = colormaps["tab20" if len(labels) <= 20 else "turbo"]
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    legend: dict[str, Any] = {}
    for marker, (title, found) in zip(cycle(MARKERS), files.items(), strict=False):
        for label, (x, left, right), (y, below, above) in found:
            bars = axes.errorbar([x], [y], xerr=[[left], [right]], yerr=[[below], [above]], fmt=marker, capsize=2,
                                 elinewidth=1, color=palette(labels.index(label) / len(labels)))  # fmt: skip
            legend.setdefault(label, bars)
        if len(files) > 1:
            legend[title] = axes.plot([], [], marker, color="grey")[0]
    if plane.log:  # what costs nothing stands at 0, left of the power of ten below the least that something costs
        costs = [x for found in files.values() for _, (x, _, _), _ in found if x > 0]
        axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(min(costs, default=1))), linscale=0.5)
    axes.set(xlabel=plane.label, ylabel="likeness: face cosine with other photos")
    box = axes.legend(legend.values(), legend, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    for text in box.get_texts():
        text.set_parse_math(False)  # a $ in a label is a $
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    return path
