"""The generate stage: pictures that say what made them, do not depend on the batch, and are drawn once."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperdb import config as settings
from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.layout import Layout
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.diffusion.targets import base_hash
from hyperdb.faces.image import read_image, read_text, save_png
from hyperdb.formats.native import Personalization, find_adapter
from hyperdb.runtime.errors import NonFiniteError, UserError
from hyperdb.runtime.files import load_json, save_json
from hyperdb.stages import generate
from hyperdb.stages.generate import Config, run


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Config:
    diffusion = DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu", steps=3)
    return Config(diffusion=diffusion, num_images=3, batch=2, out=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def person(base: Base) -> Personalization:
    """Somebody: enough to be seen, not so much that the network turns chaotic."""
    targets = base.targets()
    lidb = LiDBConfig(a=8, b=4)
    layout = Layout.of(targets)
    tokens = lidb.build(layout).init(1)["tokens"][0]
    tokens = tokens + 0.25 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    return Personalization(layout, tokens, lidb, base=base_hash(targets), rare_token="sks")


@pytest.fixture
def adapter(person: Personalization, tmp_path: Path) -> Path:
    return person.save(tmp_path / "ada" / "adapter.safetensors").parent


def pictures(out: str | Path) -> np.ndarray:
    return np.stack([read_image(p) for p in sorted(Path(out).glob("0*.png"))]).astype(int)


def test_base_alone(config: Config, base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(replace(config, prompt="a photo of [V] face"))
    assert sorted(p.name for p in out.iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "grid.png",
        "manifest.json",
    ]
    assert str(out / "grid.png") in capsys.readouterr().out
    latents = sample(base, ["a photo of sks face"] * 3, start_noise(base, [0, 1, 2]), 3, 3.0)
    direct = base.decode(latents).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures(out) - direct).max() <= 1
    assert direct.std() > 5


def test_every_picture_says_what_made_it(config: Config, base: Base, adapter: Path) -> None:
    words = {"prompt": "a [V] face, on the beach", "negative_prompt": "pencil\nsketch", "seed": 7}
    drawing = {"strength": 0.5, "guidance": 2.0, "steps": 4, "scheduler": "pndm"}
    out = run(replace(config, **words, **drawing, adapter=str(adapter)))
    for i in range(3):
        text = read_text(out / f"{i:05d}.png")
        digest = text.pop("adapter_digest")
        assert len(digest) == 16
        assert text.pop("software").startswith("hyperdb ")
        assert text == {
            "prompt": words["prompt"],
            "negative_prompt": words["negative_prompt"],
            "rare_token": "sks",
            "subject_guidance": "none",
            "seed": str(7 + i),
            "base": config.diffusion.path,
            "base_digest": base.digest,
            "strength": "0.5",
            "scheduler": "pndm",
            "steps": "4",
            "guidance": "2.0",
            "size": "32",
            "dtype": "fp32",
            "synthetic": "true",
        }
    assert read_text(out / "grid.png")["synthetic"] == "true"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["pictures"] == [{"file": f"{i:05d}.png", "seed": 7 + i} for i in range(3)]
    assert manifest["adapter"] == str(adapter / "adapter.safetensors")
    assert manifest["adapter_digest"] == digest
    assert manifest["synthetic"] is True
    assert manifest["provenance"]["versions"]["torch"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_picture_does_not_depend_on_the_batch(config: Config, tmp_path: Path, dtype: str) -> None:
    config = replace(config, num_images=5, diffusion=replace(config.diffusion, dtype=dtype))
    found = [pictures(run(replace(config, batch=n, out=str(tmp_path / str(n))))) for n in (1, 2, 8)]
    assert np.abs(found[0] - found[1]).max() <= 2
    assert np.abs(found[0] - found[2]).max() <= 2
    later = run(replace(config, seed=3, num_images=2, out=str(tmp_path / "later")))
    assert np.abs(pictures(later) - found[0][3:]).max() <= 2


def test_running_again_draws_only_what_is_missing(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []
    draw = generate._draw

    def counted(config: Config, base: Base, seeds: list[int], *more: float) -> np.ndarray:
        drawn.extend(seeds)
        return draw(config, base, seeds, *more)

    monkeypatch.setattr(generate, "_draw", counted)
    out = run(config)
    assert drawn == [0, 1, 2]
    before = pictures(out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.png")}

    drawn.clear()
    run(config)
    assert drawn == []
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("0*.png")} == times
    assert "3 were there" in capsys.readouterr().out

    (out / "00001.png").unlink()
    damaged = (out / "00002.png").read_bytes()
    (out / "00002.png").write_bytes(damaged[: len(damaged) - 200])
    run(config)
    assert drawn == [1, 2]
    assert np.abs(pictures(out) - before).max() <= 2

    drawn.clear()
    run(replace(config, num_images=4))
    assert drawn == [3]
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    for _ in "ab":  # another request gets numbers of its own, and keeps them
        run(replace(config, num_images=2, guidance=1.0))
        assert drawn == [3, 0, 1]
    assert "also holds 4 other pictures" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name in first} == first
    added = {p.name for p in out.iterdir()} - first.keys()
    assert added == {"00004.png", "00005.png", "grid-00004.png", "manifest-00004.json"}
    listed = json.loads((out / "manifest-00004.json").read_text())
    assert listed["pictures"] == [{"file": "00004.png", "seed": 0}, {"file": "00005.png", "seed": 1}]
    run(replace(config, num_images=2, seed=2))  # the last two of the first request
    assert drawn == [3, 0, 1]


@pytest.mark.parametrize("names", ["00000.png 00001.png grid.png", "grid.png", "manifest.json", "00001.png"])
def test_pictures_of_somebody_else_are_never_replaced(config: Config, names: str) -> None:
    out, own = Path(config.out), names.split()
    out.mkdir()
    for name in own:
        if name.endswith("png"):
            save_png(out / name, np.full((40, 40, 3), 7, np.uint8))
        else:
            (out / name).write_text("{}")
    before = {name: (out / name).read_bytes() for name in own}
    for _ in "ab":
        run(config)
        assert {name: (out / name).read_bytes() for name in own} == before
    drawn = [p for p in out.glob("0*.png") if read_text(p)]
    assert len(drawn) == 3
    (manifest,) = out.glob("manifest-*.json")
    assert [p["file"] for p in json.loads(manifest.read_text())["pictures"]] == sorted(p.name for p in drawn)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}),
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}),
    ],
)
def test_pictures_of_another_base_at_the_same_place_are_drawn(
    config: Config, tmp_path: Path, file: str, values: dict
) -> None:
    copy = shutil.copytree(config.diffusion.path, tmp_path / "copy")
    config = replace(config, diffusion=replace(config.diffusion, path=str(copy)), num_images=1)

    def drawn(name: str) -> np.ndarray:
        out = Path(run(replace(config, out=str(tmp_path / name))))
        return read_image(max(out.glob("0*.png"))).astype(int)

    before = drawn("out")
    save_json(copy / file, {**load_json(copy / file), **values})
    after = drawn("out")
    assert np.abs(after - before).max() > 2
    assert np.array_equal(drawn("fresh"), after)


def test_adapter_acts_by_its_strength(config: Config, adapter: Path, tmp_path: Path) -> None:
    def draw(name: str, **more: object) -> np.ndarray:
        return pictures(run(replace(config, out=str(tmp_path / name), **more)))

    plain = draw("plain")
    assert np.array_equal(draw("zero", adapter=str(adapter), strength=0.0), plain)
    half = draw("half", adapter=str(adapter), strength=0.5)
    full = draw("full", adapter=str(adapter))
    assert np.abs(half - plain).mean() > 0.5
    assert np.abs(full - half).mean() > 0.5


def test_hybrid_guidance_leaves_the_base_where_it_is_unadapted(config: Config, adapter: Path, tmp_path: Path) -> None:
    plain = pictures(run(replace(config, prompt="a photo of a face")))
    hybrid = replace(config, adapter=str(adapter), prompt="a photo of a [V] face")
    without = run(replace(hybrid, subject_guidance=0.0, out=str(tmp_path / "without")))
    assert np.abs(pictures(without) - plain).max() <= 1
    drawn = [pictures(run(replace(hybrid, subject_guidance=s, out=str(tmp_path / f"{s}")))) for s in (None, 3.0, 5.0)]
    assert all(np.abs(a - b).mean() > 0.5 for a, b in [(drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0], plain)])
    assert read_text(tmp_path / "3.0" / "00000.png")["subject_guidance"] == "3.0"
    settled = replace(hybrid.diffusion, subject_guidance=3.0)
    again = run(replace(hybrid, diffusion=settled, out=str(tmp_path / "settled")))
    assert np.array_equal(pictures(again), drawn[1])
    with warnings.catch_warnings():  # the base alone has no person to be guided to
        warnings.simplefilter("error")
        alone = run(replace(config, prompt="a photo of a face", diffusion=settled, out=str(tmp_path / "alone")))
    assert np.array_equal(pictures(alone), plain)


def test_adapter_is_a_folder_or_a_file(config: Config, person: Personalization, tmp_path: Path) -> None:
    file = person.save_lidb(tmp_path / "b" / "lidb.safetensors")
    of_folder = pictures(run(replace(config, adapter=str(file.parent), out=str(tmp_path / "1"))))
    of_file = pictures(run(replace(config, adapter=str(file), out=str(tmp_path / "2"))))
    assert np.array_equal(of_folder, of_file)
    best = person.save(file.with_name("adapter.safetensors"))
    assert find_adapter(str(file.parent)) == best


def test_the_same_as_in_python(
    config: Config, base: Base, tiny_base: Path, person: Personalization, adapter: Path
) -> None:
    """The stage and `Personalization.apply` on diffusers' pipeline draw the same person."""
    from diffusers import StableDiffusionPipeline

    out = run(replace(config, adapter=str(adapter)))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    handle = person.apply(pipeline)
    made = pipeline(
        ["a photo of a sks face"] * 3,
        latents=start_noise(base, [0, 1, 2]),
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="np",
    )
    handle.remove()
    assert np.abs(pictures(out) - np.round(made.images * 255)).max() <= 2


