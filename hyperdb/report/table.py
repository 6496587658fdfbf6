"""Tables from results files: `python -m hyperdb.report.table experiments/embedded/likeness/results.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hyperdb.runtime.files import load_json

FURTHER = {  # columns that an evaluation with styles, changed prompts or a second recogniser has
    "rank1_dlib": "rank-1 by dlib",
    "cosine_changed": "face cosine, changed prompt",
    "rank1_styled": "rank-1 in the style",
    "style_accuracy": "style obeyed",
    "copy_pose": "pose copied",
    "copy_background": "backdrop copied",
}


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"


def _cell(row: dict[str, Any], figure: str) -> str:
    if figure not in row:
        return "—"
    mean = row[figure]["mean"] if isinstance(row[figure], dict) else row[figure]
    return f"{mean:.{3 if figure.startswith('cosine') else 2}f}"


def markdown(results: dict[str, Any]) -> str:
    """Return the likeness table of an evaluation, of the rows and columns that it has."""
    rows = results["rows"]
    further = {name: label for name, label in FURTHER.items() if any(name in row for row in rows.values())}
    lines = [f"| {' | '.join(['embedded base', 'face cosine', 'rank-1', *further.values()])} |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(further))
    for row in rows.values():
        cells = [row["label"], _interval(row["cosine"]), *(_cell(row, figure) for figure in ("rank1", *further))]
        lines.append(f"| {' | '.join(cells)} |")
    over = "people and seeds" if results.get("seeds", 1) > 1 else "people"
    lines += ["", f"| paired difference | mean [95 % interval over {over}] |", "| --- | --- |"]
    for name, value in results["paired"].items():
        lines.append(f"| {' − '.join(rows[row]['label'] for row in name.split('-'))} | {_interval(value)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(load_json(Path(sys.argv[1]))))
