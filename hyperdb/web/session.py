"""What a visitor of the page brings, makes and takes along, in a folder of his own. Knows no gradio.

Everything is made by the stages of the command line, so that the same files come out, with the same provenance in them
and the same one-line errors.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hyperdb.formats.directions import ATTRIBUTES
from hyperdb.runtime.errors import UserError
from hyperdb.web.work import Left, Line, follow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hyperdb.tuning.personalizer import Personalizer
    from hyperdb.web import Config

FACES, PEOPLE, PICTURES = 8, 12, 200  # faces of a photo that can be chosen, people and pictures that a visitor keeps
AT_ONCE = 12  # pictures of one wish
LONGEST = 500  # characters of a prompt
SHOWN = 640  # pixels of the longer side of a photo as it is shown
FORMATS = {"kohya": "fp16", "diffusers": "fp16", "peft": "fp16", "native": "fp32"}  # with the numbers' kind
UPLOAD = re.compile("[0-9a-f]{64}")  # gradio's folder of an upload: the digest of its bytes

Result = TypeVar("Result")
Served = tuple["Personalizer", ThreadPoolExecutor]
Tell = Callable[[str, int, int, "float | None"], None]
Reading = threading.Lock()  # of photos: the detector is not thread-safe, and a large photo needs half a gigabyte


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is: `done` of `of` steps of a phase, after so many seconds, with the losses so far.

    Of the phase "waiting" `done` is the number of visitors in front.
    """

    phase: str
    done: int = 0
    of: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Found:
    """One face of a photo: a small picture to choose it by, and its crop `[size, size, 3]` or why there is none."""

    small: NDArray[np.uint8]
    crop: NDArray[np.uint8] | None
    said: str = ""


@dataclass(frozen=True)
class Photo:
    """A visitor's photo. `marked` is a small copy with the faces numbered; `face`, from 1, is the one that is meant.

    `agreed` says that nobody has to be asked any more: the person is rendered.
    """

    path: Path
    marked: NDArray[np.uint8]
    faces: tuple[Found, ...]
    face: int = 1
    agreed: bool = False

    @property
    def chosen(self) -> Found:
        """The face that is meant."""
        return self.faces[self.face - 1]


@dataclass(frozen=True)
class Person:
    """Somebody on the shelf: the folder that `hyperdb personalize` or `hyperdb edit` wrote, and how it looks.

    `row` holds the pictures to compare, by what they show: the photo, the base, the prediction, the fine-tuned. Of one
    who was mixed or changed it holds those who went in and what came out. The last one is the portrait.
    """

    name: str
    folder: Path
    row: Mapping[str, Path]
    seconds: float = 0.0

    @property
    def portrait(self) -> Path:
        """What the person looks like."""
        return list(self.row.values())[-1]


@dataclass(frozen=True)
class Wish:
    """What is to be drawn of whom; `[V]` in the prompt stands for the person."""

    person: str
    prompt: str
    strength: float = 1.0
    subject_guidance: float | None = None
    seed: int = 0
    count: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError("the prompt is empty: say what is to be drawn, such as a pencil sketch of a [V] face")
        if len(self.prompt) > LONGEST:
            raise UserError(f"the prompt has {len(self.prompt)} characters; at most {LONGEST} are read")
        for name, kind in (("strength", float), ("subject_guidance", float), ("seed", int), ("count", int)):
            value = getattr(self, name)
            if value is None and name == "subject_guidance":
                continue
            try:
                object.__setattr__(self, name, kind(value))
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{name}={str(value)[:40]}: expected a number") from error
        if not 1 <= self.count <= AT_ONCE:
            raise UserError(f"count={self.count}: expected 1 to {AT_ONCE} pictures")


@dataclass(frozen=True)
class Picture:
    """One picture of a wish; its file says what made it."""

    path: Path
    wish: Wish
    seed: int