# --- notices


def notices(config: Config) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        run(replace(config, num_images=1))
    return [str(w.message) for w in caught]


def test_an_ordinary_request_has_none(config: Config, adapter: Path) -> None:
    assert notices(config) == []
    assert notices(replace(config, adapter=str(adapter), prompt="", negative_prompt="[V]")) != []
    assert notices(replace(config, prompt="")) == []


def test_the_adapters_rare_token_wins(
    config: Config, base: Base, person: Personalization, tmp_path: Path
) -> None:
    file = replace(person, rare_token="zwx").save(tmp_path / "x.safetensors")
    (notice,) = notices(replace(config, adapter=str(file)))
    assert "[V] stands for 'zwx'" in notice
    assert read_text(Path(config.out) / "00000.png")["rare_token"] == "zwx"
    handle = person.apply(base)
    latents = sample(base, ["a photo of a zwx face"], start_noise(base, [0]), 3, 3.0)
    handle.remove()
    expected = base.decode(latents).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures(config.out) - expected).max() <= 1


def test_words_never_taught_are_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = replace(config, prompt="a zebra face, on a bicycle", negative_prompt="haze")
    first, second = notices(odd)
    assert first.startswith("prompt has words")
    assert first.endswith(": zebra, bicycle")
    assert second.startswith("negative_prompt has words")
    assert second.endswith(": haze")
    monkeypatch.setattr(generate, "SMALL_VOCABULARY", 10)  # as with CLIP's own vocabulary
    assert notices(replace(odd, seed=1)) == []


