"""The page of gradio: what it offers, what it serves and what not, over HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page is made with gradio: pip install -e '.[web]'")

ROOT = Path(__file__).parents[2]


def get(url: str, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url + path, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Refused(Exception):
    """Gradio itself refuses an event."""


def named(path: str) -> dict:
    """Return what a page says of a file."""
    return {"path": path, "url": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}


def call(url: str, name: str, values: list, visitor: str = "somebody") -> list:
    """Send an event as the page does, and return what comes out of it in the end."""
    config = json.loads(get(url, "/config")[1])
    number = next(one["id"] for one in config["dependencies"] if one["api_name"] == name)
    body = json.dumps({"fn_index": number, "data": values, "session_hash": visitor}).replace("\\\\u", "\\u").encode()
    asked = urllib.request.Request(f"{url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(asked, timeout=30).close()
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={visitor}", timeout=120) as answers:
        for line in answers:
            told = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if told.get("msg") == "process_generating":
                last = told["output"]["data"]
            if told.get("msg") == "process_completed":
                if not told["success"]:
                    raise Refused(told)
                return last
    raise AssertionError("no answer")


def test_it_serves_its_own_alone_and_leaves_nothing(tmp_path, words, served):
    with served(tmp_path, *words) as (url, temporary, server):
        status, page = get(url, "/")
        assert status == 200
        # nothing is fetched from elsewhere
        assert not re.search(rb'<(?:script|link)[^>]*(?:src|href)="?https?://(?!127\.0\.0\.1)', page)
        assert get(url, "/gradio_api/file=/etc/passwd")[0] == 403
        assert get(url, f"/gradio_api/file={ROOT}/README.md")[0] == 403
        assert get(url, "/gradio_api/file=http://127.0.0.1/x") == (404, b"only what was made here is served")
        assert get(url, "/gradio_api/proxy=http://127.0.0.1/x")[0] == 404
        assert json.loads(get(url, "/gradio_api/info")[1])["named_endpoints"] == {}
        (root,) = temporary.glob("hyperdb-web-*")
        assert root.stat().st_mode & 0o077 == 0
        assert "no such face" in str(call(url, "face", [1]))
        for sent in (None, named(str(root))):
            assert "no file that was uploaded here" in str(call(url, "photo", [sent, False]))
        for sent in ("x", named("/etc/passwd"), named(str(ROOT / "docs" / "preview.png"))):
            with pytest.raises(Refused):
                call(url, "photo", [sent, False])
        for path in ("http://127.0.0.1/x.png", "\\u0068ttps://example.org/x.png"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                call(url, "photo", [named(path), False])
        with pytest.raises(urllib.error.HTTPError, match="404"):
            call(url, "face", ["x" * 200_000])
        names(json.loads(get(url, "/config")[1])["components"])
        port = url.rpartition(":")[2]
        command = [sys.executable, "-m", "hyperdb", "web", f"port={port}", *words, f"out={tmp_path / 'other'}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith(f"hyperdb: error: host=127.0.0.1 port={port} cannot be served")
        assert len(done.stderr.splitlines()) == 1
    assert server.returncode == 0
    assert not root.exists()


def names(components: list[dict]) -> None:
    """Whatever can be used is called something."""
    kinds = {"image", "checkbox", "radio", "textbox", "dropdown", "slider", "number", "gallery"}
    used = [part for part in components if part["type"] in kinds]
    assert {part["type"] for part in used} == kinds
    assert all(part["props"]["label"] for part in used)
    buttons = [part["props"] for part in components if part["type"] in ("button", "downloadbutton")]
    assert len(buttons) > 10
    assert all(props.get("label") or props["value"] for props in buttons)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diffusion.size=96"], "only ever seen rendered heads, at 96 × 96 pixels"),
        (["diffusion=sd15", "hypernet=null"], "The base behind this page is stable-diffusion-v1-5, at 512 × 512"),
    ],
)
def test_the_base_is_named(words, said):
    from hyperdb import config
    from hyperdb.web.page import limits

    assert said in limits(config.load("web", words))
