"""What goes to the hub: an endpoint on this machine answers as the hub does, and keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from hyperdb import config
from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.data.people import load_people
from hyperdb.faces.image import save_png
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError

TOKEN = "hf_of_this_test"


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that an upload calls; what was sent is in `server.files`, how in `server.repository`."""

    def log_message(self, *_):
        pass

    def _answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        self.wfile.write(body)

    def _path(self):
        """Return what was asked for, of a model or a data set."""
        return re.sub("/(models|datasets)(?=/)", "", self.path)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, here, path = self.server, f"http://127.0.0.1:{self.server.server_port}", self._path()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            hub.repository = json.loads(body)
            self._answer({"url": f"{here}/me/ada"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/me/ada/preupload/main":
            asked = json.loads(body)["files"]
            modes = {file["path"]: "regular" if file["path"].endswith(".md") else "lfs" for file in asked}
            self._answer(
                {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            )
        elif path == "/me/ada.git/info/lfs/objects/batch":
            told = json.loads(body)["objects"]
            for one in told:
                one["actions"] = {"upload": {"href": f"{here}/storage/{one['oid']}"}}
            self._answer({"transfer": "basic", "objects": told})
        elif path == "/api/me/ada/commit/main":
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            self._answer({"commitUrl": f"{here}/me/ada/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"error": f"no such route: {self.path}"}, 404)

    def do_GET(self):
        hub = self.server
        there = [{"rfilename": name} for name in hub.files]
        if "/tree/" in self._path():  # of a data set in which nothing is yet
            self._answer(*([{"error": "no such folder"}, 404] if "/data" in self._path() else [[]]))
        else:
            self._answer({"id": "me/ada", "sha": "0" * 40, "private": hub.private, "siblings": there})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == name
        self.server.stored[name] = body
        self._answer({})


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.stored, server.repository, server.private = {}, {}, None, True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def person(in_tmp):
    layout = Layout((Layer("unet.tall", (40, 12)), Layer("unet.flat", (9, 30))))
    lidb = LiDBConfig(a=8, b=5)
    g = torch.Generator().manual_seed(0)
    made = Personalization(layout, torch.randn(lidb.build(layout).mask.shape, generator=g), lidb, "0123", "zwx", "face")
    made.save(in_tmp / "ada" / "adapter.safetensors")
    for name in ("preview.png", "pictures.png"):
        save_png(in_tmp / "ada" / name, torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), {"software": "hyperdb"})
    return in_tmp / "ada"


WORDS = ["name=ada", "format=native", "push_to_hub=me/ada"]


def _python(hub, folder, *words, **environment):
    around = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN}
    around |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *words], env=os.environ | around | environment, cwd=folder, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def _export(person, hub, *more, **environment):
    words = ["-m", "hyperdb", "export", f"adapter={person}", "out=out", *WORDS, *more]
    return _python(hub, person.parent, *words, **environment)


def test_adapter_card_and_pictures_arrive(person, hub):
    done = _export(person, hub)
    assert done.returncode == 0, done.stderr
    assert hub.repository == {"name": "ada", "organization": "me", "visibility": "private"}
    here = {name: Path(person.parent / "out" / name).read_bytes() for name in ("ada.safetensors", "README.md")}
    assert set(hub.files) == {"ada.safetensors", "README.md", "pictures.png"}  # not preview.png: it has the photo
    assert hub.files["ada.safetensors"] == here["ada.safetensors"]
    assert hub.files["pictures.png"] == (person / "pictures.png").read_bytes()
    card = hub.files["README.md"].decode()
    assert "![Pictures of the person](pictures.png)" in card
    assert card.replace("\n![Pictures of the person](pictures.png)\n", "") == here["README.md"].decode()
    assert f"/me/ada/commit/{'0' * 40}" in done.stdout
    again = _export(person, hub, "private=false")  # neither this nor where it goes decides what is written
    assert again.returncode == 0, again.stderr
    assert hub.repository["visibility"] == "public"


def test_a_repository_that_is_there_keeps_its_card_and_its_pictures(person, hub):
    hub.files = {"README.md": b"of the owner", "bob.safetensors": b"bob", "pictures.png": b"of bob"}
    for _ in range(2):  # the second time too
        done = _export(person, hub)
        assert done.returncode == 0, done.stderr
        assert hub.files["README.md"] == b"of the owner"
        assert hub.files["pictures.png"] == b"of bob"
        assert b"![Pictures of the person](ada.png)" in hub.files["ada.md"]
        assert hub.files["ada.png"] == (person / "pictures.png").read_bytes()


def test_pictures_of_others_stay_here(person, hub):
    save_png(person / "pictures.png", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    done = _export(person, hub)
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == {"ada.safetensors", "README.md"}


def test_a_face_does_not_become_public_by_the_repository_that_is_there(person, hub):
    hub.private = False
    done = _export(person, hub)
    assert done.returncode == 2
    assert "is there and public, and nothing was uploaded" in done.stderr
    assert hub.files == {}
    assert _export(person, hub, "private=false").returncode == 0


@pytest.mark.parametrize("token", ["hf_of_another", ""])
def test_a_refused_upload_is_one_line(person, hub, token):
    done = _export(person, hub, HF_TOKEN=token)
    (said,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2
    assert not hub.files
    assert ("401" in said) if token else ("hf auth login" in said)
    assert (person.parent / "out" / "ada.safetensors").exists() == bool(token)  # without any, nothing is begun


def test_what_would_be_uploaded_is_said(person, capsys):
    out = config.run("export", [f"adapter={person}", "out=out", *WORDS, "upload=false"])
    said = capsys.readouterr().out
    assert "me/ada, which would be private" in said
    for name in ("README.md", "pictures.png", "ada.safetensors"):
        assert f"  {name}, " in said
    assert f"  ada.safetensors, {(out / 'ada.safetensors').stat().st_size:,} bytes" in said


def test_people_who_were_rendered_arrive_and_are_read_again(rendered, hub, in_tmp):
    program = "import sys, datasets; datasets.load_from_disk(sys.argv[1]).push_to_hub('me/ada')"
    done = _python(hub, in_tmp, "-c", program, str(rendered))
    assert done.returncode == 0, done.stderr
    (table,) = [name for name in hub.files if name.endswith(".parquet")]
    (in_tmp / "heads.parquet").write_bytes(hub.files[table])
    here, there = load_people(rendered), load_people("heads.parquet", split=None)
    assert torch.equal(here.images[:], there.images[:])
    assert (here.captions, here.seed.tolist()) == (there.captions, there.seed.tolist())


@pytest.mark.parametrize("name", ["ada", "me/ada/more", "me/a da", "/ada"])
def test_no_repository(person, name):
    with pytest.raises(UserError, match="expected a repository of the hub, org/name"):
        config.load("export", [f"adapter={person}", f"push_to_hub={name}"])
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        config.run("export", [f"adapter={person}", "out=out", *WORDS])
    assert not Path("out").exists()
