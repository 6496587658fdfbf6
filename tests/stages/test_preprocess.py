"""Folders of photos become aligned faces and a manifest."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import skimage.data
from PIL import Image

from hyperdb.faces.image import read_image
from hyperdb.runtime.errors import UserError
from hyperdb.stages.preprocess import Config, run, split_of


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(skimage.data.astronaut()[:256, 80:336])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(tmp_path, photo, names):
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
    return {"source": str(tmp_path / "in"), "out": str(tmp_path / "out"), "size": 64}


def test_a_folder(tmp_path, photo, capsys):
    config = make(tmp_path, photo, ["ada/1.jpg", "ada/2.png", "très (1).webp", "b.png", "b.jpg"])
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "in" / "grey.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "in" / "notes.txt").write_text("not read")
    manifest = run(Config(**config))
    out = tmp_path / "out"
    assert manifest == out / "manifest.jsonl"
    records = lines(manifest)
    assert [r["source"] for r in records] == [
        "ada/1.jpg", "ada/2.png", "b.jpg", "b.png", "très (1).webp",
    ]  # fmt: skip
    assert [r["identity"] for r in records] == ["ada", "ada", "b", "b", "très (1)"]
    assert len({r["file"] for r in records}) == 5
    for record in records:
        assert read_image(out / record["file"]).shape == (64, 64, 3)
        assert record["split"] == split_of(record["identity"])
        assert len(record["box"]) == 4
        assert record["score"] > 0.6
    reasons = {r["source"]: r["reason"] for r in lines(out / "rejected.jsonl")}
    assert reasons.keys() == {"broken.jpg", "grey.png"}
    assert "no face" in reasons["grey.png"]
    assert "2 pictures rejected" in capsys.readouterr().out


def test_resume_keeps_what_is_there(tmp_path, photo):
    config = make(tmp_path, photo, ["a.png", "b.png"])
    manifest = run(Config(**config))
    first = manifest.read_bytes()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/faces").iterdir()}
    gone = tmp_path / "out/faces/b.png"
    gone.unlink()
    (tmp_path / "out/faces/a.png.part").write_bytes(b"")
    assert run(Config(**config)).read_bytes() == first
    kept = tmp_path / "out/faces/a.png"
    assert kept.stat().st_mtime_ns == times[kept]
    assert gone.is_file()
    run(Config(**config | {"crop": 0.8}))  # another crop is another file
    assert kept.stat().st_mtime_ns != times[kept]


def test_an_interrupted_face_is_made_again(tmp_path, photo):
    config = make(tmp_path, photo, ["a.png"])
    run(Config(**config))
    face = tmp_path / "out/faces/a.png"
    whole = face.read_bytes()
    face.write_bytes(whole[:60])
    run(Config(**config))
    assert face.read_bytes() == whole


def test_output_inside_the_source_is_not_read(tmp_path, photo):
    config = make(tmp_path, photo, ["a.png"]) | {"out": str(tmp_path / "in" / "faces")}
    first = run(Config(**config)).read_bytes()
    assert run(Config(**config)).read_bytes() == first
    assert len(first.splitlines()) == 1


def test_limit_and_seed(tmp_path, photo):
    config = make(tmp_path, photo, [f"{i}.png" for i in range(6)])
    taken = {r["source"] for r in lines(run(Config(**config, limit=2)))}
    more = {r["source"] for r in lines(run(Config(**config, limit=3)))}
    assert len(taken) == 2
    assert taken < more


def test_celeba_hq(tmp_path, photo):
    config = make(tmp_path, photo, ["0.jpg", "00001.jpg", "img00000002.png", "000009.jpg", "7.jpg"])
    lists = tmp_path / "lists"
    lists.mkdir()
    identity_file = lists / "identity_CelebA.txt"
    identity_file.write_text("000119.jpg 11\n000199.jpg 11\n000200.jpg 5\n000009.jpg 8\n")
    config |= {"kind": "celeba_hq", "identity_file": str(identity_file)}
    with pytest.raises(UserError, match="CelebA-HQ-to-CelebA-mapping"):
        run(Config(**config))
    (lists / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx     orig_idx    orig_file\n"
        "0  118  000119.jpg\n1  198  000199.jpg\n2  199  000200.jpg\n"
    )
    records = lines(run(Config(**config)))
    assert {r["source"]: r["identity"] for r in records} == {
        "0.jpg": "11", "00001.jpg": "11", "img00000002.png": "5", "000009.jpg": "8",
    }  # fmt: skip
    assert [r["source"] for r in lines(tmp_path / "out/rejected.jsonl")] == ["7.jpg"]


def test_celeba_hq_needs_its_identities(tmp_path, photo):
    config = make(tmp_path, photo, ["0.jpg"]) | {"kind": "celeba_hq"}
    with pytest.raises(UserError, match="identity_file=PATH"):
        run(Config(**config))
    with pytest.raises(UserError, match="no such file"):
        run(Config(**config, identity_file=str(tmp_path / "none.txt")))
    (tmp_path / "bad.txt").write_text("000001.jpg\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 1"):
        run(Config(**config, identity_file=str(tmp_path / "bad.txt")))


def test_sfhq_images_are_their_own_people(tmp_path, photo):
    config = make(tmp_path, photo, ["images/SFHQ_pt1_1.jpg", "images/SFHQ_pt1_2.jpg"])
    records = lines(run(Config(**config, kind="sfhq")))
    assert [r["identity"] for r in records] == ["SFHQ_pt1_1", "SFHQ_pt1_2"]


def test_splits_are_by_identity_and_90_5_5():
    counts = Counter(split_of(str(i)) for i in range(10_000))
    assert np.allclose(
        [counts[s] for s in ("train", "validation", "test")], [9000, 500, 500], atol=90
    )
    assert split_of("11") == split_of("11")
    assert [split_of(str(i), 1) for i in range(99)] != [split_of(str(i), 2) for i in range(99)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "celeba"}, "kind=celeba is unknown"),
        ({"size": 5}, "size=5"),
        ({"crop": 0.0}, "crop=0.0"),
        ({"limit": 0}, "limit=0"),
        ({"source": ""}, "source is not set"),
        ({"source": "/nowhere"}, "does not exist"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UserError, match=message):
        run(Config(**{"source": "."} | values))


def test_bad_sources(tmp_path):
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(Config(source=str(tmp_path / "file.txt")))
    with pytest.raises(UserError, match="no pictures"):
        run(Config(source=str(tmp_path), out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="is the source folder"):
        run(Config(source=str(tmp_path), out=str(tmp_path)))
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="none of 1 pictures"):
        run(Config(source=str(tmp_path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_stage_imports_nothing_heavy():
    code = (
        "import sys, hyperdb.stages.preprocess; "
        "sys.exit(any(m in sys.modules for m in ('numpy', 'cv2', 'torch', 'PIL', 'tqdm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
