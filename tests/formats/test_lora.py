"""Exported files give the same pictures in the loaders of other tools, and files of other tools give them here."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hyperdb.adapters.base import delta
from hyperdb.adapters.inject import Injection
from hyperdb.diffusion.targets import find_sites, find_targets
from hyperdb.formats import lora
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata
from hyperdb.runtime.paths import resolve


@pytest.fixture(params=["random", "embedded"])
def pipeline(request, tiny_base):
    folder = tiny_base if request.param == "random" else resolve("package:embedded/base")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def factors_of(sites, ranks=(3,), scale=0.2):
    """Return factors of every site; of a pipeline, of the paper's layers."""
    if isinstance(sites, StableDiffusionPipeline):
        sites = find_targets(sites.unet, sites.text_encoder)
    g = torch.Generator().manual_seed(1)
    made = {}
    for i, (name, module) in enumerate(sites.items()):
        (m, *n), r = module.weight.shape, ranks[i % len(ranks)]
        made[name] = scale * torch.randn(1, r, *n, generator=g), scale * torch.randn(1, m, r, generator=g)
    return made


def picture(pipe):
    g = torch.Generator().manual_seed(2)
    return torch.from_numpy(pipe("a photo of a face", num_inference_steps=2, generator=g, output_type="np").images)


def with_adapter(pipe, factors):
    injection = Injection(sites_of(pipe))
    injection.set(factors)
    try:
        return picture(pipe)
    finally:
        injection.remove()


@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_our_file(pipeline, tmp_path, format, ranks):
    factors = factors_of(pipeline, ranks)
    plain, ours = picture(pipeline), with_adapter(pipeline, factors)
    assert (plain - ours).abs().max() > 1e-2
    path = lora.write(tmp_path / "ada.safetensors", factors, format, {})
    pipeline.load_lora_weights(str(path))
    assert torch.allclose(picture(pipeline), ours, atol=1e-4)


def test_the_text_encoder_is_not_dropped(pipeline, tmp_path):
    factors = {
        name: (down, up if name.startswith("text_encoder") else up * 0)
        for name, (down, up) in factors_of(pipeline, scale=0.6).items()
    }
    ours = with_adapter(pipeline, factors)
    assert (picture(pipeline) - ours).abs().max() > 1e-4
    pipeline.load_lora_weights(str(lora.write(tmp_path / "ada.safetensors", factors, "kohya", {})))
    assert torch.allclose(picture(pipeline), ours, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own
def test_peft_loads_our_folders(pipeline, tmp_path):
    from peft import PeftModel

    factors = factors_of(pipeline)
    ours = with_adapter(pipeline, factors)
    folder = lora.write(tmp_path / "ada", factors, "peft", {})
    for part in ("unet", "text_encoder"):
        setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), folder / part).base_model.model)
    assert torch.allclose(picture(pipeline), ours, atol=1e-4)


@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)])
def test_lycoris_loads_our_file(pipeline, tmp_path, monkeypatch, ranks):
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    factors = factors_of(pipeline, ranks)
    ours = with_adapter(pipeline, factors)
    path = str(lora.write(tmp_path / "ada.safetensors", factors, "kohya", {}))
    inside = "" if hasattr(pipeline.text_encoder, "text_model") else "_text_model"
    for prefix, part in (("lora_unet", pipeline.unet), (f"lora_te{inside}", pipeline.text_encoder)):
        monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", prefix)
        network, _ = create_lycoris_from_weights(1.0, path, part)
        side = "unet." if part is pipeline.unet else "text_encoder."
        assert len(network.loras) == sum(name.startswith(side) for name in factors)
        network.apply_to()
    assert torch.allclose(picture(pipeline), ours, atol=1e-4)


@pytest.mark.parametrize("format", lora.FORMATS)
def test_round_trip(base, tmp_path, format):
    factors = factors_of(sites_of(base), (1, 3))
    path = lora.write(tmp_path / ("ada" if format == "peft" else "ada.safetensors"), factors, format, {"who": "ada"})
    given = lora.read(path)
    again = given.factors(sites_of(base), "the base")
    assert given.metadata["who"] == "ada"
    assert again.keys() == factors.keys()
    for name, pair in factors.items():
        assert torch.allclose(delta(*pair), delta(*again[name]), atol=1e-5)


# --- reading: what the loaders of the tools that wrote a file draw with it


def sites_of(pipe):
    return find_sites(pipe.unet, pipe.text_encoder)


def imported(pipe, path):
    return with_adapter(pipe, lora.read(path).factors(sites_of(pipe), "the base"))


