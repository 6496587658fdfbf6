"""Pictures in and out: any common format to uint8 RGB, PNG with text, and a grid for previews."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import atomic

SMALLEST, LARGEST = 32, 16_384  # pixels on a side
MOST = 178_956_970  # pixels in all: Pillow's own bound, where it begins to refuse a picture as a decompression bomb
YCBCR = 6  # of a TIFF's photometric interpretation
ROUNDING = 2  # of 255: a profile that moves no colour further is sRGB by another name


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one picture inside it")
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the spelling and the folder")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; copy or download it again")


def check_size(name: str | Path, width: int, height: int) -> None:
    """Raise `UserError` for a picture with a side below 32 or above 16,384 px, or more than 178 million pixels."""
    if min(width, height) < SMALLEST:
        raise UserError(
            f"{name} has {width}x{height} px; at least {SMALLEST} px a side are needed, use a larger picture"
        )
    share = min(1, LARGEST / max(width, height), math.sqrt(MOST / (width * height)))
    if share < 1:
        bound = f"at most {LARGEST} px a side"
        if width * height > MOST:
            bound = f"that is too large to be decoded safely: {bound} and {MOST // 10**6} million px in all"
        raise UserError(
            f"{name} has {width}x{height} px; {bound} are read, reduce it to {int(width * share)}x{int(height * share)}"
        )


def _open_header(path: Path) -> Image.Image:
    """Let Pillow read the header, HEIC included, whatever size it claims: `check_size` judges that."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _unoriented(content: bytearray) -> bytearray:
    """Overwrite a TIFF's orientation with 1: OpenCV obeys half of the eight and fails at the others."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(content[:4]))
    if order is not None:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from(f"{order}H", content, entry)[0] == ExifTags.Base.Orientation:
                struct.pack_into(f"{order}H", content, entry + 8, 1)
    return content


def _deep_pixels(path: Path) -> NDArray[Any] | None:
    """Decode grey or RGB(A) at full depth and as stored, with OpenCV; None if it cannot.

    Pillow keeps the upper byte of 16-bit colours and reads no float colours.
    """
    import cv2

    try:
        content = np.frombuffer(_unoriented(bytearray(path.read_bytes())), np.uint8)
        values = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except (cv2.error, struct.error):
        return None
    if values is not None and values.ndim == 3:
        values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    return None if values is None else np.asarray(values)


def _float_tiff(path: Path) -> Image.Image | None:
    """Read a TIFF that Pillow has no mode for (float colours); None if the file is no TIFF."""
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] not in (b"II*\0", b"MM\0*"):
            return None
        tags = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
    try:
        check_size(path, tags[IMAGEWIDTH], tags[IMAGELENGTH])
    except (KeyError, TypeError):
        return None
    values = _deep_pixels(path)
    if values is None:
        raise UserError(f"{path} is truncated or damaged, or packed in an unusual way; save it again as PNG")
    image = Image.fromarray(_to_8bit(values, path))
    image.getexif()[ExifTags.Base.Orientation] = tags.get(ExifTags.Base.Orientation, 1)
    image.info["icc_profile"] = tags.get(ExifTags.Base.InterColorProfile)
    return image


def _open(path: Path) -> Image.Image:
    """Read the header only (of a float TIFF everything)."""
    try:
        return _open_header(path)
    except UnidentifiedImageError as error:
        image = _float_tiff(path)
        if image is not None:
            return image
        with path.open("rb") as file:
            if file.read(8)[4:] == b"ftyp":
                raise UserError(f"{path} is a damaged HEIC or AVIF picture, or a film; use PNG or JPEG") from error
        raise UserError(f"{path} is not an image (or badly damaged); use PNG or JPEG") from error
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged header
        raise UserError(f"{path} cannot be read as an image ({error}); save it again") from error


def _mend(image: Any) -> None:
    """Unpack an uncompressed YCbCr TIFF as the three bytes a pixel that it has; Pillow before 13 expects four."""
    if image.format != "TIFF" or image.mode != "RGB" or image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) != YCBCR:
        return
    if image.tag_v2.get(SAMPLESPERPIXEL) == 3 and all(part.codec_name == "raw" for part in image.tile):
        image.tile = [part._replace(args=("YCbCr", *part.args[1:])) for part in image.tile]
        image._mode = "YCbCr"


def _decode(path: Path, image: Image.Image) -> None:
    try:
        _mend(image)
        # A phone's MPO file is a still with a second view, not an animation.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
        image.load()
    except Exception as error:  # OSError, SyntaxError, zlib.error ... by format
        raise UserError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from error
    if animated:
        warnings.warn(f"{path} has several frames; the first one is used", stacklevel=3)


def _orient(name: str | Path, image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the EXIF block is foreign bytes; the pixels are fine without it
        message = f"{name} has a damaged EXIF block ({error}); it is read as stored, unrotated"
        warnings.warn(message, stacklevel=3)
        return image


def _to_8bit(values: NDArray[Any], name: str | Path) -> NDArray[np.uint8]:
    """Scale to 0..255 by what the values hold, whatever type they are kept in.

    Floats up to 1 (highlights of less than 8 are cut off) or 255; otherwise the smallest of 8, 10, 12, 14 and 16
    bits that holds the largest value, and that value itself beyond them.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise UserError(f"{name} holds values of type {values.dtype}; expected integers or floats")
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} holds values that are infinite or no numbers; expected 0..1, 0..255 or 0..65535")
    is_float = values.dtype.kind == "f"
    if low < (-0.1 * max(1.0, high) if is_float else 0):  # resampling overshoots a little
        raise UserError(f"{name} holds values from {low:g} to {high:g}; expected 0..1, 0..255 or 0..65535")
    bits = [float(2**n - 1) for n in (8, 10, 12, 14, 16)]
    if is_float and high <= 8:
        full = 1.0
    elif is_float and high <= 280:
        full = 255.0
    else:
        full = next((x for x in bits if high <= x), high)
    return np.clip(values.astype(np.float32) * np.float32(255 / full) + 0.5, 0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Convert by the embedded colour profile; the pixels are untouched if there is none, or if it is sRGB's own."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        source: Any = ImageCms.createProfile("LAB")
    elif profile and image.mode in ("RGB", "L", "CMYK"):
        source = io.BytesIO(profile)
    else:
        return image
    try:
        to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode == "RGB":
            steps = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1).reshape(1, -1, 3)
            shown = np.asarray(ImageCms.applyTransform(Image.fromarray(steps), to_srgb), dtype=int)
            if np.abs(shown - steps).max() <= ROUNDING:
                return image
        return ImageCms.applyTransform(image, to_srgb) or image
    except (ImageCms.PyCMSError, OSError) as error:
        warnings.warn(f"{name} has a damaged colour profile ({error}); its colours are read as sRGB", stacklevel=4)
        return image


