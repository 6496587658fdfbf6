"""Every way to personalise, from a photo to pictures: `personalize adapter=NAME`, its file, `generate`."""

from __future__ import annotations

import pytest
import torch

from hyperdb import config
from hyperdb.adapters import KINDS, site
from hyperdb.faces.image import read_image, save_png
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json, load_tensors, save_tensors

WAYS = {
    "dreambooth": "full", "lora": "lora", "textual_inversion": "token", "svdiff": "svdiff", "dora": "dora",
    "foura": "foura", "a1111": "a1111", "lorax": "lorax", "custom_diffusion": "custom",
    "e4t": "e4t", "plus": "plus",
}  # fmt: skip
TINY = ["diffusion.size=32", "diffusion.steps=2", "diffusion.dtype=fp32", "prior.images=2", "prior.levels=2"]


@pytest.fixture(scope="module")
def personalised(tiny_base, tmp_path_factory):
    """Return a function from a way to the folder of its run, made once."""
    folder = tmp_path_factory.mktemp("ways")
    photo = folder / "photo.png"
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    save_png(photo, pixels, {})
    made = {}

    def make(way: str, *words: str):
        if (way, words) not in made:
            out = folder / f"{way}{len(made)}"
            run = [f"image={photo}", "align=false", f"adapter={way}", f"out={out}", f"diffusion.path={tiny_base}"]
            run += [*TINY, "finetune.steps=4", "finetune.rate=0.05", "preview=false", *words]
            run += ["adapter.encoder=null"] if way == "e4t" else []
            made[way, words] = config.run("personalize", run)
        return made[way, words]

    return make


@pytest.mark.parametrize("way", WAYS)
def test_a_photo_becomes_a_file_that_generate_takes(way, personalised, tiny_base, tmp_path):
    out = personalised(way)
    person = Personalization.load(out / "adapter.safetensors")
    assert person.tokens is None
    assert [part.kind for part in person.parts] == [WAYS[way]]
    assert not (out / "lidb.safetensors").exists()
    assert load_json(out / "report.json")["hypernet"] is None
    words = [f"diffusion.path={tiny_base}", *TINY[:3], "prompt=a photo of a [V] face", "num_images=2"]
    drawn = config.run("generate", [*words, f"adapter={out}", f"out={tmp_path / 'own'}"])
    plain = config.run("generate", [*words, f"adapter={out}", "strength=0", f"out={tmp_path / 'base'}"])
    assert (read_image(drawn / "00000.png") != read_image(plain / "00000.png")).any()