def noise(*shape):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def base(tiny_base):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


UNET = ["to_q", "to_out.0", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_shortcut", "time_emb_proj", "conv_in"]
TEXT = ["q_proj", "out_proj", "fc1", "fc2"]
SETTINGS = {
    "one alpha": {"lora_alpha": 6},
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 4, "fc1": 1}, "alpha_pattern": {"conv1": 1, "attn2.to_q": 7}},
    "gaussian": {"lora_alpha": 4, "init_lora_weights": "gaussian"},
}


def trained(model, targets, settings):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=targets, **settings))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = noise(*weight.shape)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("kind", ["diffusers", "peft"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of the other network
def test_what_peft_trained_is_read_to_the_number(base, tmp_path, kind, case):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    plain, settings = picture(base), SETTINGS[case]
    if kind == "peft":
        for part, targets in (("unet", UNET), ("text_encoder", TEXT)):
            model = get_peft_model(getattr(base, part), LoraConfig(r=2, target_modules=targets, **settings))
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.data = noise(*weight.shape)
            model.save_pretrained(tmp_path / "ada" / part)
            setattr(base, part, model.base_model.model)
        path = tmp_path / "ada"
    else:
        trained(base.unet, UNET, settings)
        trained(base.text_encoder, TEXT, settings)
        parts = {"unet": base.unet, "text_encoder": base.text_encoder}
        layers = {
            f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            if part == "text_encoder" else get_peft_model_state_dict(model)
            for part, model in parts.items()
        }  # fmt: skip
        stated = {f"{part}_lora_adapter_metadata": x.peft_config["default"].to_dict() for part, x in parts.items()}
        base.save_lora_weights(tmp_path / "ada", **layers, **stated)
        path = tmp_path / "ada"
    reference = picture(base)
    fresh = StableDiffusionPipeline.from_pretrained(base.config._name_or_path, safety_checker=None)
    fresh.set_progress_bar_config(disable=True)
    ours = imported(fresh, path)
    assert (reference - plain).abs().max() > 1e-2
    assert torch.allclose(ours, reference, atol=1e-4)


def kohya(base, names, rank=2, **alphas):
    """Return tensors as kohya writes them, of the sites whose names end in one of `names`."""
    tensors = {}
    for name, module in sites_of(base).items():
        if name.endswith(tuple(names)):
            m, *n = module.weight.shape
            key = lora.kohya_name(name)
            tensors[f"{key}.lora_down.weight"] = noise(rank, *n)
            tensors[f"{key}.lora_up.weight"] = noise(m, rank, *[1] * (len(n) - 1))
            if (alpha := next((a for end, a in alphas.items() if name.endswith(end)), None)) is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("alphas", [{"": 1.0}, {}], ids=["one alpha", "no alpha"])
def test_diffusers_draws_the_same_from_what_kohya_trains(base, tmp_path, alphas):
    names = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv"]
    text = ["q_proj", "out_proj", "mlp.fc1", "mlp.fc2"]
    save_file(kohya(base, names + text, **alphas), tmp_path / "ada.safetensors")
    plain, ours = picture(base), imported(base, tmp_path / "ada.safetensors")
    base.load_lora_weights(str(tmp_path / "ada.safetensors"))
    assert (plain - ours).abs().max() > 1e-2
    assert torch.allclose(picture(base), ours, atol=1e-4)


@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "cp"])
@pytest.mark.parametrize("spelling", ["lora_te_", "lora_te_text_model_"])
def test_lycoris_draws_the_same_from_a_locon(base, tmp_path, monkeypatch, tucker, spelling):
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    names = ["to_q", "conv1", "conv2", "conv_out", "proj_in", "fc1", "v_proj"]
    tensors = kohya(base, names, to_q=1.0, conv1=5.0, fc1=0.5, **{"": 2.0})
    for key in [k for k in tensors if tucker and k.endswith("down.weight") and tensors[k].shape[2:] == (3, 3)]:
        down = tensors[key]
        tensors |= {key: noise(2, down.shape[1], 1, 1), key.replace("lora_down", "lora_mid"): noise(2, 2, 3, 3)}
    mids = sum("lora_mid" in key for key in tensors)
    assert bool(mids) == tucker
    bare = {key.replace("lora_te_text_model_", "lora_te_"): value for key, value in tensors.items()}
    file, own = tmp_path / "ada.safetensors", tmp_path / "bare.safetensors"
    save_file({key.replace("lora_te_text_model_", spelling): value for key, value in tensors.items()}, file)
    save_file(bare if not hasattr(base.text_encoder, "text_model") else tensors, own)
    plain, ours = picture(base), imported(base, file)
    for prefix, part in (("lora_unet", base.unet), ("lora_te", base.text_encoder)):
        monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", prefix)
        network, _ = create_lycoris_from_weights(1.0, str(own), part)
        assert network.loras
        network.apply_to()
    assert (plain - ours).abs().max() > 1e-2
    assert torch.allclose(picture(base), ours, atol=1e-4)


