"""What `personalize` takes for a photo, before any network is loaded."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from hyperdb import config as configuration
from hyperdb.faces.align import face_crop
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.personalizer import crop_face


def test_pictures_from_memory_are_cropped_as_files_are(tmp_path, capsys):
    astronaut, config = skimage.data.astronaut(), configuration.load("personalize", ["image=none"])
    Image.fromarray(astronaut).save(tmp_path / "a.png")
    expected = face_crop(astronaut, config.diffusion.size, config.diffusion.crop)[0]
    for picture in (tmp_path / "a.png", astronaut, astronaut / 255.0, Image.fromarray(astronaut), astronaut.tolist()):
        assert np.array_equal(crop_face(picture, config), expected)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="move the channels to the end"):
        crop_face(astronaut.transpose(2, 0, 1), config)


def test_what_was_done_to_a_photo_is_said(tmp_path, capsys):
    Image.fromarray(skimage.data.astronaut()).rotate(90).save(tmp_path / "lying.png")
    crop_face(tmp_path / "lying.png", configuration.load("personalize", ["image=none"]))
    assert "lying.png does not stand upright; it is turned by 90 degrees clockwise\n" in capsys.readouterr().out