@pytest.mark.parametrize("way", WAYS)
def test_the_file_is_read_as_it_was_written(way, personalised, tmp_path):
    first = personalised(way) / "adapter.safetensors"
    person = Personalization.load(first)
    tensors, metadata = load_tensors(first)
    assert metadata["version"] == "2"
    again, metadata_again = load_tensors(person.save(tmp_path / "again.safetensors"))
    assert metadata_again == metadata
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    half = Personalization.load(person.save(tmp_path / "half.safetensors", torch.float16))
    for name, value in person.parts[0].params.items():
        torch.testing.assert_close(half.parts[0].params[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_running_again_gives_the_same_numbers(way, personalised):
    # a word of no consequence makes another folder
    first, again = (load_tensors(personalised(way, *more) / "adapter.safetensors")[0] for more in ((), ("seed=0",)))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_no_adapter_is_replaced_by_one_of_another_kind(personalised):
    """LoRA and DoRA have the same settings."""
    out = personalised("lora")
    before = (out / "adapter.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"adapter\.safetensors of a run with other adapter\.kind, which"):
        personalised("dora", f"out={out}")
    assert (out / "adapter.safetensors").read_bytes() == before
    assert personalised("lora", f"out={out}") == out


def test_a_fit_and_its_preview_decompose_each_weight_once(personalised, monkeypatch):
    found = []
    decomposed = site.decomposed
    monkeypatch.setattr(site, "decomposed", lambda weight: found.append(weight) or decomposed(weight))
    out = personalised("svdiff", "preview=true", "preview_styles=[a sketch of a [V] face]")
    assert (out / "preview.png").is_file()
    person = Personalization.load(out / "adapter.safetensors")
    assert len(found) == len(person.parts[0].changes()) > 0


def test_another_seed_is_another_training(personalised):
    one, two = (Personalization.load(personalised("lora", f"seed={s}") / "adapter.safetensors") for s in (0, 1))
    assert any(not torch.equal(one.parts[0].params[k], v) for k, v in two.parts[0].params.items())


def test_another_adapter_lies_under_the_one_that_is_trained(personalised):
    under = personalised("svdiff")
    person = Personalization.load(personalised("lora", f"start={under}") / "adapter.safetensors")
    assert [part.kind for part in person.parts] == ["svdiff", "lora"]
    alone = Personalization.load(under / "adapter.safetensors").parts[0]
    assert all(torch.equal(person.parts[0].params[k], v) for k, v in alone.params.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: m.update(parts="[]"), "its parts are not those"),
        (lambda t, m: m.update(parts="["), "description of its parts is damaged"),
        (lambda t, m: m.update(parts='[{"kind": "lora"}]'), "no kind, config and layout"),
        (lambda t, m: m.update(parts=m["parts"].replace('"lora"', '"lokr"')), "kind 'lokr', unknown"),
        (lambda t, m: m.update(parts=m["parts"].replace('"rank": 4', '"rank": 5')), "has shape"),
        (lambda t, m: m.update(parts=m["parts"].replace('"rank"', '"ranks"')), "settings of another version"),
        (lambda t, m: t.pop(min(t)), "missing or unknown"),
        (lambda t, m: t.update({"part0:more": torch.zeros(1)}), "'more' of its adapter lora are missing or unknown"),
        (lambda t, m: t.update({min(t): t[min(t)] * float("nan")}), "not finite"),
        (lambda t, m: t.update({"part1:more": torch.zeros(1)}), "its parts are not those"),
    ],
)
def test_hostile_parts_give_one_clear_line(personalised, tmp_path, damage, message):
    from hyperdb.formats.native import _data_digest

    tensors, metadata = load_tensors(personalised("lora") / "adapter.safetensors")
    damage(tensors, metadata)
    metadata["data_digest"] = _data_digest(tensors)
    path = save_tensors(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=message) as caught:
        Personalization.load(path)
    assert str(caught.value).startswith(f"{path} is damaged or not a hyperdb adapter: ")


def test_every_kind_can_be_asked_for():
    assert {*WAYS.values(), "lidb"} == set(KINDS)


def test_a_hypernetwork_predicts_nothing_else_than_lidb():
    with pytest.raises(UserError, match="hypernet=x predicts LiDB"):
        config.load("personalize", ["image=x.png", "adapter=lora", "hypernet=x"])


def test_what_is_no_low_rank_is_neither_edited_nor_exported(personalised, tmp_path):
    for way in ("svdiff", "dreambooth"):
        with pytest.raises(UserError, match=f"kind {WAYS[way]}, which has no low-rank factors"):
            config.run("export", [f"adapter={personalised(way)}", f"out={tmp_path / way}"])
    with pytest.raises(UserError, match="it cannot be edited"):
        config.run("edit", [f"adapter={personalised('lora')}", "age=1", f"out={tmp_path / 'edit'}"])


def test_a_gate_that_follows_the_input_is_drawn_with_but_not_exported(personalised, pipeline, tmp_path):
    file = personalised("foura", "adapter.adaptive=true", "adapter.rank=4") / "adapter.safetensors"
    person = Personalization.load(file)
    plain, ours = pipeline("a sks face"), pipeline("a sks face", person.apply)
    assert (plain - ours).abs().max() > 1e-3
    with pytest.raises(UserError, match="kind foura, which has no low-rank factors"):
        config.run("export", [f"adapter={file}", f"out={tmp_path}"])


def test_textual_inversion_leaves_every_other_word_alone(personalised, tiny_base):
    person = Personalization.load(personalised("textual_inversion") / "adapter.safetensors")
    settings = config.load("generate", [f"diffusion.path={tiny_base}", *TINY[:3]]).diffusion
    base = settings.load()
    prompts = ["a photo of a face", "a photo of a [V] face"]
    embedding = base.text_encoder.get_input_embeddings()
    ids = base.tokenize(prompts)
    before = embedding(ids)
    person.apply(base)
    after = embedding(ids)
    (rare,) = base.tokenizer(base.config.rare_token, add_special_tokens=False).input_ids
    assert torch.equal(after[ids != rare], before[ids != rare])
    assert not torch.equal(after[ids == rare], before[ids == rare])


# --- in the loaders of other tools


@pytest.fixture
def pipeline(tiny_base):
    """Return a function that draws with diffusers, from a fresh pipeline that something was done to."""
    from diffusers import StableDiffusionPipeline

    def draw(prompt, change=lambda pipe: None):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        change(pipe)
        g = torch.Generator().manual_seed(2)
        return torch.from_numpy(pipe(prompt, num_inference_steps=2, generator=g, output_type="np").images)

    return draw


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
def test_diffusers_and_peft_load_a_dora(personalised, pipeline, tmp_path):
    from peft import PeftModel

    file, prompt = personalised("dora") / "adapter.safetensors", "a sks face"
    plain, ours = pipeline(prompt), pipeline(prompt, Personalization.load(file).apply)
    assert (plain - ours).abs().max() > 1e-2
    out = config.run("export", [f"adapter={file}", "format=diffusers", "dtype=fp32", f"out={tmp_path / 'a'}"])
    loaded = pipeline(prompt, lambda pipe: pipe.load_lora_weights(str(out / "default.safetensors")))
    assert torch.allclose(loaded, ours, atol=1e-4)
    folder = config.run("export", [f"adapter={file}", "format=peft", "dtype=fp32", f"out={tmp_path / 'b'}"])

    def as_peft(pipe):
        pipe.unet = PeftModel.from_pretrained(pipe.unet, str(folder / "unet")).base_model.model
        pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, str(folder / "text_encoder")).base_model.model

    assert torch.allclose(pipeline(prompt, as_peft), ours, atol=1e-4)


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_loads_the_vectors_of_a_word(vectors, personalised, pipeline, tmp_path):
    more = [f"adapter.vectors={vectors}", "finetune.rate=1.0"]
    file = personalised("textual_inversion", *more) / "adapter.safetensors"
    plain, ours = pipeline("a sks face"), pipeline("a sks face", Personalization.load(file).apply)
    assert (plain - ours).abs().max() > 1e-3
    words = [f"adapter={file}", "format=textual_inversion", "name=ada", "dtype=fp32", f"out={tmp_path / 'a'}"]
    out = config.run("export", words)
    assert "`<ada> face`" in (out / "README.md").read_text()
    loaded = pipeline("a <ada> face", lambda pipe: pipe.load_textual_inversion(str(out / "ada.safetensors")))
    assert torch.allclose(loaded, ours, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "words", "message"),
    [
        ("dora", ["format=kohya"], "format=diffusers or format=peft"),
        ("dora", ["format=diffusers", "strength=0.5"], "strength=0.5 cannot be baked"),
        ("lora", ["format=textual_inversion"], "is not one adapter of kind token alone"),
        ("lora", ["format=a1111"], "is not one adapter of kind a1111 alone"),
        ("a1111", ["format=a1111", "strength=0.5"], "strength=0.5 cannot be baked"),
        ("svdiff", ["format=native", "strength=0.5"], "strength=0.5 cannot be baked"),
        ("svdiff", ["format=native", "dtype=int8"], "int8 is a format of LiDB's numbers"),
    ],
)
def test_what_other_tools_cannot_read_is_refused(personalised, tmp_path, way, words, message):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        config.run("export", [f"adapter={personalised(way)}", f"out={out}", *words])
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize("way", ["lora", "foura"])
def test_a_lora_is_exported_as_every_low_rank_adapter(personalised, pipeline, tmp_path, way):
    file = personalised(way) / "adapter.safetensors"
    ours = pipeline("a sks face", Personalization.load(file).apply)
    out = config.run("export", [f"adapter={file}", "dtype=fp32", f"out={tmp_path / 'a'}"])
    loaded = pipeline("a sks face", lambda pipe: pipe.load_lora_weights(str(out / "default.safetensors")))
    assert torch.allclose(loaded, ours, atol=1e-4)