OLD_UNET = {"to_q.lora_A": "processor.to_q_lora.down", "to_q.lora_B": "processor.to_q_lora.up",
            "to_out.0.lora_A": "processor.to_out_lora.down", "to_out.0.lora_B": "processor.to_out_lora.up"}  # fmt: skip
SPELLINGS = {  # by diffusers through the years
    "processors": OLD_UNET | {"q_proj.lora_A": "to_q_lora.down", "q_proj.lora_B": "to_q_lora.up",
                              "out_proj.lora_A": "to_out_lora.down", "out_proj.lora_B": "to_out_lora.up"},
    "linear layers": {".lora_A": ".lora_linear_layer.down", ".lora_B": ".lora_linear_layer.up"},
    "lora": {"to_q.lora_A": "to_q.lora.down", "to_q.lora_B": "to_q.lora.up", "to_out.0.lora_A": "to_out.0.lora.down",
             "to_out.0.lora_B": "to_out.0.lora.up", "q_proj.lora_A": "q_proj.lora_linear_layer.down",
             "q_proj.lora_B": "q_proj.lora_linear_layer.up", "out_proj.lora_A": "out_proj.lora_linear_layer.down",
             "out_proj.lora_B": "out_proj.lora_linear_layer.up"},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_keys_of_2023(base, tmp_path, spelling, wrapped):
    tensors = {}
    for name, module in sites_of(base).items():
        if name.endswith(("to_q", "to_out.0", "q_proj", "out_proj")):
            m, n = module.weight.shape
            name = name.replace("text_encoder.", "text_encoder.text_model.") if wrapped else name
            tensors |= {f"{name}.lora_A.weight": noise(2, n), f"{name}.lora_B.weight": noise(m, 2)}
    for new, old in SPELLINGS[spelling].items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    assert not any("lora_A" in key for key in tensors)
    save_file(tensors, tmp_path / "ada.safetensors")
    plain, ours = picture(base), imported(base, tmp_path / "ada.safetensors")
    assert (plain - ours).abs().max() > 1e-2
    if spelling == "linear layers":  # today's diffusers reads those of text encoders only
        tensors = {k.replace("lora_linear_layer", "lora") if "unet" in k else k: v for k, v in tensors.items()}
        save_file(tensors, tmp_path / "ada.safetensors")
    base.load_lora_weights(str(tmp_path / "ada.safetensors"))
    assert torch.allclose(picture(base), ours, atol=1e-4)


def test_attention_processors_of_2023_without_unet_before_them(base, tmp_path):
    tensors = kohya(base, ["attn1.to_q", "attn2.to_out.0"])
    named = {}
    for name in sites_of(base):
        key, path = lora.kohya_name(name) if name.startswith("unet") else "", name.removeprefix("unet.")
        for side in ("down", "up"):
            if f"{key}.lora_{side}.weight" in tensors:
                inner, _, last = path.removesuffix(".0").rpartition(".")
                named[f"{inner}.processor.{last}_lora.{side}.weight"] = tensors[f"{key}.lora_{side}.weight"]
    assert len(named) == len(tensors)
    save_file(tensors, tmp_path / "kohya.safetensors")
    save_file(named, tmp_path / "old.safetensors")
    new, old = (lora.read(tmp_path / x).factors(sites_of(base), "") for x in ("kohya.safetensors", "old.safetensors"))
    assert new.keys() == old.keys()
    assert all(torch.equal(delta(*new[name]), delta(*old[name])) for name in new)


OTHER_NAMES = {
    "te1 of an SD 1.x file": lambda k: k.replace("lora_te_", "lora_te1_"),
    "OneTrainer": lambda k: k.replace("lora_unet_", "lora_unet.").replace("lora_te_", "lora_te."),
    "ComfyUI": lambda k: k.replace("lora_unet_", "diffusion_model.").replace("lora_te_", "text_encoder_"),
    "half": lambda k: k,
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_other_spellings(base, tmp_path, case):
    tensors = kohya(base, ["to_q", "to_k", "q_proj", "conv_in"], to_q=1.0)
    expected = save_file(tensors, tmp_path / "a.safetensors") or lora.read(tmp_path / "a.safetensors")
    renamed = {OTHER_NAMES[case](key): value.half() if case == "half" else value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "b.safetensors")
    if "te1" in case:  # only the width of cross-attention tells it from SDXL
        with pytest.raises(UserError, match="SDXL"):
            lora.read(tmp_path / "b.safetensors")
        shapes = {key: (2, 768) if "attn2_to_k" in key else tuple(value.shape) for key, value in renamed.items()}
        assert lora._model(shapes, {}) == "Stable Diffusion 1.x"
        return
    one, two = expected.factors(sites_of(base), ""), lora.read(tmp_path / "b.safetensors").factors(sites_of(base), "")
    assert one.keys() == two.keys()
    assert all(torch.allclose(delta(*one[name]), delta(*two[name]), atol=1e-2) for name in one)


def test_a_text_encoder_alone_and_an_adapter_named_by_peft(base, tmp_path):
    tensors = {k.replace("lora_down", "lora_A.default").replace("lora_up", "lora_B.default"): v
               for k, v in kohya(base, ["fc1"]).items()}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    factors = lora.read(tmp_path / "a.safetensors").factors(sites_of(base), "")
    assert factors
    assert all(name.endswith("mlp.fc1") for name in factors)


def test_a_bundled_embedding_is_named(base, tmp_path):
    bundle = {"bundle_emb.ohwx.string_to_param.*": noise(2, 32), "bundle_emb.zwx.clip_l": noise(2, 32)}
    save_file(kohya(base, ["to_q"]) | bundle, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="textual inversion ohwx, zwx"):
        given = lora.read(tmp_path / "a.safetensors")
    assert all(name.endswith("to_q") for name in given.factors(sites_of(base), ""))


# --- what is refused, and as what

BREAKS = {
    "is 0": lambda t: t | {k: v * 0 for k, v in t.items() if k.endswith(".alpha")},
    "DoRA": lambda t: t | {"lora_unet_x.dora_scale": torch.ones(1)},
    "shape": lambda t: {k: v[:0] if k.endswith("down.weight") else v for k, v in t.items()},
    "not finite": lambda t: {k: v * float("nan") if k.endswith("up.weight") else v for k, v in t.items()},
    "lacks the up": lambda t: {k: v for i, (k, v) in enumerate(t.items()) if not k.endswith("up.weight") or i > 3},
    "int8": lambda t: {k: v.char() for k, v in t.items()},
    "takes": lambda t: {k: v[:, :-1].contiguous() if k.endswith("down.weight") else v for k, v in t.items()},
    "no layer 'lora_unet_other": lambda t: {k.replace("lora_unet_", "lora_unet_other_"): v for k, v in t.items()},
    "twice": lambda t: t | {k.replace("lora_unet_", "unet."): v + 0 for k, v in t.items()},
    "LoHa": lambda t: {"lora_unet_mid.hada_w1_a": torch.ones(2, 2)},
    "LoKr": lambda t: {"lora_unet_mid.lokr_w1": torch.ones(2, 2)},
    "IA3": lambda t: {"lora_unet_mid.weight": torch.ones(2), "lora_unet_mid.on_input": torch.ones(1)},
    "OFT": lambda t: {"lora_unet_mid.oft_blocks": torch.ones(2, 2)},
    "GLoRA": lambda t: {"lora_unet_mid.a1.weight": torch.ones(2, 2)},
    "differences of whole": lambda t: t | {"lora_unet_mid.diff": torch.ones(2, 2)},
    "trained biases": lambda t: t | {"unet.mid.lora_B.bias": torch.ones(2)},
    "textual inversion": lambda t: {"emb_params": torch.ones(2, 768)},
    "whole Stable Diffusion checkpoint": lambda t: {"model.diffusion_model.out.2.weight": torch.ones(2, 2)},
    "no LoRA: its first": lambda t: {"x": torch.ones(1)},
    "no tensors": lambda t: {},
    "merged in one layer": lambda t: t | {"lora_unet_mid_attn1_to_qkv.lora_down.weight": torch.ones(2, 2)},
    "first Stable Diffusion code": lambda t: {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(2, 2)},
    "for SDXL:": lambda t: t | {"lora_te2_text_model_x.lora_down.weight": torch.ones(2, 2)},
    "for SDXL: ": lambda t: {"lora_unet_mid_block_0_transformer_blocks_0_attn2_to_k.lora_down.weight": noise(2, 2048)},
    "lora_te1_ is the first": lambda t: {"lora_te1_text_model_x.lora_down.weight": torch.ones(2, 2)},
    "for Flux": lambda t: {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
    "for Stable Diffusion 3": lambda t: {"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": noise(2, 2)},
    "for a diffusion transformer": lambda t: {"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": noise(2, 2)},
    "is for Stable Diffusion 1.x; .* diffusion=sd15": lambda t: {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_{side}.weight": noise(*shape)
        for side, shape in (("down", (2, 768)), ("up", (1280, 2)))
    },
    "is for Stable Diffusion 2.x; .*has no layer": lambda t: {
        f"lora_te_text_model_encoder_layers_22_self_attn_q_proj.lora_{side}.weight": noise(*shape)
        for side, shape in (("down", (2, 1024)), ("up", (1024, 2)))
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", BREAKS)
def test_another_file_is_refused_as_what_it_is(base, tmp_path, reason):
    path = tmp_path / "ada.safetensors"
    save_file(BREAKS[reason](kohya(base, ["to_q"], to_q=1.0)), path)
    with pytest.raises(UserError, match=reason.strip()) as error:
        lora.read(path).factors(sites_of(base), "the base")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.safetensors", b"", "is empty"),
        ("a.safetensors", b"PK\x03\x04" + b"x" * 100, "pickle"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html>", "web page"),
        ("a.safetensors", b'{"error": "Unauthorized"}', "JSON"),
        ("a.safetensors", b"\xff" * 100, "not a readable safetensors"),
        ("a.pt", b"PK", "a.pt is a pickle"),
        ("a.ckpt", b"PK", "a.ckpt is a pickle"),
        ("folder/adapter_model.bin", b"PK", "adapter_model.bin .*pickle"),
        ("folder/notes.txt", b"", "no .safetensors file and no adapter_config.json"),
        ("folder/text_encoder_2/x", b"", "SDXL"),
    ],
)
def test_files_that_are_not_safetensors_are_named(tmp_path, name, content, reason):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        lora.read(tmp_path / name.split("/")[0])


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        lora.read(tmp_path / "none.safetensors")


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_alpha=None": {"lora_alpha": None},
    "r=0": {"r": 0},
    "settings say 7": {"r": 7},
    "kind IA3": {"peft_type": "IA3"},
    "pissa: ": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "bias=all": {"bias": "all"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["conv_in"]},
    "use_qalora": {"use_qalora": True},
    "a_setting_of_tomorrow": {"a_setting_of_tomorrow": {"x": 1}},
    "regular expression": {"alpha_pattern": {"(a+)+$": 2}},
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("kind", ["peft", "diffusers"])
def test_settings_of_peft_that_are_not_understood_are_refused(base, tmp_path, kind, reason):
    factors = factors_of(sites_of(base))
    if kind == "peft":
        path = lora.write(tmp_path / "ada", factors, "peft", {})
        file = path / "unet" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | REFUSED[reason]))
    else:
        path = lora.write(tmp_path / "ada.safetensors", factors, "diffusers", {})
        stated = json.loads(load_metadata(path)["lora_adapter_metadata"])
        stated |= {f"unet.{key}": value for key, value in REFUSED[reason].items()}
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(stated)})
    with pytest.raises(UserError, match=reason):
        lora.read(path)