def test_words_cut_off_are_named(config: Config) -> None:
    fits = "a photo of a face " * 4 + "on the"  # 22 tokens
    assert notices(replace(config, prompt=fits)) == []
    (notice,) = notices(replace(config, prompt=fits + " beach, smiling"))
    assert notice == "prompt is longer than 24 tokens; the base does not see: beach , smiling"


def test_a_word_of_several_vectors_takes_as_many_places(config: Config, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr("hyperdb.formats.native.places", lambda file: 18)
    ask = replace(config, adapter=str(adapter))
    assert notices(replace(ask, prompt="a photo of a [V]")) == []  # 22 tokens
    (notice,) = notices(replace(ask, prompt="a photo of a [V] face, smiling"))
    assert notice == "prompt is longer than 24 tokens, of which [V] takes 18; the base does not see: face , smiling"


def test_the_person_is_called_by_either_name(config: Config, adapter: Path) -> None:
    for prompt in ("a photo of a sks face", "SKS, smiling", "a [V] face"):
        assert notices(replace(config, adapter=str(adapter), prompt=prompt)) == []
    (notice,) = notices(replace(config, adapter=str(adapter), prompt="a photo of a face"))
    assert notice == "prompt has neither [V], the word for the person, nor 'sks': expect less likeness"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"guidance": 0.0}, "guidance=0.0 ignores the prompt; 1 is without guidance"),
        ({"guidance": -1.0}, "guidance=-1.0 draws away from the prompt"),
        ({"negative_prompt": "sketch", "guidance": 1.0}, "negative_prompt has no effect"),
        ({"strength": 0.5}, "strength=0.5 has no effect"),
    ],
)
def test_what_has_no_effect_is_said(config: Config, more: dict, said: str) -> None:
    (notice,) = notices(replace(config, **more))
    assert said in notice


