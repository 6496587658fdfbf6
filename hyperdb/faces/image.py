"""Pictures in and out: any common format to uint8 RGB, PNG with text, and a grid for previews."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import atomic

SMALLEST, LARGEST = 32, 16_384  # pixels on a side


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one picture inside it")
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the spelling and the folder")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; copy or download it again")


def _open(path: Path) -> Image.Image:
    """Read the header only."""
    too_large = (
        f"{path} is too large to be decoded safely; reduce it to at most {LARGEST} px a side"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except Image.DecompressionBombError as error:
        raise UserError(f"{too_large} ({error})") from error
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            brand = file.read(12)[4:]
        if brand in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
            raise UserError(f"{path} is a HEIC picture; save it as JPEG or PNG") from error
        raise UserError(f"{path} is not an image (or badly damaged); use PNG or JPEG") from error
    except Exception as error:  # a decoder may raise anything on a damaged header
        raise UserError(f"{path} cannot be read as an image ({error}); save it again") from error


def _check_size(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < SMALLEST:
        raise UserError(
            f"{path} has {width}x{height} px; at least {SMALLEST} px a side are needed, "
            "use a larger picture"
        )
    if max(width, height) > LARGEST:
        raise UserError(
            f"{path} has {width}x{height} px; at most {LARGEST} px a side are read, reduce it"
        )


def _decode(path: Path, image: Image.Image) -> None:
    try:
        # A phone's MPO file is a still with a second view, not an animation.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
        image.load()
    except Exception as error:  # OSError, SyntaxError, zlib.error ... by format
        raise UserError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from error
    if animated:
        warnings.warn(f"{path} has several frames; the first one is used", stacklevel=3)


def _orient(path: Path, image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the EXIF block is foreign bytes; the pixels are fine without it
        message = f"{path} has a damaged EXIF block ({error}); it is read as stored, unrotated"
        warnings.warn(message, stacklevel=3)
        return image


def _deep_to_8bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float greys to 8 bits; float pictures are in 0..1 or in 0..255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        values = values * 255 if values.max() <= 1 else values
    elif image.mode == "I" and values.max() > 65_535:
        values = values * (255 / values.max())
    else:
        values = values / 257
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_8bit(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        image = Image.alpha_composite(white, colours)
    return image.convert("RGB")


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read a picture as RGB [H, W, 3], upright (EXIF), over white where it is transparent.

    PNG, JPEG, WebP, BMP, TIFF, GIF and whatever else Pillow reads; grey, palette, CMYK and
    16-bit pictures are converted, of several frames the first is taken with a warning.
    Raises `UserError` for a missing file, a folder, a file that is not an image, is truncated,
    or has a side below 32 or above 16,384 px (judged by the header, before decoding).
    """
    path = Path(path)
    _check_file(path)
    with _open(path) as image:
        _check_size(path, image)
        _decode(path, image)
        upright = _orient(path, image)
        try:
            return np.array(_to_rgb(upright))
        except ValueError as error:
            raise UserError(
                f"{path} has colours of kind {image.mode}, which are not read; save it as PNG"
            ) from error


def read_text(path: str | Path) -> dict[str, str]:
    """Return the text chunks of a PNG, from its header; empty for any other or unreadable file."""
    try:
        with Image.open(path) as image:
            return {str(k): str(v) for k, v in image.info.items() if isinstance(v, str)}
    except (OSError, SyntaxError, ValueError):
        return {}


def save_png(
    path: str | Path, array: NDArray[np.uint8], text: Mapping[str, str] | None = None
) -> Path:
    """Write uint8 [H, W, 3] as PNG with text chunks (prompt, seed, ...), atomically."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info, compress_level=3)
    return Path(path)


def _shorten(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def grid(
    images: Sequence[NDArray[np.uint8]],
    columns: int,
    labels: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    gap: int = 4,
) -> NDArray[np.uint8]:
    """Lay pictures [H, W, 3] out on white, row by row; pictures of other sizes take the first's.

    `labels` are written above the pictures, `rows` left of the rows; long ones are shortened.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs pictures and columns, got {len(images)} and {columns}")
    height, width = images[0].shape[:2]
    lines = -(-len(images) // columns)
    font_size = max(9, min(16, height // 10))
    font = ImageFont.load_default(size=font_size)
    line_height = round(1.3 * font_size) + gap
    left = min(2 * width, round(max(map(font.getlength, rows))) + 2 * gap) if rows else 0
    top = line_height if labels else 0
    size = (left + columns * (width + gap) + gap, lines * (top + height + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, array in enumerate(images):
        image = Image.fromarray(array)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        row, column = divmod(i, columns)
        x, y = left + gap + column * (width + gap), gap + row * (top + height + gap)
        canvas.paste(image, (x, y + top))
        if labels and i < len(labels):
            draw.text((x, y), _shorten(labels[i], font, width), fill="black", font=font)
    for row, label in enumerate(rows or ()):
        y = gap + row * (top + height + gap) + top + height // 2
        name = _shorten(label, font, left - 2 * gap) if left == 2 * width else label
        draw.text((gap, y), name, fill="black", font=font, anchor="lm")
    return np.array(canvas)
