"""`hyperdb cutmix`: two photos, one adapter, pictures of both, and what their halves show."""

from __future__ import annotations

import pytest
import torch

from hyperdb import config
from hyperdb.faces.image import read_image, save_png
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, save_json

TINY = ["diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "diffusion.device=cpu", "prior.images=2",
        "prior.levels=2", "second=zwx", "align=false", "num_images=2", "finetune.steps=2",
        "finetune.rate=0.05"]  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    """Return the files of two photos."""
    files = []
    for seed in (0, 1):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed)).byte().numpy()
        files.append(save_png(tmp_path / f"{seed}.png", pixels, {}))
    return files


def made(tiny_base, tmp_path, files, *words):
    images = f"images=[{','.join(map(str, files))}]"
    return config.run("cutmix", [images, f"diffusion.path={tiny_base}", f"out={tmp_path / 'both'}", *TINY, *words])


def test_two_photos_become_an_adapter_pictures_and_a_report(tiny_base, tmp_path, photos, capsys):
    more = [f"others=[{photos[0]}]", f"judged=[{photos[0]},{photos[1]},{photos[1]}]", "compare=true", "unmix=100"]
    out = made(tiny_base, tmp_path, photos, *more)
    person = Personalization.load(out / "adapter.safetensors")
    assert [part.kind for part in person.parts] == ["svdiff"]
    assert person.rare_token == "sks"
    report = load_json(out / "report.json")
    assert (report["words"], report["people"]) == (["sks", "zwx"], 3)
    assert report["prompts"] == ["a photo of a sks face, a zwx face", "a photo of a zwx face, a sks face"]
    assert set(report["results"]) == {"unmix", "mixed"}
    for run in (*report["results"].values(), report["ceiling"]):
        for side in ("left", "right"):
            assert set(run[side]) == {"rank1", "swapped", "detected", "cosine"}
            assert 0 <= run[side]["rank1"] <= run[side]["detected"] <= 1
    sheets = [read_image(out / name) for name in ("pictures.png", "pictures_mixed.png")]
    assert (sheets[0] != sheets[1]).any()
    before = (out / "pictures.png").stat().st_mtime_ns
    save_json(out / "report.json", report | {"results": {"unmix": report["results"]["unmix"]}})  # stopped in between
    again = load_json(made(tiny_base, tmp_path, photos, *more) / "report.json")
    assert (out / "pictures.png").stat().st_mtime_ns == before
    assert again["results"]["mixed"] == report["results"]["mixed"] | {"seconds": again["results"]["mixed"]["seconds"]}
    with pytest.raises(UserError, match="a run with other photos"):
        made(tiny_base, tmp_path, photos[::-1], *more)  # judged by the same photos
    prompt = "a photo of a [V] face, a zwx face"
    assert f"prompt='{prompt}'" in capsys.readouterr().out
    words = [f"diffusion.path={tiny_base}", *TINY[:4], f"prompt={prompt}", "num_images=1"]
    drawn = config.run("generate", [*words, f"adapter={out}", f"out={tmp_path / 'drawn'}"])
    plain = config.run("generate", [*words, f"adapter={out}", "strength=0", f"out={tmp_path / 'plain'}"])
    assert (read_image(drawn / "00000.png") != read_image(plain / "00000.png")).any()


def test_any_adapter_of_the_network_learns_two_people(tiny_base, tmp_path, photos, watched):
    out = made(tiny_base, tmp_path, photos, "adapter=lora", "unmix=0", "tracker=tensorboard")
    assert watched(out) == {*(f"mixed/{name}" for name in ("loss", "rate", "rank1_left", "rank1_right")), "pictures"}
    assert [part.kind for part in Personalization.load(out / "adapter.safetensors").parts] == ["lora"]
    assert set(load_json(out / "report.json")["results"]) == {"mixed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=custom_diffusion"], "trains one word.*hyperdb merge"),
        (["adapter=lidb"], "set finetune.face_weight=0 finetune.masked_prior=0 finetune.flips=false$"),
        (["adapter=svdiff", "finetune.masked_prior=0.5"], "masked_prior: is for one.*set finetune.masked_prior=0$"),
        (["adapter=svdiff", "finetune.flips=true"], "finetune.flips: is for one person; set finetune.flips=false$"),
        (["adapter=svdiff", "finetune.instance_prompt=a [V]"], "instance_prompt: is for.*instance_prompt=null$"),
        (["num_images=1"], "num_images=1: expected 2"),
        (["judged=[x.png]"], "expected a photo of each of the 2 people"),
        (["mix=1"], "mix=1.0: expected a share"),
        (["unmix=0", "compare=true"], "unmix=0.0: expected a weight"),
        (["second=sks"], "second='sks': expected one token of the base, another than 'sks'"),
        (["second=nobody"], "second='nobody': expected one token"),
        (["prompt=a [V1] face"], r"expected \[V1\] before 'face'"),
    ],
)
def test_what_cannot_be_is_refused(tiny_base, tmp_path, photos, words, message):
    with pytest.raises(UserError, match=message):
        made(tiny_base, tmp_path, photos, *words)
    assert not (tmp_path / "both" / "adapter.safetensors").exists()


def test_one_photo_is_refused(tiny_base, tmp_path, photos):
    with pytest.raises(UserError, match="photos of two people"):
        made(tiny_base, tmp_path, photos[:1])
