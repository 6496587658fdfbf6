"""Tables from results files: `python -m hyperdb.report.table experiments/embedded/likeness/results.json`.

Figures that are named behind the file are the columns, in this order. Several files, with commas and without spaces,
make one table (`hyperdb.report.results.joined`).
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyperdb.report.results import is_figure, joined, load
from hyperdb.runtime.errors import UserError


class Column(NamedTuple):
    """A figure's heading and decimal places, and whether the brief table has it too."""

    label: str
    digits: int = 2
    brief: bool = False


COLUMNS = {  # in this order, of those that some row has; any other figure stands last, under its own name
    "cosine": Column("face cosine", 3, brief=True),
    "people": Column("people", 0, brief=True),
    "rank1": Column("rank-1", brief=True),
    "cosine_dlib": Column("face cosine by dlib", 3),
    "rank1_dlib": Column("rank-1 by dlib", brief=True),
    "cosine_changed": Column("face cosine, changed prompt", 3, brief=True),
    "rank1_changed": Column("rank-1, changed prompt"),
    "cosine_changed_dlib": Column("face cosine by dlib, changed prompt", 3),
    "rank1_changed_dlib": Column("rank-1 by dlib, changed prompt"),
    "rank1_styled": Column("rank-1 in the style", brief=True),
    "rank1_styled_dlib": Column("rank-1 by dlib in the style"),
    "cosine_facenet": Column("face cosine by FaceNet", 3),
    "rank1_facenet": Column("rank-1 by FaceNet", brief=True),
    "cosine_changed_facenet": Column("face cosine by FaceNet, changed prompt", 3),
    "rank1_changed_facenet": Column("rank-1 by FaceNet, changed prompt"),
    "rank1_styled_facenet": Column("rank-1 by FaceNet in the style"),
    "cosine_verifier": Column("cosine by the verifier", 3),
    "rank1_verifier": Column("rank-1 by the verifier", brief=True),
    "rank1_styled_verifier": Column("rank-1 by the verifier in the style", brief=True),
    "cosine_changed_verifier": Column("cosine by the verifier, changed prompt", 3),
    "rank1_changed_verifier": Column("rank-1 by the verifier, changed prompt"),
    "style_accuracy": Column("style obeyed", brief=True),
    "place_accuracy": Column("place obeyed"),
    "copy_pose": Column("pose copied", brief=True),
    "copy_background": Column("backdrop copied", brief=True),
    "dino": Column("DINO", 3, brief=True),
    "vicreg": Column("VICReg", 3, brief=True),
    "clip_i": Column("CLIP-I", 3, brief=True),
    "clip_t": Column("CLIP-T", 3, brief=True),
    "clip_r": Column("R-precision by CLIP"),
    "vicreg_plain": Column("VICReg, plain prompt", 3),
    "dino_plain": Column("DINO, plain prompt", 3),
    "clip_i_plain": Column("CLIP-I, plain prompt", 3),
    "clip_t_plain": Column("CLIP-T, plain prompt", 3),
    "dino_changed": Column("DINO, changed prompt", 3),
    "clip_i_changed": Column("CLIP-I, changed prompt", 3),
    "clip_t_changed": Column("CLIP-T, changed prompt", 3),
    "vicreg_changed": Column("VICReg, changed prompt", 3),
    "vicreg_styled": Column("VICReg, in the style", 3),
    "dino_styled": Column("DINO, in the style", 3),
    "clip_i_styled": Column("CLIP-I, in the style", 3),
    "clip_t_styled": Column("CLIP-T, in the style", 3),
    "detected": Column("face found"),
    "detected_dlib": Column("face found by dlib"),
    "detected_facenet": Column("face found by FaceNet"),
    "detected_changed": Column("face found, changed prompt"),
    "detected_changed_dlib": Column("face found by dlib, changed prompt"),
    "detected_changed_facenet": Column("face found by FaceNet, changed prompt"),
    "detected_styled": Column("face found in the style"),
    "detected_styled_dlib": Column("face found by dlib in the style"),
    "detected_styled_facenet": Column("face found by FaceNet in the style"),
    "diversity": Column("diversity", 3),
    "dino_diversity": Column("diversity by DINO", 3),
    "vicreg_diversity": Column("diversity by VICReg", 3),
    "clip_diversity": Column("diversity by CLIP", 3),
    "seconds": Column("seconds", 3),
    "steps": Column("iterations", 0),
    "trained": Column("numbers trained", 0),
    "bytes": Column("bytes", 0),
    "base_bytes": Column("bytes of the base in memory", 0),
}
LEAD = ("cosine", "cosine_changed")  # told with their intervals, for rows as for differences
BAR = r"\|"  # in Markdown
LATEX: dict[str, str | int | None] = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "—": "---",
}
Table = list[list[str]]  # the heading, then the lines; the first cell of each names it


