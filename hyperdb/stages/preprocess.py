"""Turn a folder of photos, CelebA-HQ or SFHQ into aligned faces and a manifest.

    hyperdb preprocess source=photos out=data/mine
    hyperdb preprocess kind=celeba_hq source=CelebA-HQ-img identity_file=identity_CelebA.txt

Writes `faces/*.png`, `manifest.jsonl` (file, source, identity, split, box, score) and
`rejected.jsonl` (source, reason) into `out`: every picture below `source`, or within `limit`, is in one of the two.
Running it again keeps the faces that are there. With `num_shards` a job crops every so many-th picture, its `shard`;
when all are done, the same command without `shard` and `num_shards` writes the two lists.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperdb.runtime.errors import UserError, WriteError
from hyperdb.runtime.files import load_text, save_lines
from hyperdb.runtime.output import claim, release
from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.recipe import recipe
from hyperdb.runtime.seed import derive, split_of
from hyperdb.runtime.share import Share

KINDS = ("folder", "celeba_hq", "sfhq")
# Pictures, or files with pictures in them, that are not read; beside what `mimetypes` calls image or video.
UNREAD = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"}  # of cameras
UNREAD |= {".exr", ".hdr", ".jxl", ".jxr", ".svg", ".xcf", ".pdf", ".ps", ".eps", ".mpg", ".mpeg"}
WRITES = ("faces/*.png", "manifest.jsonl", "rejected.jsonl")
KEPT = "finished faces are kept"
IDENTITIES = "identity_CelebA.txt"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"


@dataclass
class Config(Share):
    """What to read, where to write, and how to crop.

    `crop` is the framing (1.0 = FFHQ, 0.8 = the embedded base), `size` the side in pixels,
    `limit` the number of pictures taken (a choice by `seed`); `seed` also decides the split.
    """

    source: FilePath = ""
    out: FilePath = "data/faces"
    size: int = 512
    crop: float = 1.0
    identity_file: FilePath | None = None
    kind: str = "folder"
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind} is unknown; choose one of {', '.join(KINDS)}")
        if not 32 <= self.size <= 4096:
            raise UserError(f"size={self.size} is out of range; choose 32 to 4096 pixels")
        if not 0.3 <= self.crop <= 3:
            raise UserError(f"crop={self.crop} is out of range; choose 0.3 to 3 (1.0 = FFHQ)")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit} leaves nothing; choose 1 or more, or null")


def _files(root: Path, out: Path, left_out: dict[Path, str]) -> list[Path]:
    """List the files below `root`, relative to it, through links to folders too; never those in `out`.

    Folders and links that lead nowhere new are added to `left_out`.
    """
    found = []
    seen = {root.resolve(): root}

    def fail(error: OSError) -> None:
        left_out[Path(error.filename).relative_to(root)] = f"the folder cannot be read ({error.strerror})"

    for name, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folder = Path(name)
        folders.sort(key=lambda inner: ((folder / inner).is_symlink(), inner))
        for inner in folders.copy():
            path = folder / inner
            there = path.resolve()
            if there.is_relative_to(out):
                folders.remove(inner)
            elif there in seen or root.resolve().is_relative_to(there):
                folders.remove(inner)
                left_out[path.relative_to(root)] = f"the same folder as {seen.get(there, there)}"
            else:
                seen[there] = path
        paths = [folder / file for file in files]
        found += [path.relative_to(root) for path in paths if not path.resolve().is_relative_to(out)]
    return found


def _why_left_out(path: Path, readable: set[str]) -> str | None:
    """Return "" for a picture to read, a reason for one that is left out, None for what is no picture at all.

    Judged by the name, and for a name that says nothing by the first bytes.
    """
    from hyperdb.faces.image import is_image

    suffix = path.suffix.lower()
    kind = (mimetypes.guess_type(f"a{suffix}")[0] or "").partition("/")[0]
    named = suffix in readable or suffix in UNREAD or kind in ("image", "video")
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() and (named or not suffix) else None
    if named:
        return "" if suffix in readable else f"{suffix} files are not read; save the picture as JPEG or PNG"
    return "" if is_image(path) else None


def _pictures(config: Config) -> tuple[list[Path], dict[Path, str]]:
    """List the pictures below `source`, relative to it, and why others are left out; never our own output."""
    from hyperdb.faces.image import suffixes

    root, out = Path(config.source), Path(config.out).resolve()  # of which it writes pictures into faces/ alone
    if not config.source:
        raise UserError("source is not set; give the folder of photos: source=FOLDER")
    if root.is_file():
        raise UserError(f"source={root} is a file; give its folder")
    if not root.is_dir():
        raise UserError(f"source={root} does not exist; check the spelling")
    if out == root.resolve():
        raise UserError(f"out={config.out} is the source folder; choose another folder")
    readable = suffixes() - UNREAD
    found: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in _files(root, out / "faces", left_out):
        reason = _why_left_out(root / path, readable)
        if reason is not None and any(part.startswith(".") for part in path.parts):
            reason = "hidden: its name, or that of its folder, begins with a dot"
        if reason:
            left_out[path] = reason
        elif reason is not None:
            found.append(path)
    if not found:
        reasons = "".join(f"; {path}: {reason}" for path, reason in sorted(left_out.items())[:1])
        raise UserError(f"no pictures in {root}; expected files like .jpg, .png or .heic{reasons}")
    found.sort()
    if config.limit is not None and len(found) > config.limit:
        found.sort(key=lambda p: derive(config.seed, "limit", p.as_posix()))
        found = sorted(found[: config.limit])
    return found, left_out


def _read_columns(path: Path, count: int) -> list[list[str]]:
    """Read a text table of `count` columns separated by blanks."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; check identity_file")
    rows = []
    for number, line in enumerate(load_text(path).splitlines(), 1):
        row = line.rsplit(maxsplit=count - 1)
        if row and len(row) != count:
            raise UserError(f"{path}, line {number}: expected {count} columns, found '{line}'")
        if row:
            rows.append(row)
    return rows