def test_adapter_of_another_base_of_the_same_layout(
    config: Config, person: Personalization, tmp_path: Path
) -> None:
    file = replace(person, base="0" * 16).save(tmp_path / "x.safetensors")
    (notice,) = notices(replace(config, adapter=str(file)))
    assert "expect less likeness" in notice


# --- refusals: one line, and nothing written


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_images": 0}, "num_images=0"),
        ({"num_images": 10_001}, "num_images=10001"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed=18446744073709551615 num_images=2: picture i has seed"),
        ({"seed": -(2**63) - 1}, "seed=-9223372036854775809 num_images=3"),
        ({"batch": 0}, "batch=0"),
        ({"steps": 0}, "steps=0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"prompt": "a \udcff face"}, "prompt has characters"),
        ({"negative_prompt": "a\0b"}, "negative_prompt has characters"),
        ({"scheduler": "plms"}, "expected one of ddim, dpm"),
        ({"adapter": "nowhere.safetensors"}, "no adapter at nowhere"),
        ({"adapter": "."}, "holds neither adapter.safetensors nor lidb.safetensors"),
    ],
)
def test_refused_before_anything_is_written(config: Config, in_tmp: Path, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(replace(config, **wrong))
    assert not Path(config.out).exists()


def test_pictures_of_nothing_are_refused(config: Config, adapter: Path) -> None:
    error = pytest.raises(NonFiniteError, match=r"adapter=.*ada strength=1e\+30: .* is NaN, .* after 3 steps")
    with pytest.warns(UserWarning, match=r"strength=1e\+30 is far from 1"), error:
        run(replace(config, adapter=str(adapter), strength=1e30))
    with pytest.raises(NonFiniteError, match=r"^what was drawn is NaN, infinite .* guidance=1e\+39: lower"):
        run(replace(config, guidance=1e39))
    assert not list(Path(config.out).glob("*.png"))


def test_the_last_seeds(config: Config) -> None:
    run(replace(config, seed=2**64 - 3))
    assert read_text(Path(config.out) / "00002.png")["seed"] == str(2**64 - 1)


def test_foreign_and_damaged_adapters(config: Config, person: Personalization, tmp_path: Path) -> None:
    layers = person.layout.layers
    other = Personalization(Layout(layers[:-1]), person.tokens[:-1], person.config)
    file = other.save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was made for another model"):
        run(replace(config, adapter=str(file)))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        run(replace(config, adapter=str(file)))
    assert not Path(config.out).exists()


def test_out_is_a_file(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out=.*file is a file"):
        run(replace(config, out=str(tmp_path / "file")))


def test_from_the_command_line(tiny_base: Path, in_tmp: Path) -> None:
    words = ["num_images=1", "name=a", "steps=2", "prompt=a [V] face, on the beach"]
    words += [f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.device=cpu"]
    assert settings.run("generate", words) == Path("runs/generate/a")
    assert read_text("runs/generate/a/00000.png")["prompt"] == "a [V] face, on the beach"


def test_adapter_is_a_path_on_the_command_line() -> None:
    """Also where `conf/adapter/` is a group of other stages."""
    assert settings.load("generate", ["adapter=runs/ada (1)"]).adapter == "runs/ada (1)"
    assert settings.load("generate", ["adapter=null"]).adapter is None