def _to_rgb(image: Image.Image, name: str | Path) -> NDArray[np.uint8]:
    """Turn a decoded picture of any mode into [H, W, 3]: upright, sRGB, over white where it is transparent."""
    image = _orient(name, image)
    profile = image.info.get("icc_profile")
    try:
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_to_8bit(np.asarray(image), name))
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if image.mode in ("1", "LA", "La"):
            image = image.convert("L")
        elif alpha is not None:
            image = image.convert("RGBA").convert("RGB")
        elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
            image = image.convert("RGB")
        image.info["icc_profile"] = profile
        image = _to_srgb(image, name).convert("RGB")
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} has colours of kind {image.mode}, which are not read; save it as PNG") from error
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(image)


def _holds_deep_colours(image: Any) -> bool:
    """Whether the file keeps more than 8 bits of each colour, of which Pillow reads the upper ones only."""
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
        return max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8
    return image.format == "PNG" and image.mode in ("RGB", "RGBA") and image.tile[0].args == f"{image.mode};16B"


def image_size(path: str | Path) -> tuple[int, int]:
    """Return width and height of a picture that `read_image` reads, as its header says; raises what that would."""
    path = Path(path)
    _check_file(path)
    with _open(path) as image:
        check_size(path, *image.size)
        return image.size


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read a picture as sRGB [H, W, 3], upright (EXIF), over white where it is transparent.

    PNG, JPEG, HEIC, WebP, AVIF, BMP, TIFF, GIF and whatever else Pillow reads; grey, palette, CMYK, deep and float
    pictures are converted, embedded colour profiles obeyed, of several frames the first is taken with a warning.
    Raises `UserError` for a missing file, a folder, a file that is not an image, is truncated, has a side below 32 or
    above 16,384 px, or more than 178 million pixels (judged by the header, before decoding).
    """
    path = Path(path)
    _check_file(path)
    with _open(path) as image:
        check_size(path, *image.size)
        is_deep = _holds_deep_colours(image)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) if is_deep and image.format == "TIFF" else None
        _decode(path, image)  # turns a TIFF upright itself
        values = _deep_pixels(path) if is_deep else None
        if values is None:
            return _to_rgb(image, path)
        pixels = Image.fromarray(_to_8bit(values, path))
        pixels.info |= {key: image.info[key] for key in ("icc_profile", "exif") if key in image.info}
        if turned is not None:
            pixels.getexif()[ExifTags.Base.Orientation] = turned
        return _to_rgb(pixels, path)


def as_image(picture: Any, name: str = "the picture") -> NDArray[np.uint8]:
    """Take a picture from memory as sRGB [H, W, 3]: a Pillow image, or an array (or tensor, or list) of numbers.

    Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with alpha: of 8 bits, deeper integers, or floats in 0..1 or
    0..255. Raises `UserError` that says what is wrong with any other.
    """
    if isinstance(picture, Image.Image):
        check_size(name, *picture.size)
        return _to_rgb(picture, name)
    try:
        values = np.asarray(picture)
    except Exception as error:  # ragged lists, tensors on a GPU or under autograd
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not an array of numbers ({reason}); give [H, W, 3]") from error
    shape = list(values.shape)
    if values.ndim not in (2, 3) or (values.ndim == 3 and shape[2] not in (1, 3, 4)):
        channels_first = values.ndim == 3 and shape[0] in (1, 3, 4)
        advice = "move the channels to the end" if channels_first else "give several pictures as a list"
        raise UserError(f"{name} has the shape {shape}, expected [H, W, 3] or [H, W]: {advice}")
    check_size(name, shape[1], shape[0])
    pixels = _to_8bit(values, name)
    if pixels.ndim == 3 and shape[2] == 3:
        return np.ascontiguousarray(pixels)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if shape[2:] == [1] else pixels)), name)


def is_image(path: Path) -> bool:
    """Whether a file begins as a picture does that `read_image` reads."""
    try:
        with _open_header(path):
            return True
    except Exception:  # a decoder may raise anything on foreign bytes
        return False


def suffixes() -> set[str]:
    """Return the suffixes of the formats Pillow knows, in small letters and with their dot."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    return set(Image.registered_extensions())


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


