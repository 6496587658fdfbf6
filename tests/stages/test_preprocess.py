"""Folders of photos become aligned faces and a manifest."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import skimage.data
from PIL import Image

from hyperdb.data.people import load_people
from hyperdb.faces.image import read_image
from hyperdb.runtime.errors import UserError
from hyperdb.stages.preprocess import Config, run, split_of
from hyperdb.stages.status import examine


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(skimage.data.astronaut()[:256, 80:336])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(tmp_path, photo, names):
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, format=None if path.suffix else "JPEG")
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
    for other in ({"crop": 0.8}, {"source": str(tmp_path)}):
        with pytest.raises(UserError, match=f"with other {next(iter(other))}.*out=FOLDER"):
            run(Config(**config | other))
    assert kept.stat().st_mtime_ns == times[kept]


def test_shards_crop_what_the_whole_lists(tmp_path, photo, monkeypatch, capsys):
    config = make(tmp_path, photo, ["a.png", "b.png", "c.png"])
    (tmp_path / "in" / "d.png").write_bytes(b"no picture")
    whole = run(Config(**config | {"out": str(tmp_path / "whole")}))
    out = tmp_path / "out"
    for shard, faces in ((1, {"b.png"}), (0, {"a.png", "b.png", "c.png"})):
        assert run(Config(**config, shard=shard, num_shards=2)) == out
        assert {p.name for p in (out / "faces").iterdir()} == faces
        assert not list(out.glob("*.jsonl"))
    assert "2 faces of shard 0 of 2 are in" in capsys.readouterr().out
    counted = f"{'faces of pictures':20} 3 of {{}} done, {{}} missing; {{}}"
    assert examine(out)[0] == counted.format(4, 1, "there is no manifest of all yet")
    monkeypatch.setattr("hyperdb.faces.align.crop", None)  # every face is there
    assert run(Config(**config)).read_bytes() == whole.read_bytes()
    assert (out / "rejected.jsonl").read_bytes() == (tmp_path / "whole" / "rejected.jsonl").read_bytes()
    assert examine(out)[0] == counted.format(3, 0, "1 rejected, the manifest is written")


def test_files_that_are_somebodys_are_kept(tmp_path, photo):
    config = make(tmp_path, photo, ["a.png"])
    own = tmp_path / "out" / "faces" / "a.png"
    own.parent.mkdir(parents=True)
    photo.save(own)
    before = own.read_bytes()
    with pytest.raises(UserError, match=r"faces/a\.png"):
        run(Config(**config))
    assert own.read_bytes() == before


def test_a_name_whose_bytes_are_not_utf8(tmp_path, photo):
    config = make(tmp_path, photo, [os.fsdecode(b"Zo\xeb.jpg"), "Zoë.png"])
    manifest = run(Config(**config))
    records = lines(manifest)
    assert sorted(r["source"] for r in records) == sorted([os.fsdecode(b"Zo\xeb.jpg"), "Zoë.png"])
    assert all((tmp_path / "in" / r["source"]).is_file() and (tmp_path / "out" / r["file"]).is_file() for r in records)
    assert "Zoë" in manifest.read_text(encoding="utf-8")
    assert len(load_people(tmp_path / "out", split=None)) == 2
    assert run(Config(**config)) == manifest


def test_an_identity_list_in_latin1_names_file_line_and_encoding(tmp_path, photo):
    config = make(tmp_path, photo, ["a.png"])
    (tmp_path / "list.txt").write_bytes("a.png ada\nb.png Zoë\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.txt is not UTF-8 text .line 2 has the byte 0xeb"):
        run(Config(**config, identity_file=str(tmp_path / "list.txt")))
    (tmp_path / "list.txt").write_bytes("a.png Zoë\n".encode("utf-8-sig"))
    assert lines(run(Config(**config, identity_file=str(tmp_path / "list.txt"))))[0]["identity"] == "Zoë"


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


def test_every_picture_is_read_or_named(tmp_path, photo):
    import pillow_heif

    pillow_heif.register_heif_opener()
    config = make(tmp_path, photo, ["a.jpg", "b.jfif", "IMG_2.JPE", "IMG_1.HEIC", "c.TIF", "photo", ".hidden.jpg"])
    there = tmp_path / "in"
    photo.save(there / "c.png.bak", format="PNG")
    (there / ".thumbs").mkdir()
    photo.save(there / ".thumbs" / "d.png")
    (there / "raw.CR2").write_bytes(b"II*\0 raw")
    (there / "film.mov").write_bytes(b"\0\0\0\x14ftypqt  ")
    (there / "cut.heic").write_bytes((there / "IMG_1.HEIC").read_bytes()[:900])
    (there / "nowhere.jpg").symlink_to(tmp_path / "none.jpg")
    (there / "notes.txt").write_text("no picture")
    (there / "list").write_text("no picture")
    read = {r["source"] for r in lines(run(Config(**config)))}
    assert read == {"a.jpg", "b.jfif", "IMG_2.JPE", "IMG_1.HEIC", "c.TIF", "photo", "c.png.bak"}
    reasons = {r["source"]: r["reason"] for r in lines(tmp_path / "out/rejected.jsonl")}
    assert reasons.keys() == {".hidden.jpg", ".thumbs/d.png", "raw.CR2", "film.mov", "cut.heic", "nowhere.jpg"}
    assert "hidden" in reasons[".hidden.jpg"]
    assert "hidden" in reasons[".thumbs/d.png"]
    assert ".cr2 files are not read" in reasons["raw.CR2"]
    assert "link to nothing" in reasons["nowhere.jpg"]


def test_a_folder_of_pictures_that_are_not_read_says_which(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "raw.nef").write_bytes(b"raw")
    with pytest.raises(UserError, match=r"no pictures in .*raw\.nef: \.nef files are not read"):
        run(Config(source=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_links_to_folders_are_followed_once(tmp_path, photo):
    config = make(tmp_path, photo, ["ada/1.png"])
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    photo.save(tmp_path / "elsewhere" / "deep" / "2.png")
    (tmp_path / "in" / "bob").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "aaa").symlink_to(tmp_path / "in" / "ada")
    (tmp_path / "in" / "ada" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    records = lines(run(Config(**config)))
    assert [(r["source"], r["identity"]) for r in records] == [("ada/1.png", "ada"), ("bob/deep/2.png", "bob")]
    reasons = {r["source"]: r["reason"] for r in lines(tmp_path / "out/rejected.jsonl")}
    assert reasons.keys() == {"aaa", "ada/round", "up"}
    assert all("the same folder as" in reason for reason in reasons.values())
    assert "ada" in reasons["aaa"]


def test_a_change_of_the_content_makes_the_face_again(tmp_path, photo):
    """An orientation tag that is changed in place leaves name and size as they were."""
    config = make(tmp_path, photo, [])
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jpg"
    exif, upright = Image.Exif(), Image.Exif()
    exif[0x0112], upright[0x0112] = 8, 1
    photo.save(path, exif=exif, quality=95)
    wrong = path.read_bytes()
    photo.save(path, exif=upright, quality=95)
    assert len(path.read_bytes()) == len(wrong)
    first = lines(run(Config(**config)))[0]
    face = (tmp_path / "out/faces/a.png").read_bytes()
    path.write_bytes(wrong)
    second = lines(run(Config(**config)))[0]
    assert second["box"] != first["box"]
    assert "does not stand upright" in second["notices"][0]
    photo.save(path, exif=upright, quality=95)
    assert lines(run(Config(**config)))[0] == first
    assert (tmp_path / "out/faces/a.png").read_bytes() == face


def test_a_face_that_would_become_somebody_else_is_rejected(tmp_path, photo, capsys):
    config = make(tmp_path, photo, ["whole.png"])
    photo.crop((150, 0, 256, 256)).save(tmp_path / "in" / "cut.png")
    photo.rotate(180).save(tmp_path / "in" / "turned.png")
    records = {r["source"]: r for r in lines(run(Config(**config | {"crop": 0.8})))}
    assert records.keys() == {"whole.png", "turned.png"}
    assert "180 degrees" in records["turned.png"]["notices"][0]
    x, y, w, h = records["whole.png"]["box"]
    turned = records["turned.png"]["box"]
    assert np.allclose([255 - x - w, 255 - y - h, w, h], turned, atol=0.2)
    faces = [read_image(tmp_path / "out" / r["file"]).astype(int) for r in records.values()]
    assert np.abs(faces[0] - faces[1]).mean() < 1
    assert "cut by the frame" in lines(tmp_path / "out/rejected.jsonl")[0]["reason"]
    assert "were turned upright" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["00000/00000.png", "00000/00001.png", "01000/01000.png"], "2 folders named by numbers (00000, ...)"),
        (["faces/00000/1.png", "faces/01000/2.png"], "all 2 pictures are taken for one person, faces"),
        (["train/ada/1.png", "val/bob/2.png"], "train, val are taken for one person each; if they divide people"),
        (["ada/1.png", "bob/2.png"], None),
        (["1.png", "2.png"], None),
        (["ada/1.png", "ada/2.png"], None),
    ],
)
def test_folders_that_are_no_people_are_hinted_at(tmp_path, photo, capsys, names, said):
    config = make(tmp_path, photo, names)
    run(Config(**config))
    out = capsys.readouterr().out
    assert ("for one person" in out) == (said is not None)
    assert (said or "") in out
    assert ("kind=sfhq" in out) == (said is not None)
    run(Config(**config, kind="sfhq"))
    assert "for one person" not in capsys.readouterr().out


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
    inside = tmp_path / "people" / "raw"
    inside.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(inside / "black.png")
    with pytest.raises(UserError, match="none of 1 pictures"):  # which lie in the folder that is written
        run(Config(source=str(inside), out=str(inside.parent)))
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    shutil.rmtree(inside.parent)
    with pytest.raises(UserError, match="none of 1 pictures"):
        run(Config(source=str(tmp_path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_stage_imports_nothing_heavy():
    code = (
        "import sys, hyperdb.stages.preprocess; "
        "sys.exit(any(m in sys.modules for m in ('numpy', 'cv2', 'torch', 'PIL', 'tqdm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_is_no_fault_of_a_picture(tmp_path, photo, monkeypatch):
    config = make(tmp_path, photo, ["a.png", "b.png"])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.png: No space left on device"):
        run(Config(**config))
    assert not list((tmp_path / "out").rglob("*.png"))
    assert not (tmp_path / "out" / "rejected.jsonl").exists()