def test_a_file_of_peft_needs_its_settings(base, tmp_path):
    folder = lora.write(tmp_path / "ada", factors_of(sites_of(base)), "peft", {}) / "unet"
    whole, alone = (lora.read(p).factors(sites_of(base), "") for p in (folder, folder / "adapter_model.safetensors"))
    assert whole.keys() == alone.keys() == {name for name in sites_of(base) if name.startswith("unet")}
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"needs its adapter_config\.json"):
        lora.read(folder / "adapter_model.safetensors")


def test_the_scale_of_the_header_counts(base, tmp_path):
    factors = factors_of(sites_of(base))
    path = lora.write(tmp_path / "ada.safetensors", factors, "diffusers", {})
    tensors, stated = load_file(path), json.loads(load_metadata(path)["lora_adapter_metadata"])
    tensors = {k.replace("text_model.", ""): v for k, v in tensors.items()}  # as newer versions name them
    stated = {k: v * 2 if k.endswith("lora_alpha") else v for k, v in stated.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(stated)})
    again = lora.read(path).factors(sites_of(base), "")
    for name, pair in factors.items():
        assert torch.allclose(2 * delta(*pair), delta(*again[name]), atol=1e-5)


def test_half_precision_refuses_what_it_cannot_hold(base, tmp_path):
    with pytest.raises(UserError, match="fp32"):
        lora.write(tmp_path / "a.safetensors", factors_of(base, scale=1e6), "kohya", {}, torch.float16)