def ppm(pixels: NDArray[np.uint8]) -> bytes:
    """Encode `[H, W, 3]` as a PPM picture: nothing is compressed, so reading it takes no longer than copying it."""
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


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

    `labels` are written above the pictures, as many as there are, `rows` left of the rows; long ones are shortened.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs pictures and columns, got {len(images)} and {columns}")
    height, width = images[0].shape[:2]
    lines = -(-len(images) // columns)
    font_size = max(9, min(16, height // 10))
    font = ImageFont.load_default(size=font_size)
    line_height = round(1.3 * font_size) + gap
    left = min(2 * width, round(max(map(font.getlength, rows))) + 2 * gap) if rows else 0
    labelled = -(-len(labels or ()) // columns)  # lines that have room for labels
    size = (left + columns * (width + gap) + gap, lines * (height + gap) + min(lines, labelled) * line_height + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, array in enumerate(images):
        image = Image.fromarray(array)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        row, column = divmod(i, columns)
        x, y = left + gap + column * (width + gap), gap + row * (height + gap) + min(row, labelled) * line_height
        canvas.paste(image, (x, y + (line_height if row < labelled else 0)))
        if labels and i < len(labels):
            draw.text((x, y), _shorten(labels[i], font, width), fill="black", font=font)
    for row, label in enumerate(rows or ()):
        y = gap + row * (height + gap) + min(row + 1, labelled) * line_height + height // 2
        name = _shorten(label, font, left - 2 * gap) if left == 2 * width else label
        draw.text((gap, y), name, fill="black", font=font, anchor="lm")
    return np.array(canvas)
