"""Tables from results files: `python -m hyperdb.report.table experiments/embedded/first_evidence/results.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hyperdb.runtime.files import load_json

ROWS = {
    "floor": "base without adapter",
    "mean": "the average of these people's predictions",
    "shuffled": "hypernetwork, another person's photo",
    "hyper_only": "hypernetwork alone",
    "hyper_40": "hypernetwork + 40 iterations",
    "no_hyper_40": "40 iterations without the hypernetwork",
    "lidb_fit": "LiDB fitted to the photo, 200 iterations",
    "ceiling": "the person's renders through the autoencoder",
}


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"


def markdown(results: dict[str, Any]) -> str:
    """Return the likeness table of an evaluation, of the rows that it has."""
    lines = ["| embedded base | face cosine | rank-1 | face found |", "| --- | --- | --- | --- |"]
    for name, label in ROWS.items():
        if (row := results["rows"].get(name)) is not None:
            lines.append(f"| {label} | {_interval(row['cosine'])} | {row['rank1']:.2f} | {row['detected']:.2f} |")
    lines += ["", "| paired difference | mean [95 % interval over people] |", "| --- | --- |"]
    lines += [f"| {name.replace('-', ' − ')} | {_interval(value)} |" for name, value in results["paired"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(load_json(Path(sys.argv[1]))))
