"""Tables from results files: `python -m hyperdb.report.table experiments/embedded/likeness/results.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hyperdb.runtime.files import load_json

EARLIER = {  # rows and labels of files that do not say their own; {steps} are those of the row's fit
    "floor": "base without adapter",
    "mean": "the average of these people's predictions",
    "shuffled": "hypernetwork, another person's photo",
    "hyper_only": "hypernetwork alone",
    "shuffled_40": "{steps} iterations begun at another person's prediction",
    "mean_40": "{steps} iterations begun at the average prediction",
    "hyper_40": "hypernetwork + {steps} iterations",
    "no_hyper_40": "{steps} iterations without the hypernetwork",
    "lidb_fit": "LiDB fitted to the photo, {steps} iterations",
    "copy": "the given photo through the autoencoder",
    "ceiling": "the person's renders through the autoencoder",
}
FURTHER = {  # columns that an evaluation with styles or a second recogniser has
    "rank1_dlib": "rank-1 by dlib",
    "rank1_styled": "rank-1 in the style",
    "style_accuracy": "style obeyed",
    "copy_pose": "pose copied",
    "copy_background": "backdrop copied",
}


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"


def _rate(value: float | dict[str, float]) -> str:
    return f"{value['mean'] if isinstance(value, dict) else value:.2f}"


def labels(results: dict[str, Any]) -> dict[str, str]:
    """Return the label of each row of an evaluation, in the order of the table."""
    rows = results["rows"]
    if all("label" in row for row in rows.values()):
        return {name: row["label"] for name, row in rows.items()}
    fits = results["fits"]
    steps = {name: fits.get(name, fits["finetune"])["steps"] for name in EARLIER}
    return {name: label.format(steps=steps[name]) for name, label in EARLIER.items() if name in rows}


def markdown(results: dict[str, Any]) -> str:
    """Return the likeness table of an evaluation, of the rows and columns that it has."""
    further = {name: label for name, label in FURTHER.items() if name in next(iter(results["rows"].values()))}
    lines = [f"| {' | '.join(['embedded base', 'face cosine', 'rank-1', *further.values()])} |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(further))
    known = labels(results)
    for name, label in known.items():
        row = results["rows"][name]
        cells = [label, _interval(row["cosine"]), _rate(row["rank1"]), *(_rate(row[key]) for key in further)]
        lines.append(f"| {' | '.join(cells)} |")
    over = "people and seeds" if results.get("seeds", 1) > 1 else "people"
    lines += ["", f"| paired difference | mean [95 % interval over {over}] |", "| --- | --- |"]
    for name, value in results["paired"].items():
        lines.append(f"| {' − '.join(known[row] for row in name.split('-'))} | {_interval(value)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(load_json(Path(sys.argv[1]))))
