"""Every picture people have is read, every bad one gives one clear line."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hyperdb.faces.image import grid, read_image, read_text, save_png
from hyperdb.runtime.errors import UserError


def gradient(width=48, height=40):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, x * 0 + 90], -1).astype(np.uint8)


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "jpg", "webp"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"très (1).{suffix}"
    image = Image.fromarray(gradient())
    image.save(path, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    read = read_image(path)
    assert read.shape == (40, 48, 3)
    assert read.dtype == np.uint8
    error = np.abs(read.astype(int) - gradient()).mean()
    assert error <= {"jpg": 4, "webp": 4, "gif": 30}.get(suffix, 0)


def test_a_wrong_suffix_does_not_matter(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = gradient()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)


def test_transparency_over_white(tmp_path):
    rgba = np.dstack([gradient(), np.zeros((40, 48), np.uint8)])
    rgba[:, 24:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert (read[:, :24] == 255).all()
    assert np.array_equal(read[:, 24:], gradient()[:, 24:])
    Image.fromarray(rgba).quantize(64).save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png")[:, :20] >= 250).all()
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png")[:, :24] == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_colour_modes(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "a.tiff")
    expected = np.asarray(image.convert("RGB"))
    assert np.abs(read_image(tmp_path / "a.tiff").astype(int) - expected).mean() < 3


def test_deep_greys(tmp_path):
    grey = np.linspace(0, 65_535, 40 * 48).reshape(40, 48)
    expected = np.round(grey / 257)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png")[..., 0] - expected).max() <= 1
    Image.fromarray((grey / 65_535).astype(np.float32)).save(tmp_path / "a.tiff")
    assert np.abs(read_image(tmp_path / "a.tiff")[..., 1] - expected).max() <= 1


def test_animation_takes_the_first_frame_with_a_notice(tmp_path):
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"a\.gif has several frames"):
        read = read_image(tmp_path / "a.gif")
    assert (read == [255, 0, 0]).all()


def test_damaged_exif_is_reported_and_the_picture_read(tmp_path, monkeypatch):
    from PIL import ImageOps

    def fail(image):
        raise SyntaxError("not a TIFF file")

    Image.fromarray(gradient()).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.warns(UserWarning, match="damaged EXIF"):
        assert np.array_equal(read_image(tmp_path / "a.png"), gradient())


def encoded(format, size=(200, 200)):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=format)
    return buffer.getvalue()


BAD = {
    "empty": (b"", "is empty"),
    "text": (b"this is not a picture at all", "not an image"),
    "heic": (b"\0\0\0\x18ftypheic" + b"\0" * 50, "HEIC"),
    "cut.jpg": (encoded("JPEG")[:5000], "truncated"),
    "cut.png": (encoded("PNG")[:5000], "truncated"),
    "cut.webp": (encoded("WEBP")[:5000], "cannot be read|truncated|not an image"),
    "cut.gif": (encoded("GIF")[:5000], "truncated"),
    "header.jpg": (encoded("JPEG")[:15], "not an image|cannot be read"),
    "pixel": (encoded("PNG", (1, 1)), r"1x1 px; at least 32"),
    "thin": (encoded("PNG", (31, 64)), r"64x31 px; at least 32"),
    "wide": (png_header(20_000, 100), r"20000x100 px; at most 16384"),
    "bomb": (png_header(60_000, 60_000), "too large"),
    "hollow": (png_header(64, 64), "truncated or damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path, kind):
    content, message = BAD[kind]
    (tmp_path / kind).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / kind)
    assert str(tmp_path / kind) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)


def test_png_with_text(tmp_path):
    text = {"prompt": "a pencil sketch of a très [V] face, 漢字", "seed": "0"}
    path = save_png(tmp_path / "new" / "a=b.png", gradient(), text)
    assert np.array_equal(read_image(path), gradient())
    assert read_text(path) == text
    assert [p.name for p in path.parent.iterdir()] == ["a=b.png"]
    assert read_text(tmp_path / "none.png") == {}


def test_grid():
    a, b = gradient(), gradient()[::-1]
    sheet = grid([a, b, a], columns=2, gap=4)
    assert sheet.shape == (2 * 44 + 4, 2 * 52 + 4, 3)
    assert np.array_equal(sheet[4:44, 4:52], a)
    assert np.array_equal(sheet[4:44, 56:104], b)
    assert (sheet[48:88, 56:104] == 255).all()
    labelled = grid([a, b, a, b], 2, labels=["input", "a very long label indeed"], rows=["x", "y"])
    assert labelled.shape[0] > sheet.shape[0]
    assert labelled.shape[1] > sheet.shape[1]
    assert np.array_equal(labelled[-44:-4, -52:-4], b)
    other = grid([a, gradient(96, 80)], 2)
    assert other.shape == grid([a, a], 2).shape
    with pytest.raises(ValueError, match="needs pictures"):
        grid([], 2)
