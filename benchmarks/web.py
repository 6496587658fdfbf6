"""Visitors of the page who come at once, on loopback: does any fail, is the order kept, does the memory grow.

    python benchmarks/web.py [visitors] [iterations]

Serves the page for itself, lets the visitors ask for a personalisation one after the other without waiting for the
first, and then one more than the line holds. Prints a line a visitor and writes web.json beside this file.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance

ROOT = Path(__file__).parents[1]


def events(url: str, numbers: dict[str, int], name: str, values: list[Any], visitor: str) -> Any:
    """Send an event as the page does, and yield the text of what comes back, as it comes."""
    body = json.dumps({"fn_index": numbers[name], "data": values, "session_hash": visitor}).encode()
    asked = urllib.request.Request(f"{url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(asked, timeout=60).close()
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={visitor}", timeout=3600) as answers:
        for line in answers:
            told = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if told.get("msg") == "process_generating":
                yield json.dumps(told["output"]["data"])
            elif told.get("msg") == "process_completed":
                if not told["success"]:
                    raise RuntimeError(told)
                return


def memory(process: int) -> float:
    """Return the resident megabytes of a process."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1024


class Visitor(threading.Thread):
    """Chooses an example person and asks for the personalisation."""

    def __init__(self, number: int, url: str, numbers: dict[str, int], process: int) -> None:
        super().__init__(daemon=True)
        self.number, self.url, self.numbers, self.process = number, url, numbers, process
        self.in_line = threading.Event()
        self.ahead: list[int] = []
        self.began = self.ended = self.left = self.megabytes = 0.0
        self.said = ""

    def run(self) -> None:
        me = f"visitor-{self.number}"
        for _ in events(self.url, self.numbers, f"example_{self.number % 4}", [], me):
            pass
        asked = time.perf_counter()
        for said in events(self.url, self.numbers, "personalise", [f"Visitor {self.number}", False], me):
            self.said = said
            if found := re.findall(r"(\d+) before you|You are next", said):
                self.ahead.append(int(found[0] or 0))
            elif not self.began:
                self.began = time.perf_counter() - asked
            self.in_line.set()
        self.ended, self.left = time.perf_counter() - asked, time.perf_counter()
        self.megabytes = round(memory(self.process), 1)
        print(f"visitor {self.number:2d}: {self.began:6.1f} s in line, {self.ended:6.1f} s in all, "
              f"{self.megabytes:.0f} MB", flush=True)  # fmt: skip
        self.in_line.set()


def main(visitors: int = 20, iterations: int = 40) -> None:
    """Serve, visit, print, write."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        words = [f"port={port}", f"waiting={visitors - 1}", f"finetune.steps={iterations}"]
        log = Path(folder) / "log"
        with log.open("wb") as out:
            server = subprocess.Popen([sys.executable, "-m", "hyperdb", "web", *words], stdout=out, stderr=out,
                                      env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder})  # fmt: skip
        try:
            while "the page is at" not in log.read_text(encoding="utf-8"):
                if server.poll() is not None:
                    raise SystemExit(log.read_text(encoding="utf-8"))
                time.sleep(0.5)
            result = visit(f"http://127.0.0.1:{port}", server.pid, visitors)
        finally:
            server.terminate()
            server.wait(60)
    result |= {"iterations": iterations, "cores": os.cpu_count(), **provenance()}
    save_json(Path(__file__).with_suffix(".json"), result)


def visit(url: str, process: int, visitors: int) -> dict[str, Any]:
    """Let them come, and return what became of them."""
    with urllib.request.urlopen(f"{url}/config", timeout=60) as answer:
        numbers = {one["api_name"]: one["id"] for one in json.load(answer)["dependencies"]}
    everybody = [Visitor(number, url, numbers, process) for number in range(visitors)]
    for one in everybody:
        one.start()
        one.in_line.wait()  # the order is that in which they stand in line
    late = Visitor(visitors, url, numbers, process)
    late.start()
    for one in [*everybody, late]:
        one.join()
    done = [one.number for one in sorted(everybody, key=lambda one: one.left)]
    failed = [one.number for one in everybody if "made in" not in one.said]
    falls = all(one.ahead == sorted(one.ahead, reverse=True) for one in everybody)
    return {
        "visitors": visitors,
        "failed": failed,
        "in_order": done == sorted(done) and falls,
        "one_too_many_is_told": "people are waiting already" in late.said,
        "seconds_in_line": [round(one.began, 2) for one in everybody],
        "seconds_in_all": [round(one.ended, 2) for one in everybody],
        "megabytes": [one.megabytes for one in everybody],
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
