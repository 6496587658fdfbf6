"""Six stages killed at random moments and started again, on tiny settings: do they end as an undisturbed run does?

    python benchmarks/kills.py [kills]

Runs the slow test of tests/test_surviving.py, which compares what the runs left bit by bit, and writes the moments of
the kills and what came of each stage into kills.json beside this file. Ends with exit code 1 unless all are equal.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance

ROOT = Path(__file__).parents[1]
STAGES = ("render_heads", "preprocess", "precompute", "train_hypernet", "personalize", "evaluate")
TEST = "tests/test_surviving.py::test_a_killed_run_ends_as_an_undisturbed_one"


def told(report: Path) -> tuple[dict[str, str], bool]:
    """Return the properties of the test of a report, and whether it passed; without a report, none, and it did not."""
    try:
        case = next(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError, StopIteration):
        return {}, False
    passed = not any(case.find(why) is not None for why in ("failure", "error", "skipped"))
    return {one.get("name", ""): one.get("value", "") for one in case.iter("property")}, passed


def main(kills: int = 25) -> bool:
    """Kill, print, write; return whether all are equal."""
    stages: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            done = subprocess.run([sys.executable, "-m", "pytest", "-m", "slow", f"{TEST}[{stage}]", "--kills",
                                   str(kills), f"--junitxml={report}"], cwd=ROOT)  # fmt: skip
            properties, passed = told(report)
        moments = properties.get("killed_after", "").split()  # none if it failed on the way
        equal = passed and done.returncode == 0 and len(moments) == kills
        stages[stage] = {"equal": equal, "killed_after_seconds": [float(moment) for moment in moments],
                         "seconds_undisturbed": float(properties.get("seconds", 0))}  # fmt: skip
        print(f"{stage:15s} {'equal' if equal else 'NOT EQUAL'} after {len(moments)} kills, pytest {done.returncode}")
        save_json(Path(__file__).with_suffix(".json"), {"kills": kills, "stages": stages, **provenance()})
    return all(stage["equal"] for stage in stages.values())


if __name__ == "__main__":
    sys.exit(not main(*map(int, sys.argv[1:])))
