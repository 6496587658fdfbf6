"""Every picture people have is read, every bad one gives one clear line."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms, ImageOps

from hyperdb.faces.image import MOST, as_image, grid, read_image, read_text, save_png
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
    deep = cv2.imencode(".png", np.ascontiguousarray(stored[..., ::-1]).astype(np.uint16) * 16)[1].tobytes()
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "deep.png").write_bytes(deep[:33] + chunk + deep[33:])
    assert np.abs(read_image(tmp_path / "deep.png").astype(int) - upright * (255 * 16 / 4095)).max() <= 1


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


def adobe_rgb():
    """The ICC profile of Adobe RGB (1998): its primaries and white as seen under D50, gamma 563/256."""

    def fixed(*values):
        return b"XYZ \0\0\0\0" + struct.pack(f">{len(values)}i", *(round(v * 65_536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, 563, 0)
    name = b"Adobe RGB (1998)\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": fixed(0.9642, 1, 0.8249),
        b"rXYZ": fixed(0.60974, 0.31111, 0.01947),
        b"gXYZ": fixed(0.20528, 0.62567, 0.06087),
        b"bXYZ": fixed(0.14919, 0.06322, 0.74457),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)[8:] + b"\0" * 48
    return head + table + data


def in_profile(rgb, profile):
    to = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), io.BytesIO(profile), "RGB", "RGB")
    return ImageCms.applyTransform(Image.fromarray(rgb), to)


@pytest.fixture(scope="module")
def skin():
    return np.ascontiguousarray(skimage.data.astronaut()[60:180, 170:290])


def test_embedded_profiles_are_converted_to_srgb(tmp_path, skin):
    wide = in_profile(skin, adobe_rgb())
    assert np.abs(np.asarray(wide).astype(int) - skin).mean() > 3  # another number for the same colour
    lossy = {"jpg": {"quality": 98, "subsampling": 0}, "heic": {"quality": 100}}
    for suffix, options in {"png": {}, "tiff": {}, **lossy}.items():
        wide.save(tmp_path / f"a.{suffix}", icc_profile=adobe_rgb(), **options)
        assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - skin).mean() < 2.5, suffix
    half = wide.copy()
    half.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 60, 1).repeat(120, 0)))
    half.save(tmp_path / "half.png", icc_profile=adobe_rgb())
    read = read_image(tmp_path / "half.png")
    assert (read[:, :60] == 255).all()
    assert np.abs(read[:, 60:].astype(int) - skin[:, 60:]).mean() < 2
    assert np.array_equal(as_image(Image.open(tmp_path / "half.png")), read)


def test_deep_colours_in_a_profile(tmp_path, skin):
    wide = np.asarray(in_profile(skin, adobe_rgb())).astype(np.uint16) * 16  # 12 of 16 bits
    coded = cv2.imencode(".png", wide[..., ::-1])[1].tobytes()
    packed = zlib.compress(adobe_rgb())
    body = b"iCCP" + b"a\0\0" + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(coded[:33] + chunk + coded[33:])
    assert np.abs(read_image(tmp_path / "a.png").astype(int) - skin).mean() < 2


def test_srgb_by_name_changes_no_pixel(tmp_path, skin):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(skin).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(read_image(tmp_path / "a.png"), skin)


def test_a_damaged_profile_is_reported_and_the_picture_read(tmp_path, skin):
    cases = [("cut", adobe_rgb()[:200], "RGB"), ("text", b"not a profile", "RGB"), ("of colours", adobe_rgb(), "L")]
    for name, profile, mode in cases:
        image = Image.fromarray(skin).convert(mode)
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        with pytest.warns(UserWarning, match=rf"{name}\.png has a damaged colour profile"):
            read = read_image(tmp_path / f"{name}.png")
        assert np.array_equal(read, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("top", [1, 255, 4095, 16_383, 65_535])
@pytest.mark.parametrize("kind", ["png", "tiff", "float"])
@pytest.mark.parametrize("channels", [1, 3])
def test_depth_is_what_the_values_hold(tmp_path, top, kind, channels):
    if top == 1 and kind != "float":
        pytest.skip("integers up to 1 are black")
    values = np.random.default_rng(0).random((40, 48, channels)) * top
    values[0, 0] = top
    expected = np.round(values / top * 255)[..., ::-1]  # OpenCV writes BGR
    path = tmp_path / ("a.png" if kind == "png" else "a.tiff")
    assert cv2.imwrite(str(path), values.astype(np.float32) if kind == "float" else values.round().astype(np.uint16))
    assert np.abs(read_image(path).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "top"), [("float32", 1), ("uint16", 4095), ("uint16", 65_535), ("uint8", 255)])
def test_a_tiff_stands_upright_at_every_depth(tmp_path, orientation, kind, top):
    import tifffile

    values = (gradient() / 255 * top).astype(kind)
    where = (0x0112, "H", 1, orientation, False)
    tifffile.imwrite(tmp_path / "a.tiff", values, photometric="rgb", extratags=[where])
    upright = ImageOps.exif_transpose(_marked(gradient(), orientation))
    assert np.abs(read_image(tmp_path / "a.tiff").astype(int) - np.asarray(upright)).max() <= 1


def _marked(rgb, orientation):
    image = Image.fromarray(rgb)
    image.getexif()[0x0112] = orientation
    return image


def test_a_float_tiff_of_any_size_is_judged_by_its_header(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tiff"), np.zeros((20, 50, 3), np.float32))
    with pytest.raises(UserError, match=r"a\.tiff has 50x20 px"):
        read_image(tmp_path / "a.tiff")
    cv2.imwrite(str(tmp_path / "a.tiff"), np.full((40, 50, 3), np.nan, np.float32))
    with pytest.raises(UserError, match=r"a\.tiff holds values that are infinite or no numbers"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("brand", ["heic", "heix", "hevc", "hevx", "heim", "heis", "hevm", "hevs", "mif1", "msf1"])
def test_heic_of_every_brand(tmp_path, brand):
    import pillow_heif

    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(gradient(96, 80)).copy()).save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    content = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "IMG_1.HEIC").write_bytes(content[:8] + brand.encode() + content[12:])
    read = read_image(tmp_path / "IMG_1.HEIC")
    assert np.abs(read.astype(int) - gradient(96, 80)).mean() < 4
    (tmp_path / "cut.HEIC").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=r"cut\.HEIC"):
        read_image(tmp_path / "cut.HEIC")


SKIN = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
SKIN[0, 0] = 255


@pytest.mark.parametrize(
    "picture",
    [
        SKIN,
        SKIN / 255,
        (SKIN / 255).astype(np.float16),
        (SKIN / 255).tolist(),
        SKIN.astype(np.float32),
        SKIN.astype(np.int64),
        SKIN.astype(np.uint16) * 257,
        SKIN.astype(np.uint32),
        np.dstack([SKIN, np.full((40, 48), 255, np.uint8)]),
        np.dstack([SKIN, np.full((40, 48), 255, np.uint8)]) / 255,
        np.asfortranarray(SKIN),
        Image.fromarray(SKIN),
        torch.from_numpy(SKIN) / 255,
    ],
)
def test_pictures_from_memory(picture):
    read = as_image(picture)
    assert read.dtype == np.uint8
    assert np.array_equal(read, SKIN)


def test_grey_pictures_from_memory():
    grey = SKIN[..., 0]
    for one in (grey, grey[..., None], grey / 255, Image.fromarray(grey)):
        assert np.array_equal(as_image(one), np.stack([grey] * 3, -1))
    assert np.array_equal(as_image(grey > 99), np.stack([(grey > 99) * np.uint8(255)] * 3, -1))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (SKIN.transpose(2, 0, 1), r"shape \[3, 40, 48\].*move the channels to the end"),
        (SKIN[None], r"shape \[1, 40, 48, 3\].*several pictures as a list"),
        (SKIN[..., :2], r"shape \[40, 48, 2\]"),
        (SKIN[:20], "48x20 px; at least 32"),
        (SKIN / 127.5 - 1, "values from -1 to 1; expected 0..1"),
        (SKIN.astype(int) - 5, "values from -5 to 250"),
        (SKIN / 255 + np.nan, "infinite or no numbers"),
        (SKIN.astype(complex), "type complex128"),
        (SKIN.astype(str), "type <U"),
        (None, r"shape \[\]"),
        ([[1, 2], [3]], "not an array of numbers"),
        (torch.zeros(40, 48, 3, requires_grad=True), "not an array of numbers"),
    ],
)
def test_bad_pictures_from_memory(picture, message):
    with pytest.raises(UserError, match=message) as caught:
        as_image(picture, "the photo")
    assert "the photo" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_bound_is_what_pillow_decodes_safely():
    assert Image.MAX_IMAGE_PIXELS * 2 == MOST


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
    "heic": (b"\0\0\0\x18ftypheic" + b"\0" * 50, "damaged HEIC"),
    "cut.jpg": (encoded("JPEG")[:5000], "truncated"),
    "cut.png": (encoded("PNG")[:5000], "truncated"),
    "cut.webp": (encoded("WEBP")[:5000], "cannot be read|truncated|not an image"),
    "cut.gif": (encoded("GIF")[:5000], "truncated"),
    "header.jpg": (encoded("JPEG")[:15], "not an image|cannot be read"),
    "pixel": (encoded("PNG", (1, 1)), r"1x1 px; at least 32"),
    "thin": (encoded("PNG", (31, 64)), r"64x31 px; at least 32"),
    "wide": (png_header(20_000, 100), r"20000x100 px; at most 16384"),
    "bomb": (png_header(60_000, 60_000), "too large.*reduce it to 13377x13377"),
    "square": (png_header(13_500, 13_500), "13500x13500 px.*178 million px in all.*reduce it to 13377x13377"),
    "panorama": (png_header(40_000, 6_000), "at most 16384 px a side.*reduce it to 16384x2457"),
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
    headed = grid([a, b, a, b], 2, labels=["input", "other"])
    room = headed.shape[0] - sheet.shape[0]
    assert np.array_equal(headed[room + 4 : room + 44, 4:52], a)  # above the first line alone
    assert np.array_equal(headed[room + 48 : room + 88, 4:52], a)
    other = grid([a, gradient(96, 80)], 2)
    assert other.shape == grid([a, a], 2).shape
    with pytest.raises(ValueError, match="needs pictures"):
        grid([], 2)
