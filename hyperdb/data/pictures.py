"""Pictures on the disk, decoded when they are asked for: of files, of Arrow tables, of safetensors shards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hyperdb.faces.image import as_image, check_size, image_size, read_image
from hyperdb.runtime.errors import UserError, first_line
from hyperdb.runtime.files import open_tensors
from hyperdb.runtime.lazy import Lazy, part_of

PLAIN = re.compile(rb"P6\n([1-9]\d{0,4}) ([1-9]\d{0,4})\n255\n")  # the header of `hyperdb.faces.image.ppm`


class Reader(Protocol):
    """Where pictures come from: each has a name for messages, a size that is known before it is decoded, and pixels."""

    def name(self, row: int) -> str:
        """Return what a message calls a picture."""

    def size(self, row: int) -> tuple[int, int]:
        """Return width and height. Raises `UserError` for what is no picture."""

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Decode a picture, `[H, W, 3]`. Raises `UserError` for a damaged one."""


class Files:
    """Pictures in files of their own, in any format and depth that a photo to personalise may have."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def name(self, row: int) -> str:
        """Return the file."""
        return str(self.paths[row])

    def size(self, row: int) -> tuple[int, int]:
        """Return width and height, of the header."""
        return image_size(self.paths[row])

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Decode a picture, upright and in sRGB."""
        return read_image(self.paths[row])


class Table:
    """Pictures in a column of Arrow tables: encoded bytes, alone or in `datasets`' structure of bytes and path.

    The tables stay on the disk, mapped into memory by whoever opened them. Paths in a table are not followed.
    """

    def __init__(self, where: str, column: pa.ChunkedArray) -> None:
        if pa.types.is_struct(column.type) and (at := column.type.get_field_index("bytes")) >= 0:
            column = pa.chunked_array([chunk.field(at) for chunk in column.chunks], column.type.field(at).type)
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise UserError(f"{where}: the column of pictures holds {column.type}, expected encoded pictures")
        if column.null_count:
            raise UserError(
                f"{where}: {column.null_count} pictures are paths without bytes, which are not followed; "
                "make it again with the pictures in it (`save_to_disk`, `to_parquet` after `embed_table_storage`)"
            )
        self.where, self.column = where, column

    def name(self, row: int) -> str:
        """Return the place and the row."""
        return f"{self.where}: picture {row}"

    def _bytes(self, row: int) -> pa.Buffer:
        return self.column[row].as_buffer()

    def _plain(self, content: pa.Buffer) -> tuple[int, int, int] | None:
        """Return the length of the header, width and height of a PPM picture; None for any other."""
        found = PLAIN.match(content[: min(32, content.size)].to_pybytes())
        if found is None:
            return None
        width, height = int(found[1]), int(found[2])
        return (found.end(), width, height) if content.size - found.end() == 3 * width * height else None

    def size(self, row: int) -> tuple[int, int]:
        """Return width and height, of the header."""
        content = self._bytes(row)
        found = self._plain(content)
        if found is not None:
            return found[1:]
        try:
            with Image.open(pa.BufferReader(content)) as image:
                width, height = image.size
        except Exception as error:  # a decoder may raise anything on foreign bytes
            raise UserError(f"{self.name(row)} is not a picture that can be read ({first_line(error)})") from error
        check_size(self.name(row), width, height)
        return width, height

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Decode a picture, upright and in sRGB; a PPM one is only looked at."""
        content = self._bytes(row)
        found = self._plain(content)
        if found is not None:
            start, width, height = found
            return np.frombuffer(content, np.uint8, offset=start).reshape(height, width, 3)
        try:
            with Image.open(pa.BufferReader(content)) as image:
                return as_image(image, self.name(row))
        except UserError:
            raise
        except Exception as error:  # OSError, SyntaxError, zlib.error ... by format
            raise UserError(f"{self.name(row)} is truncated or damaged ({first_line(error)})") from error

    def lengths(self) -> NDArray[np.int64]:
        """Return the length of every picture in bytes, without reading any."""
        import pyarrow.compute as pc

        return np.concatenate([pc.binary_length(chunk).to_numpy(False) for chunk in self.column.chunks]).astype("int64")

    def sample(self, count: int) -> bytes:
        """Hash so many pictures' bytes, spread evenly."""
        digest = hashlib.sha256()
        for row in np.unique(np.linspace(0, len(self.column) - 1, count).astype(int)).tolist():
            digest.update(memoryview(self._bytes(row)))
        return digest.digest()


class Shards:
    """Pictures of safetensors shards, tensors `image [n, H, W, 3]` uint8, as `render_heads` wrote them formerly."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.slices = paths, [open_tensors(path, "np").get_slice("image") for path in paths]
        shapes = [one.get_shape() for one in self.slices]
        if any(len(shape) != 4 or shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(f"pictures of the shapes {shapes[0]} ... {shapes[-1]}")
        self.height, self.width = shapes[0][1:3]
        self.ends = list(accumulate(shape[0] for shape in shapes))

    def name(self, row: int) -> str:
        """Return the shard and the row in it."""
        shard, inside = part_of(self.ends, row)
        return f"{self.paths[shard]}: picture {inside}"

    def size(self, row: int) -> tuple[int, int]:
        """Return width and height."""
        return self.width, self.height

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Read a picture."""
        shard, inside = part_of(self.ends, row)
        found: NDArray[np.uint8] = self.slices[shard][inside]
        return found


class Pictures(Lazy):
    """Pictures `[n, 3, H, W]` uint8, decoded when they are asked for: a batch is in memory, never all.

    They are the `rows [n]` of what `reader` reads, squares of `side` pixels; those of another side are resized. None is
    the side that all have. `digest` names the data set that they are of.
    """

    def __init__(self, reader: Reader, rows: NDArray[np.intp], side: int | None, digest: str) -> None:
        self.reader, self.rows = reader, rows
        sizes = [reader.size(row) for row in rows.tolist()]
        for row, (width, height) in zip(rows.tolist(), sizes, strict=True):
            if width != height:
                raise UserError(
                    f"{reader.name(row)} has {width}x{height} px and is no square crop of a face; "
                    "cut the faces out with `hyperdb preprocess`"
                )
            if side is None and width != sizes[0][0]:
                raise UserError(f"{reader.name(row)} has {width} px a side, others {sizes[0][0]}; make them alike")
        side = side if side is not None else sizes[0][0] if sizes else 1
        self.shape = (len(rows), 3, side, side)
        self.digest = hashlib.sha256(f"{digest} {side}".encode()).hexdigest()[:16]

    def name(self, row: int) -> str:
        """Return where a picture comes from."""
        return self.reader.name(int(self.rows[row]))

    def key(self, rows: Tensor) -> str:
        """Return a text that is the same for the same pictures of the same data set, whatever else is loaded."""
        chosen = np.ascontiguousarray(self.rows[rows.numpy()], dtype=np.int64)
        return f"{self.digest} {hashlib.sha256(chosen.tobytes()).hexdigest()[:16]}"

    def read(self, rows: list[int]) -> Tensor:
        """Decode these pictures."""
        side = self.shape[-1]
        found = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        into = found.numpy()
        for k, row in enumerate(rows):
            pixels: Any = self.reader.pixels(int(self.rows[row]))
            if pixels.shape[:2] != (side, side):
                pixels = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            into[k] = np.asarray(pixels).transpose(2, 0, 1)
        return found