def _beside(config: Config, name: str) -> Path | None:
    """Find a list file next to the identity file, in the source folder or one above it."""
    root = Path(config.source)
    folders = [root, root.resolve().parent]
    if config.identity_file is not None:
        folders.insert(0, Path(config.identity_file).parent)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _celeba_name(path: Path, mapping: dict[int, str] | None) -> str | None:
    """Return CelebA's file name of a CelebA-HQ picture: 000004.jpg is one, 27 or img00000027 not.

    Six digits are CelebA's own numbers; otherwise the number indexes the mapping file.
    """
    found = re.fullmatch(r"(img(?:HQ)?)?(\d+)", path.stem)
    if found is None:
        return None
    prefix, digits = found.groups()
    if prefix is None and len(digits) == 6:
        return f"{digits}.jpg"
    if mapping is None:
        raise UserError(
            f"{path} is numbered as in CelebA-HQ; put {MAPPING} beside the identity file"
        )
    return mapping.get(int(digits))


def _celeba_identities(config: Config, pictures: list[Path]) -> dict[Path, str | None]:
    given = config.identity_file
    file = Path(given) if given is not None else _beside(config, IDENTITIES)
    if file is None:
        raise UserError(
            f"CelebA-HQ needs {IDENTITIES} (from the CelebA team, see data/README.md); "
            "give its path: identity_file=PATH"
        )
    identities = dict(_read_columns(file, 2))
    mapping_file = _beside(config, MAPPING)
    mapping: dict[int, str] | None = None
    if mapping_file is not None:
        rows = [row for row in _read_columns(mapping_file, 3) if row[0].isdecimal()]  # not the head
        mapping = {int(index): name for index, _, name in rows}
    names = {path: _celeba_name(path, mapping) for path in pictures}
    return {p: None if n is None else identities.get(n) for p, n in names.items()}


def _folder_identities(config: Config, pictures: list[Path]) -> dict[Path, str | None]:
    """The first subfolder is the person; a picture in none is a person of its own."""
    if config.identity_file is not None:
        listed = dict(_read_columns(Path(config.identity_file), 2))
        return {p: listed.get(p.as_posix(), listed.get(p.name)) for p in pictures}
    return {p: p.parts[0] if len(p.parts) > 1 else p.stem for p in pictures}


def _hint(config: Config, pictures: list[Path]) -> str | None:
    """Say so when folders are taken for people whose names speak against it."""
    if config.kind != "folder" or config.identity_file is not None:
        return None
    from hyperdb.data.sources import LIKE_SPLITS

    people = sorted({p.parts[0] for p in pictures if len(p.parts) > 1})
    own = "if each picture is another person, as in FFHQ, set kind=sfhq"
    if people and all(name.lower() in LIKE_SPLITS for name in people):
        return (
            f"{', '.join(people)} are taken for one person each; if they divide people, run this for each of "
            f"them, with source={Path(config.source) / people[0]} and so on; {own}"
        )
    numbers = [name for name in people if name.isdecimal()]
    if numbers:
        return f"{len(numbers)} folders named by numbers ({numbers[0]}, ...) are taken for one person each; {own}"
    if len(people) == 1 and all(len(p.parts) > 2 for p in pictures):
        return (
            f"all {len(pictures)} pictures are taken for one person, {people[0]}, though they lie in folders below; "
            f"{own}; if those are the people, set source={Path(config.source) / people[0]}"
        )
    return None


