"""How many pictures a second `hyperdb render_heads` draws on this machine, everything on.

    python benchmarks/render.py [people] [repeats]

Renders people of the training split, six pictures each, into a temporary folder with one process a core. Prints the
median of the repeats, writes render.json beside this file.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hyperdb import config
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages import render_heads


def main(people: int = 400, repeats: int = 3) -> None:
    """Render afresh each time, print, write."""
    cores, rates = os.cpu_count() or 1, []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            words = [f"identities={people}", f"workers={cores}", f"out={folder}"]
            settings = config.load("render_heads", words)
            began = time.perf_counter()
            render_heads.run(settings)
            rates.append(people * settings.views / (time.perf_counter() - began))
    result = {"images_per_second": round(statistics.median(rates), 1), "size": settings.size, "cores": cores}
    result |= {"people": people, "views": settings.views, "repeats": repeats, **provenance()}
    save_json(Path(__file__).with_suffix(".json"), result)
    print(result)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