@dataclass
class Session:
    """One visitor. Methods that take long are generators of `Progress`, which return what they made.

    A visitor does one long thing at a time. `end` stops it and removes the folder; from then on everything else raises
    `UserError`.
    """

    config: Config
    line: Line[Served]
    folder: Path
    photo: Photo | None = None
    people: dict[str, Person] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)  # those of the newest wish first
    picked: Picture | None = None  # the one that is looked at
    used: float = field(default_factory=time.monotonic)
    ended: bool = False
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _looking: threading.Lock = field(default_factory=threading.Lock)  # at a photo that will take the place of `photo`
    _count: int = 0

    # --- the visit

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the folder while something short is done in it."""
        with self._lock:
            if self.ended:
                raise UserError(ENDED)
            self.used = time.monotonic()
            yield

    def _new(self, kind: str) -> Path:
        """Return a name in the folder that nothing has yet; none of a visitor's words is in it."""
        with self._open():
            self._count += 1
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.folder / f"{kind}-{self._count:03d}"

    def _serve(self, task: Callable[[Personalizer, Tell], Result]) -> Generator[Progress, None, Result]:
        """Wait for a model, then do `task(model, tell)` with it, in a thread of its own."""
        with self._open():
            if not self._busy.acquire(blocking=False):
                raise UserError("one thing at a time: what you asked for before is still being made")
        began, losses = time.perf_counter(), []

        def work(report: Callable[[Progress], None]) -> Result:
            def tell(phase: str, done: int, of: int, loss: float | None = None) -> None:
                if self.ended:
                    raise Left
                self.used = time.monotonic()
                if loss is not None:
                    losses.append(loss)
                seconds = 0.0 if phase == "waiting" else time.perf_counter() - began
                report(Progress(phase, done, of, seconds, tuple(losses)))

            nonlocal began
            try:
                with self.line.turn(lambda ahead: tell("waiting", ahead, 0)) as (model, thread):
                    began = time.perf_counter()
                    return thread.submit(task, model, tell).result()
            except UserError as error:
                raise UserError(self._without_paths(str(error))) from error
            finally:
                self._busy.release()

        return (yield from follow(work))

    def _without_paths(self, text: str) -> str:
        """Return a message on one line, in which files are called as a visitor knows them."""
        for person in list(self.people.values()):
            text = text.replace(str(person.folder / "adapter.safetensors"), person.name)
            text = text.replace(str(person.folder), person.name)
        text = re.sub(re.escape(str(self.folder)) + r"/photo-\d+", "your photo", text)
        return " ".join(text.replace(f"{self.folder}/", "").split())

    def end(self) -> None:
        """Stop what is being made and remove everything."""
        self.ended = True
        with self._busy, self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- the photo

    def take(self, path: str | None, aligned: bool = True) -> Photo:
        """Take over an upload, by what the page says of it, and find the faces; unless `aligned` it is a crop already.

        The text is compared with the names that uploads have; nothing else of the disk is looked at.
        """
        with self._looking:
            self._keep(None)
            upload = Path(str(path))
            is_one = upload.parent.parent == self.folder.parent and UPLOAD.fullmatch(upload.parent.name)
            if not is_one or upload.name in ("", ".", "..") or upload.is_symlink() or not upload.is_file():
                raise UserError("this is no file that was uploaded here; choose the photo again")
            with self._open():  # a visit that ends meanwhile leaves nothing
                taken = self._new("photo")
                shutil.move(upload, taken)
            shutil.rmtree(upload.parent, ignore_errors=True)
            if taken.stat().st_size > self.config.upload * 1e6:
                taken.unlink()
                raise UserError(f"the file has more than {self.config.upload:g} megabytes; use a smaller picture")
            return self._look(taken, aligned, agreed=False)

    def example(self, person: int) -> Photo:
        """Render a person of the validation or test split, by the seed, as a photo."""
        from hyperdb.faces.image import save_png
        from hyperdb.heads import Identity, View, render, split_of

        if split_of(person) == "train":
            raise UserError(f"person={person} was in the training; take one of the test split")
        with self._looking:
            self._keep(None)
            rendered = render(Identity(person), View(), size=256)
            with self._open():
                path = save_png(self._new("photo"), rendered)
            return self._look(path, aligned=True, agreed=True)

    def _look(self, path: Path, aligned: bool, agreed: bool) -> Photo:
        """Read a photo, find its faces, and keep it; one that is refused is removed."""
        from hyperdb.faces import align
        from hyperdb.faces.detect import detect_turned
        from hyperdb.faces.image import read_image

        size, scale = self.config.diffusion.size, self.config.diffusion.crop
        try:
            with Reading:
                rgb = read_image(path)
                faces = detect_turned(rgb) if aligned else []
                found = [] if aligned else [Found(align.square(rgb, 96), align.square(rgb, size))]
                if aligned:
                    align.choose(faces, None, "your photo")  # says so if there is none
                for face in faces[:FACES]:
                    small, crop, said = align.crop(rgb, face.points, 96, 1.0), None, ""
                    try:
                        whole, notices = align.require_whole(rgb, face, scale, "your photo")
                        crop, said = align.crop(rgb, whole.points, size, scale), "; ".join(notices)
                    except UserError as error:
                        said = str(error)
                    found.append(Found(small, crop, said))
                marked = _marked(rgb, [face.box for face in faces[:FACES]])
        except UserError as error:
            said = self._without_paths(str(error)).replace("align=false if it is", "tick that it is")
            path.unlink(missing_ok=True)
            raise UserError(said) from error
        photo = Photo(path, marked, tuple(found), agreed=agreed)
        self._keep(photo)
        return photo

    def _keep(self, photo: Photo | None) -> None:
        with self._open():
            if self.photo is not None and (photo is None or photo.path != self.photo.path):
                self.photo.path.unlink(missing_ok=True)
            self.photo = photo

    def choose(self, face: int) -> Photo:
        """Mean the `face`-th largest face of the photo, from 1."""
        if self.photo is None or not 1 <= int(face) <= len(self.photo.faces):
            raise UserError(f"face={face}: there is no such face in your photo")
        photo = dataclasses.replace(self.photo, face=int(face))
        self._keep(photo)
        return photo

    # --- people

    def personalise(self, name: str = "", agreed: bool = False) -> Generator[Progress, None, Person]:
        """Predict and fine-tune the person of the photo, and put him or her on the shelf.

        Raises `UserError` unless `agreed` says that a real person has consented.
        """
        from hyperdb.faces.image import save_png
        from hyperdb.tuning import photos

        with self._looking:
            photo = self.photo
        if photo is None:
            raise UserError("choose a photo first, or one of the example people")
        if not (photo.agreed or agreed):
            raise UserError("personalise only people who agreed to it: tick the line of consent, if this one did")
        if photo.chosen.crop is None:
            raise UserError(photo.chosen.said)
        name = self._free_name(name)
        with self._open():  # a visit that ends meanwhile leaves no face behind
            folder = self._new("person")
            cut = save_png(folder / "crop.png", photo.chosen.crop)
        how = dataclasses.replace(self.config, image=str(cut), align=False, preview=False, out=str(folder))

        def task(model: Personalizer, tell: Tell) -> Person:
            began = time.perf_counter()
            photos.personalize(how, model, tell)
            seconds = time.perf_counter() - began
            words = model.base.config
            row = {"the photo": cut}
            row["the base, of anybody"] = self._portrait(model, None, words.class_prompt, folder / "base", tell)
            if model.hypernet is not None:
                file = folder / "lidb.safetensors"
                row["the prediction"] = self._portrait(model, file, words.instance_prompt, folder / "prediction", tell)
            row["fine-tuned"] = self._portrait(model, folder, words.instance_prompt, folder / "finetuned", tell)
            return self._shelve(Person(name, folder, row, seconds))

        return (yield from self._serve(task))

    def mix(self, one: str, other: str, share: float, name: str = "") -> Generator[Progress, None, Person]:
        """Put somebody between two on the shelf: `share` 0 is the one, 1 the other."""
        a, b, share = self._person(one), self._person(other), _number("share", share)
        if a.name == b.name:
            raise UserError(f"{one} mixed with {one} is {one}: choose two people")
        name = name or f"{a.name} and {b.name}"
        return (yield from self._edited([a, b], name, shares=[1 - share, share]))

    def shift(self, one: str, shifts: Mapping[str, Any], name: str = "") -> Generator[Progress, None, Person]:
        """Put somebody with other attributes on the shelf; a shift of 1 is a standard deviation over people."""
        if odd := sorted(shifts.keys() - set(ATTRIBUTES)):
            raise UserError(f"there is no attribute {odd[0]!r}; there are {', '.join(ATTRIBUTES)}")
        numbers = {key: number for key, value in shifts.items() if (number := _number(key, value))}
        if not numbers:
            raise UserError("nothing is changed: move one of the sliders")
        who = self._person(one)
        said = ", ".join(f"{key} {number:+g}" for key, number in numbers.items())
        return (yield from self._edited([who], name or f"{who.name}, {said}", **numbers))

    def _edited(self, who: list[Person], name: str, **settings: Any) -> Generator[Progress, None, Person]:
        from hyperdb.stages import edit

        name, folder = self._free_name(name), self._new("person")
        how = edit.Config(
            adapter=[str(one.folder) for one in who], directions=self.config.directions, out=str(folder), **settings
        )

        def task(model: Personalizer, tell: Tell) -> Person:
            began = time.perf_counter()
            edit.run(how)
            row = {one.name: one.portrait for one in who}
            row[name] = self._portrait(model, folder, model.base.config.instance_prompt, folder / "finetuned", tell)
            return self._shelve(Person(name, folder, row, time.perf_counter() - began))

        return (yield from self._serve(task))

    def _free_name(self, name: str) -> str:
        """Return what a new person is called: the name asked for, with a number behind it if it is taken."""
        if len(self.people) >= PEOPLE:
            raise UserError(f"the shelf is full with {PEOPLE} people: take one off it first")
        asked = " ".join(re.sub(r"[^\w .,()+-]", " ", str(name or "")).split())[:60]
        name, number = asked or "Person 1", 1
        while name in self.people:
            number += 1
            name = f"{asked} ({number})" if asked else f"Person {number}"
        return name

    def _shelve(self, person: Person) -> Person:
        with self._open():
            self.people[person.name] = person
        return person

    def _person(self, name: str) -> Person:
        if name not in self.people:
            raise UserError("choose a person of the shelf; personalise one first if it is empty")
        return self.people[name]

    def forget(self, name: str) -> None:
        """Take a person off the shelf and remove the folder; the pictures stay."""
        person = self._person(name)
        with self._open():
            del self.people[name]
            if not any(person.folder in path.parents for one in self.people.values() for path in one.row.values()):
                shutil.rmtree(person.folder, ignore_errors=True)

    # --- pictures

    def _draw(
        self, model: Personalizer, adapter: Path | None, wish: Wish, out: Path, tell: Tell, phase: str = "drawing"
    ) -> list[Path]:
        """Draw as `hyperdb generate` does and return the files."""
        from hyperdb.stages import generate
        from hyperdb.tuning.draw import together

        base = model.base
        generate.run(self._settings(model, adapter, wish, out, together(base.config.size)), base,
                     lambda done, of: tell(phase, done, of, None))  # fmt: skip
        return [out / f"{i:05d}.png" for i in range(wish.count)]

    def _settings(self, model: Personalizer, adapter: Path | None, wish: Wish, out: Path, batch: int) -> Any:
        from hyperdb.stages import generate

        return generate.Config(
            diffusion=model.base.config,
            adapter=None if adapter is None else str(adapter),
            prompt=wish.prompt,
            num_images=wish.count,
            strength=wish.strength,
            subject_guidance=wish.subject_guidance,
            seed=wish.seed,
            batch=batch,
            out=str(out),
        )

    def _portrait(self, model: Personalizer, adapter: Path | None, prompt: str, out: Path, tell: Tell) -> Path:
        return self._draw(model, adapter, Wish("", prompt, count=1), out, tell, "drawing portraits")[0]

    def draw(self, wish: Wish) -> Generator[Progress, None, tuple[list[Picture], list[str]]]:
        """Draw what is wished; return the pictures, and notices about what of the wish has no or little effect."""
        from hyperdb.stages import generate

        person = self._person(wish.person)
        if len(self.pictures) + wish.count > PICTURES:
            raise UserError(f"more than {PICTURES} pictures are not kept; download these, then reload the page")
        out = self._new("pictures")

        def task(model: Personalizer, tell: Tell) -> tuple[list[Picture], list[str]]:
            tell("drawing", 0, 1, None)
            notices = generate.notices(self._settings(model, person.folder, wish, out, 1), model.base)
            paths = self._draw(model, person.folder, wish, out, tell)
            made = [Picture(path, wish, wish.seed + i) for i, path in enumerate(paths)]
            with self._open():
                self.pictures, self.picked = made + self.pictures, made[0]
            return made, notices

        return (yield from self._serve(task))

    def pick(self, number: int) -> Picture:
        """Look at one of the pictures, which are counted from 0."""
        with self._open():
            if not 0 <= number < len(self.pictures):
                raise UserError(f"there is no picture {number + 1}; draw some first")
            self.picked = self.pictures[number]
            return self.picked

    def more(self, count: int = 4) -> Generator[Progress, None, tuple[list[Picture], list[str]]]:
        """Draw more of the wish of the picture that is looked at, at seeds that it has not had yet."""
        if self.picked is None:
            raise UserError("choose a picture first")
        wish = dataclasses.replace(self.picked.wish, seed=0, count=count)
        had = [one.seed for one in self.pictures if dataclasses.replace(one.wish, seed=0, count=count) == wish]
        return (yield from self.draw(dataclasses.replace(wish, seed=max(had) + 1)))

    # --- to take along

    def export(self, name: str, format: str) -> Path:
        """Return a person's adapter as a file of one of `FORMATS`; PEFT's folders come as a zip."""
        from hyperdb.stages import export

        person, title = self._person(name), re.sub(r"[^\w-]+", "_", name).strip("_") or "person"
        if format not in FORMATS:
            raise UserError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
        out = person.folder / "exports" / format
        file, packed = out / f"{title}.safetensors", out.parent / f"{title}-peft.zip"
        with self._open():
            try:
                export.run(export.Config(adapter=str(person.folder), format=format, dtype=FORMATS[format], name=title,
                                         out=str(out)))  # fmt: skip
            except UserError as error:
                raise UserError(self._without_paths(str(error))) from error
            if format == "peft":
                _pack(packed, {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("[!.]*")) if p.is_file()})
                return packed
            return file

    def archive(self) -> Path:
        """Return a zip of all pictures, called by prompt and seed, and `pictures.json`, which says what made them."""
        from hyperdb.faces.image import read_text
        from hyperdb.runtime.files import save_json

        with self._open():
            if not self.pictures:
                raise UserError("there are no pictures yet: draw some first")
            named, listed = {}, []
            for number, one in enumerate(sorted(self.pictures, key=lambda one: one.path), 1):
                words = re.sub(r"\W+", "_", one.wish.prompt.replace("[V]", "V")).strip("_")[:60]
                file = f"{number:03d}-{words}-seed{one.seed}.png"
                named[file] = one.path
                listed.append({"file": file, "person": one.wish.person, **read_text(one.path)})
            named["pictures.json"] = save_json(self.folder / "pictures.json", listed)
            for old in self.folder.glob("pictures-*.zip"):
                old.unlink()
            return _pack(self.folder / f"pictures-{len(self.pictures)}.zip", named)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={str(value)[:40]}: expected a number") from error


