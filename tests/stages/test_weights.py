"""What many people's adapters have in common, drawn and measured: attributes, new people, ways between them."""

from __future__ import annotations

import json

import pytest
import torch

from hyperdb import config as configuration
from hyperdb.diffusion import DiffusionConfig
from hyperdb.formats.directions import ATTRIBUTES
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.stages.weights import Config


@pytest.mark.parametrize("bad", [{"people": 4}, {"components": 5000}, {"shifts": [1.0]}, {"sampled": 1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match="expected"):
        Config(diffusion=DiffusionConfig(), default_hypernet=None, **bad)


def test_weights_draws_measures_and_saves_new_people(tmp_path, in_tmp):
    words = ["size=128", "workers=1", "views=2", "photo_views=2"]
    many = configuration.run("render_heads", [*words, "identities=10", f"out={tmp_path / 'many'}"])
    unseen = configuration.run(
        "render_heads", [*words, "identities=4", "split=validation", f"out={tmp_path / 'unseen'}"]
    )
    out = tmp_path / "out"
    configuration.run("weights", [
        f"data={many}", f"unseen={unseen}", f"out={out}", "people=10", "components=5", "edited=4", "sampled=2",
        "images=2", "shifts=[-2.0,0.0,2.0]", "diffusion.steps=2",
    ])  # fmt: skip
    result = json.loads((out / "results.json").read_text())
    assert set(result["attributes"]) == set(ATTRIBUTES)
    for word in ATTRIBUTES:
        plain = next(point for point in result["attributes"][word]["curve"] if point["shift"] == 0)
        assert plain["attribute"] == pytest.approx(0, abs=0.1)
        assert plain["face_cosine_to_unedited"] == pytest.approx(1, abs=0.05)
        shifted = [x["face_cosine_to_unedited"] for x in result["attributes"][word]["curve"] if x["shift"]]
        assert all(x is None or x < 0.99 for x in shifted)  # another face, or too far for any
    assert result["between"][0]["to_first"] > result["between"][0]["to_last"]
    assert result["between"][-1]["to_last"] > result["between"][-1]["to_first"]
    assert set(result["sampled"]) == {"new", "predicted_for_unseen"}
    for name in ("attributes", "sampled", "between"):
        assert (out / f"{name}.png").is_file()
    people = [Personalization.load(path) for path in sorted(out.glob("sampled/*/lidb.safetensors"))]
    assert len(people) == 2
    assert not torch.equal(people[0].tokens, people[1].tokens)
