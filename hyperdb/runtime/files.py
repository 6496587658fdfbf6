"""Reading and writing files: atomic writes, UTF-8 text, safetensors and JSON only, clear errors for foreign files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.runtime.errors import UserError, WriteError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


TEMPORARY = ".hyperdb-part-"  # how the names of files begin that are being written
CHECK = "crc32"  # where a safetensors file's header says what its tensors and the rest of the header sum up to


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong on the disk while `path` is written into one `WriteError` that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong with the bytes of a file from outside into one `UserError` that names it."""
    try:
        yield
    except UserError as error:
        if Path(path).name in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # what parsers and networks raise on foreign bytes is of every kind
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{path} is damaged or of another kind ({type(error).__name__}: {why})") from error


@contextmanager
def atomic(path: str | Path, first: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` only if the block ends well.

    With `first` a file that another process has written in the meantime stays. Raises `UserError` when the disk is
    full, read-only or otherwise unwilling.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.stem[:40]}-", suffix=path.suffix)
        os.close(fd)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            if not (first and _linked(temporary, path)):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file its name unless another has it; False where the disk has no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def save_text(path: str | Path, text: str) -> Path:
    """Write a text file as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def load_text(path: str | Path) -> str:
    """Read a UTF-8 text file, with or without a byte-order mark. Raises `UserError` naming it and the encoding."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} is not UTF-8 text (line {line} has the byte 0x{error.object[error.start]:02x}); save it as UTF-8, "
            "from Latin-1 by `iconv -f LATIN1 -t UTF-8`"
        ) from error


def save_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, a list of numbers on one line, atomically; NaN is refused."""
    text = json.dumps(value, indent=1, allow_nan=False, default=str)
    # a line break is never inside a string
    text = re.sub(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return save_text(path, text + "\n")


def load_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one raises `UserError` naming it."""
    try:
        return json.loads(load_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON ({error}); delete it or restore it") from error


def save_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines, atomically. Names of files whose bytes are not UTF-8 come back from `json.loads`."""
    return save_text(path, "".join(_line(record) + "\n" for record in records))


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    # what is no character (a byte that is not UTF-8) or ends a line for some readers is written as an escape
    return text if text.isprintable() else json.dumps(record)


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    first: bool = False,
    check: bool = True,
) -> Path:
    """Write a safetensors file atomically; with `first` one that is there stays. Metadata values are strings.

    With `check` the header has a checksum, which `load_tensors` compares. A file for other tools has none: those that
    change the numbers copy the header.
    """
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = dict(metadata or {})
    if check:
        text[CHECK] = _sum(ready, text)
    with atomic(path, first) as temporary:
        save_file(ready, temporary, metadata=text)
        _sort(temporary)
    return Path(path)


def _sort(path: Path) -> None:
    """Bring a safetensors header's metadata, which are written in any order, into that of their names: same run, same
    bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def _sum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    import torch

    found = _sum_on("", json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        found = _sum_on(found, f"{name} {x.dtype} {list(x.shape)}".encode())
        found = _sum_on(found, x.reshape(-1).view(torch.uint8).numpy().data)
    return found


def _sum_on(before: str, data: Any) -> str:
    """Return the checksum of what had the checksum `before` ("": nothing) and further bytes."""
    return f"{zlib.crc32(data, int(before or '0', 16)):08x}"


def unfinished(path: Path) -> Path:
    """Return what `save_parts` calls a file until it is finished."""
    return path.with_name(f"{TEMPORARY}{path.name}")


def save_parts(
    path: str | Path,
    name: str,
    make: Callable[[int], Iterable[torch.Tensor]],
    rows: int,
    metadata: Mapping[str, str],
    part: int = 1,
) -> Path:
    """Write a safetensors file of one tensor `[rows, ...]`, atomically, of parts `[k, ...]` that are never all there.

    `make(first)` yields the parts from row `first` on, a multiple of `part`. What a call that was stopped has written
    stays, and the next one goes on there; two at once are to be kept apart by whoever calls.

    The file is eight bytes with the header's length, the header as JSON, and the numbers. The header has the checksum
    of `save_tensors`, until the end that of the whole parts so far. Where these no longer have it, all is made anew.
    """
    import torch

    path = Path(path)
    kinds = {"torch.float16": "F16", "torch.float32": "F32", "torch.int64": "I64", "torch.uint8": "U8"}
    dtypes = {kind: getattr(torch, dtype.removeprefix("torch.")) for dtype, kind in kinds.items()}
    temporary = unfinished(path)
    entry: dict[str, Any] = {}
    found = _sum({}, metadata)

    def header() -> bytes:
        text = json.dumps({"__metadata__": {**metadata, CHECK: found}, name: entry}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def begun() -> int:
        """Return how many rows have the checksum that was written with them, and take it."""
        nonlocal found
        with suppress(OSError, ValueError, KeyError, TypeError), temporary.open("rb") as file:
            told = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 2**20)))
            there, before = told[name], told["__metadata__"]
            shape, dtype = there["shape"], dtypes[there["dtype"]]
            size = math.prod(shape) * dtype.itemsize
            if shape[0] != rows or there["data_offsets"] != [0, size] or _without_check(before) != dict(metadata):
                return 0
            total = _sum_on(found, f"{name} {dtype} {shape}".encode())
            for done in range(part, rows, part):
                total = _sum_on(total, file.read(size // rows * part))
                if total == before[CHECK]:
                    found = total
                    entry.update(there)
                    return done
        return 0

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = begun()
        try:
            with temporary.open("r+b" if done else "wb") as file:
                if done:
                    file.seek(len(header()) + done * entry["data_offsets"][1] // rows)
                    file.truncate()
                for rest in make(done):
                    if done == 0:
                        shape = [rows, *rest.shape[1:]]
                        size = rows * rest[0].numel() * rest.element_size()
                        entry |= {"dtype": kinds[str(rest.dtype)], "shape": shape, "data_offsets": [0, size]}
                        file.write(header())
                        found = _sum_on(found, f"{name} {rest.dtype} {shape}".encode())
                    numbers = rest.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    file.write(numbers)
                    found = _sum_on(found, numbers)
                    done += len(rest)
                    if done % part == 0 and done < rows:  # whoever goes on looks whether they are what was written
                        file.seek(0)
                        file.write(header())
                        file.seek(0, os.SEEK_END)
                assert done == rows
                file.seek(0)
                file.write(header())
            temporary.chmod(0o644)
            os.replace(temporary, path)
        except OSError:  # a disk that is full gets its room back
            temporary.unlink(missing_ok=True)
            raise
    return path


def open_tensors(path: str | Path, framework: str = "pt") -> Any:
    """Open a safetensors file, whose tensors are read one by one or in part. Raises `UserError` for any other file."""
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        return safe_open(str(path), framework=framework)
    except Exception as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read only the string metadata of a safetensors file; imports no torch."""
    with reading(path), open_tensors(path, "np") as file:
        return _without_check(file.metadata())


def _without_check(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return {name: value for name, value in (metadata or {}).items() if name != CHECK}


def load_shapes(path: str | Path) -> dict[str, list[int]]:
    """Read only the names and shapes of a safetensors file's tensors."""
    with reading(path), open_tensors(path, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


def load_parts(path: str | Path, name: str, places: Iterable[tuple[int, ...]]) -> list[NDArray[Any]]:
    """Read of a safetensors file only some entries `tensor[place]` of the tensor `name`, as numpy arrays."""
    with reading(path), open_tensors(path, "np") as file:
        whole = file.get_slice(name)
        return [whole[place] for place in places]


def load_tensors(path: str | Path, without: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, but the one called `without`, and its string metadata.

    Raises `UserError` for a file that is no longer what was written, where it has a checksum and is read as a whole.
    """
    with reading(path), open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != without}  # noqa: SIM118 (not a dict)
        metadata, written = _without_check(file.metadata()), (file.metadata() or {}).get(CHECK)
    if written is not None and without is None and written != _sum(tensors, metadata):
        raise UserError(f"{path} is damaged: its checksum is not the one that was written with it; delete it")
    return tensors, metadata


def load_made(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Read what a run can make again, as `load_tensors` does; None if it is not there.

    A damaged file is said, and removed, to be made again.
    """
    if not path.is_file():
        return None
    try:
        return load_tensors(path)
    except UserError as error:
        print(f"{str(error).removesuffix('; delete it')}: it is made again")
        path.unlink(missing_ok=True)  # another process may have met it too
        return None


def whole(path: Path) -> bool:
    """Whether a safetensors file is there and undamaged; see `load_made`."""
    return load_made(path) is not None


def hash_picture(image: torch.Tensor) -> int:
    """Return 63 bits that tell a picture by its pixels."""
    return int.from_bytes(hashlib.blake2b(image.cpu().contiguous().numpy().data, digest_size=8).digest()) >> 1


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Return the first 16 hex digits of a sha256 over the numbers of tensors."""
    import torch

    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_files(paths: list[Path] | Path) -> str:
    """Return the first 16 hex digits of a sha256 over the names and bytes of files (a folder: all in it)."""
    if isinstance(paths, Path):
        root, paths = paths, sorted(p for p in paths.rglob("*") if p.is_file())
        names = [p.relative_to(root).as_posix() for p in paths]
    else:
        names = [p.name for p in paths]
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        digest.update(name.encode(errors="surrogateescape") + b"\0" + content.digest())
    return digest.hexdigest()[:16]