def _columns(entries: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the figures that some entry has, in the order of a table."""
    found = dict.fromkeys(name for entry in entries for name, value in entry.items() if is_figure(value))
    known = {name: column for name, column in COLUMNS.items() if name in found}
    return known | {name: Column(name.replace("_", " "), 3) for name in found if name not in COLUMNS}


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"


def _cell(row: Mapping[str, Any], figure: str, digits: int) -> str:
    if figure not in row:
        return "—"
    mean = row[figure]["mean"] if isinstance(row[figure], dict) else row[figure]
    return f"{mean:,.{digits}f}"


def _label(results: Mapping[str, Any], name: str) -> str:
    """Return what people read of a row, or of two that are compared, on one line."""
    rows = results["rows"]
    labels = [name] if name in rows else name.split("-")
    return " − ".join(" ".join(rows[row].get("label", row).split()) for row in labels)


def _pairs(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the paired differences as rows are: {a-b: {figure: mean and interval}}, and of how many people."""
    counts = {row: figures["people"] for row, figures in results["rows"].items() if "people" in figures}
    figures = {"cosine": results["paired"], **results.get("paired_further", {})}
    names = dict.fromkeys(name for found in figures.values() for name in found)
    pairs = {name: {figure: found[name] for figure, found in figures.items() if name in found} for name in names}
    for name, pair in pairs.items():
        if counts.keys() >= (both := set(name.split("-"))):  # of both rows, the people whom both have
            pair["people"] = min(counts[row] for row in both)
    return pairs


def _over(results: Mapping[str, Any]) -> str:
    return "people and seeds" if results.get("seeds", 1) > 1 else "people"


def _counted(results: Mapping[str, Any]) -> str:
    people, seeds = results["people"], results.get("seeds", 1)
    return f"n = {people} people, {seeds} seed{'s' * (seeds > 1)}; in brackets: 95 % intervals over {_over(results)}"


def _slices(results: Mapping[str, Any]) -> Table:
    """Return the likeness of each row by what is known of the people; the heading alone where nothing is.

    Behind that of a row of fewer people stands in brackets how many.
    """
    parts = [part for words in results.get("slices", {}).values() for part in words.values()]
    named = [row for row in results["rows"] if any(row in part for part in parts)]
    figure = COLUMNS[results.get("slices_of", "cosine")].label
    table = [[f"{figure}, by people", "people", *(_label(results, row) for row in named)]]
    for attribute, words in results.get("slices", {}).items():
        for word, part in words.items():
            few = [f" ({part[f'{row} of']:g})" if f"{row} of" in part else "" for row in named]
            cells = [_cell(part, row, 3) + of for row, of in zip(named, few, strict=True)]
            table.append([f"{attribute.replace('_', ' ')}: {word}", _cell(part, "people", 0), *cells])
    return table


def _tables(results: Mapping[str, Any], brief: bool, only: Sequence[str] = ()) -> list[Table]:
    """Return the tables that are not empty: rows, paired differences and, but in brief, slices.

    With `only` they have these figures alone beside the face cosine, in this order, and there are no slices.
    """
    rows, pairs = results["rows"], _pairs(results)
    known = _columns(rows.values())
    if odd := [name for name in only if name not in known]:
        raise UserError(f"no row has the figure {odd[0]}; expected of {', '.join(known)}")
    columns = {name: column for name, column in known.items() if column.brief or not brief}
    if only:
        columns = {name: known[name] for name in ("cosine", *only)}
    table = [["way to personalise", *(column.label for column in columns.values())]]
    for name, row in rows.items():
        cells = [
            _interval(row[figure]) if figure in LEAD and figure in row else _cell(row, figure, column.digits)
            for figure, column in columns.items()
        ]
        table.append([_label(results, name), *cells])
    compared = {figure: column.label for figure, column in _columns(pairs.values()).items()}
    if only:
        compared = {name: compared[name] for name in ("cosine", *only) if name in compared}
    elif brief:
        compared = {name: label for name, label in compared.items() if name in ("cosine", "people", "cosine_changed")}
        compared |= {"cosine": f"face cosine [95 % interval over {_over(results)}]"}
    differences = [["paired difference", *compared.values()]]
    for name, pair in pairs.items():
        cells = [
            _interval(pair[figure]) if isinstance(pair.get(figure), dict) else _cell(pair, figure, 0)
            for figure in compared
        ]
        differences.append([_label(results, name), *cells])
    parts = [table, differences] if brief or only else [table, differences, _slices(results)]
    return [found for found in parts if len(found) > 1]


def comma_separated(named: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all rows and paired differences of several results as CSV, the figures as the files have them.

    `named` says what each results file is called. A figure with an interval has the columns `_lo` and `_hi` too.
    """
    entries = []
    for title, results in named.items():
        for name, figures in (results["rows"] | _pairs(results)).items():
            values = results.get("values", {}).get(name)  # a row in which nothing is drawn by chance has one seed
            seeds = len(next(iter(values.values()))) if values else results.get("seeds", 1)
            told = [_label(results, name), figures.get("people", results["people"]), seeds]
            entries.append(([title, name, *told], {k: v for k, v in figures.items() if k != "people"}))
    columns = []
    for figure in _columns(figures for _, figures in entries):
        spread = any(isinstance(figures.get(figure), dict) for _, figures in entries)
        columns += [(figure, part) for part in (("mean", "lo", "hi") if spread else ("mean",))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heading = [figure if part == "mean" else f"{figure}_{part}" for figure, part in columns]
    writer.writerow(["results", "name", "label", "people", "seeds", *heading])
    for named_by, figures in entries:
        values = [(figures.get(figure, ""), part) for figure, part in columns]
        cells = [v[part] if isinstance(v, dict) else v if part == "mean" else "" for v, part in values]
        writer.writerow([*named_by, *cells])
    return text.getvalue()


def _escaped(text: str) -> str:
    """Return text as LaTeX shows it; a bracket or a star at the beginning would belong to the line break above."""
    text = text.translate(str.maketrans(LATEX))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", re.sub(r"^(?=[\[*])", "{}", text))


def latex(results: Mapping[str, Any], title: str) -> str:
    """Return the tables of an evaluation for LaTeX; needs the packages booktabs and adjustbox."""
    lines = []
    for (first, *heads), *body in _tables(results, brief=False):
        lines += [r"\begin{table}", r"\centering", r"\begin{adjustbox}{max width=\linewidth}"]
        lines += [f"\\begin{{tabular}}{{l{'r' * len(heads)}}}", r"\toprule"]
        lines += [" & ".join([_escaped(first), *(f"\\rotatebox{{90}}{{{_escaped(head)}}}" for head in heads)]) + r" \\"]
        lines += [r"\midrule"]
        for label, *cells in body:
            # the interval under the mean, for a page is narrow
            split = (_escaped(cell).partition(" [") for cell in cells)
            shown = [f"\\shortstack{{{m}\\\\{{\\scriptsize [{end}}}}}" if end else m for m, _, end in split]
            lines.append(" & ".join([_escaped(label), *shown]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}"]
        lines += [f"\\caption{{{_escaped(title)}: {_escaped(_counted(results))}.}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def markdown(results: Mapping[str, Any], brief: bool = True, only: Sequence[str] = ()) -> str:
    """Return the tables of an evaluation, of the rows and columns that it has.

    The brief ones leave out the figures that COLUMNS does not call brief, and how many people and seeds there were.
    With `only` there are these figures beside the face cosine, in this order.
    """
    lines = []
    for heading, *body in _tables(results, brief, only):
        for cells in (heading, ["---"] * len(heading), *body):
            lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
        lines.append("")
    return "\n".join(lines[:-1] if brief else [*lines, _counted(results)])


def read(files: str, figures: Sequence[str] = (), folder: Path = Path()) -> str:
    """Return the tables of a results file, or of several with commas between them, with these figures."""
    named = [folder / file for file in files.split(",")]
    return markdown(load(*named) if len(named) == 1 else joined(named), only=figures)


if __name__ == "__main__":
    print(read(sys.argv[1], sys.argv[2:]))