def _identities(config: Config, pictures: list[Path]) -> dict[Path, str | None]:
    if config.kind == "celeba_hq":
        return _celeba_identities(config, pictures)
    if config.kind == "sfhq":
        return {p: p.stem for p in pictures}
    return _folder_identities(config, pictures)


def _file_names(pictures: list[Path]) -> dict[Path, str]:
    """Flatten a/b.jpg to a__b.png; pictures that would collide get a hash of their path."""
    flat = {p: "__".join(p.with_suffix("").parts) for p in pictures}
    often = Counter(name.casefold() for name in flat.values())
    return {
        p: f"{name}.png"
        if often[name.casefold()] == 1
        else f"{name}-{derive(0, p.as_posix()):016x}.png"
        for p, name in flat.items()
    }


def _make_face(config: Config, picture: Path, file: Path) -> dict[str, Any]:
    """Return box, score, number of faces and notices; write `file` unless it holds this very crop."""
    from hyperdb.faces.align import choose, crop, require_whole
    from hyperdb.faces.detect import detect_turned
    from hyperdb.faces.image import read_image, read_text, save_png

    source = Path(config.source) / picture
    try:
        with source.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from error
    recipe = json.dumps([picture.as_posix(), content, config.size, config.crop])
    text = read_text(file) if file.is_file() else {}
    if text.get("recipe") == recipe and "face" in text:
        try:
            read_image(file)
        except UserError as error:
            print(f"{error}: it is made again")
        else:
            kept: dict[str, Any] = json.loads(text["face"])
            return kept
    rgb = read_image(source)
    faces = detect_turned(rgb)
    face, _ = choose(faces, name=str(source))
    refined, notices = require_whole(rgb, face, config.crop, str(source))
    found = {
        "box": [round(v, 1) for v in face.box],
        "score": round(face.score, 4),
        "faces": len(faces),
        "notices": notices,
    }
    image = crop(rgb, refined.points, config.size, config.crop)
    save_png(file, image, {"recipe": recipe, "face": json.dumps(found)})
    return found


def _summary(records: list[dict[str, Any]], rejected: list[dict[str, str]], several: int) -> str:
    splits = Counter(record["split"] for record in records)
    people = len({record["identity"] for record in records})
    parts = ", ".join(f"{splits[s]} {s}" for s in ("train", "validation", "test"))
    text = f"{len(records)} faces of {people} identities ({parts})"
    if several:
        text += f"; {several} pictures show several faces, the largest was taken"
    noticed = sum("notices" in record for record in records)
    if noticed:
        text += f"; {noticed} were turned upright or reach beyond their picture, see notices in manifest.jsonl"
    if rejected:
        text += f"; {len(rejected)} pictures rejected, see rejected.jsonl"
    return text


def run(config: Config) -> Path:
    """Crop every picture and return the path of the manifest, or of `out` after a shard of them.

    Raises `UserError` when the source or identity file is unusable or no picture has a face.
    """
    from tqdm import tqdm

    pictures, left_out = _pictures(config)
    identities = _identities(config, pictures)
    hint = _hint(config, pictures)
    if hint:
        print(hint)
    names = _file_names(pictures)
    # the same faces, be they more, or called after other people
    made_from = {key: value for key, value in recipe(config).items() if key not in ("limit", "kind")}
    out = claim(config.out, WRITES, {**made_from, "source": str(Path(config.source).resolve())}, len(pictures))
    records: list[dict[str, Any]] = []
    rejected = [{"source": p.as_posix(), "reason": reason} for p, reason in sorted(left_out.items())]
    several = 0
    number, of = config.share()
    for picture in tqdm(pictures[number::of], desc="preprocess", unit="picture", dynamic_ncols=True):
        identity = identities[picture]
        try:
            if identity is None:
                raise UserError(f"{picture} is not in the identity list; add it or remove it")
            face = _make_face(config, picture, out / "faces" / names[picture])
        except WriteError:  # the disk's fault, not the picture's
            raise
        except UserError as error:
            rejected.append({"source": picture.as_posix(), "reason": str(error)})
            continue
        several += face["faces"] > 1
        records.append(
            {
                "file": f"faces/{names[picture]}",
                "source": picture.as_posix(),
                "identity": identity,
                "split": split_of(identity, config.seed),
                "box": face["box"],
                "score": face["score"],
                **({"notices": face["notices"]} if face["notices"] else {}),
            }
        )
    if of > 1:
        print(f"{len(records)} faces of shard {number} of {of} are in {out}; then the same without both")
        return out
    if not records:
        release(out)
        first = rejected[len(left_out)]["reason"]
        raise UserError(f"none of {len(pictures)} pictures could be used; the first: {first}")
    save_lines(out / "rejected.jsonl", rejected)
    save_lines(out / "manifest.jsonl", records)
    print(_summary(records, rejected, several))
    return out / "manifest.jsonl"