def _pack(path: Path, files: Mapping[str, Path]) -> Path:
    """Write a zip of files, called by the keys, atomically; they are packed already."""
    from hyperdb.runtime.files import atomic

    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as packed:
        for name, file in files.items():
            packed.write(file, name)
    return path


def _marked(rgb: NDArray[np.uint8], boxes: list[tuple[float, float, float, float]]) -> NDArray[np.uint8]:
    """Return a small copy of a photo in which boxes (x, y, width, height) are framed and, of several, numbered."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(rgb)
    scale = min(1, SHOWN / max(image.size))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen, width = ImageDraw.Draw(image), max(2, round(max(image.size) / 200))
    font = ImageFont.load_default(size=max(14, max(image.size) / 24))
    for number, (x, y, w, h) in enumerate(boxes, 1):
        corners = [x * scale, y * scale, (x + w) * scale, (y + h) * scale]
        pen.rectangle(corners, outline="black", width=width + 2)
        pen.rectangle(corners, outline="white", width=width)
        if len(boxes) > 1:
            at = corners[0] + 2 * width, corners[1]
            pen.text(at, str(number), "white", font, stroke_width=2, stroke_fill="black")
    return np.array(image)


ENDED = "this visit has ended, and what was made in it is gone; reload the page"
REMEMBERED = 10_000  # visits that have ended


class Sessions:
    """The visitors, each known by a token of his page, with folders in `root`, and the models that serve them."""

    def __init__(self, config: Config, models: list[Personalizer], root: Path) -> None:
        self.config, self.root = config, root
        # always in one thread a model: every new one would have memory of its own, which is never given back
        self.line = Line([(model, ThreadPoolExecutor(1)) for model in models], config.waiting)
        self._known: dict[str, Session] = {}
        self._ended: dict[str, None] = {}  # tokens of visits that have ended, the last ones
        self._lock = threading.Lock()

    def of(self, token: str | None) -> Session:
        """Return a visitor's session, a new one for a token that is not known."""
        if not token:
            raise UserError("the page says nothing of who you are; reload it")
        self.sweep()
        with self._lock:
            if token in self._ended:
                raise UserError(ENDED)
            if token not in self._known:
                # nobody can guess where a visitor's files lie
                self._known[token] = Session(self.config, self.line, self.root / secrets.token_hex(16))
            return self._known[token]

    def end(self, token: str | None) -> None:
        """End a visit, if there is one of this token."""
        with self._lock:
            session = self._known.pop(token or "", None)
        if session is not None:
            session.end()

    def sweep(self) -> None:
        """End the visits of those who did nothing for `config.idle` minutes, and remove uploads that nobody took."""
        now, idle = time.monotonic(), self.config.idle * 60
        with self._lock:
            old = [token for token, session in self._known.items() if now - session.used > idle]
        for token in old:
            self.end(token)
            self._ended[token] = None
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]
        for upload in self.root.glob("[0-9a-f]*"):
            with suppress(FileNotFoundError):  # somebody has just taken it
                if UPLOAD.fullmatch(upload.name) and time.time() - upload.stat().st_mtime > idle:
                    shutil.rmtree(upload, ignore_errors=True)

    def close(self) -> None:
        """End all visits and remove everything."""
        for token in list(self._known):
            self.end(token)
        shutil.rmtree(self.root, ignore_errors=True)
