"""The native file: round trip, the paper's size, hostile files, application to a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hyperdb.adapters import LiDBConfig, LoRAConfig
from hyperdb.adapters.base import concatenate, delta, rank_of
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.diffusion.targets import base_hash, find_targets
from hyperdb.formats.native import Personalization, _data_digest
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata

LAYOUT = Layout((Layer("tall", (40, 12)), Layer("flat", (9, 30)), Layer("tiny", (2, 3))))
CONFIG = LiDBConfig(a=10, b=5, rank=2, seed=7)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def person(layout: Layout = LAYOUT, config: LiDBConfig = CONFIG, **more: str) -> Personalization:
    lora = LoRAConfig(rank=3).build(layout)
    relaxed = lora.changes({k: v + 0.1 * noise(*v.shape) for k, v in lora.init(1).items()})
    lidb = config.build(layout)
    tokens = noise(*lidb.mask.shape) * lidb.mask
    return Personalization(layout, tokens, config, relaxed=relaxed, **more)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return person(base="0123", rare_token="très", class_word="face").save(tmp_path / "a.safetensors")


def test_round_trip(saved: Path) -> None:
    made, read = person(), Personalization.load(saved)
    assert (read.layout, read.config) == (made.layout, made.config)
    assert (read.base, read.rare_token, read.class_word) == ("0123", "très", "face")
    assert read.fingerprint == made.lidb.fingerprint
    assert torch.equal(read.tokens, made.tokens)
    assert rank_of(read.factors()) == 2 + 3
    for name, pair in made.factors().items():
        assert all(torch.equal(x, y) for x, y in zip(pair, read.factors()[name], strict=True))
    again = read.save(saved.with_name("b.safetensors"))
    assert load_metadata(again) == load_metadata(saved)


def test_factors_are_lidb_and_relaxed_side_by_side() -> None:
    made = person()
    own = made.lidb.factors({"tokens": made.tokens[None]})
    expected = concatenate(own, made.relaxed)
    for name in LAYOUT.names:
        torch.testing.assert_close(delta(*made.factors()[name]), delta(*expected[name]))
    assert rank_of(replace(made, relaxed={}).factors()) == 2


def test_lidb_alone_and_half_precision(tmp_path: Path) -> None:
    made = person()
    path = made.save_lidb(tmp_path / "lidb.safetensors", torch.float16)
    assert {k: (v.dtype, v.shape) for k, v in load_file(path).items()} == {
        "lidb": (torch.float16, (made.lidb.numbers,))
    }
    read = Personalization.load(path)
    assert not read.relaxed
    torch.testing.assert_close(read.tokens, made.tokens, atol=2e-3, rtol=1e-3)


def test_int8_is_a_quarter_as_large_and_nearly_the_same_residual(tmp_path: Path) -> None:
    made = person()
    path = made.save(tmp_path / "a.safetensors", torch.int8)
    kinds = {k: v.dtype for k, v in load_file(path).items()}
    assert {k for k, v in kinds.items() if v is torch.float32} == {"lidb.scale", "scale"}
    assert all(v is torch.int8 for k, v in kinds.items() if k not in ("lidb.scale", "scale"))
    read = Personalization.load(path)
    assert read.relaxed.keys() == made.relaxed.keys()
    for name, pair in made.factors().items():
        exact, rough = delta(*pair), delta(*read.factors()[name])
        assert 0 < (rough - exact).norm() / exact.norm() < 0.015
    alone = made.save_lidb(tmp_path / "lidb.safetensors", torch.int8)
    assert Personalization.load(alone).relaxed == {}
    again = read.save(tmp_path / "b.safetensors", torch.int8)
    for name, pair in Personalization.load(again).factors().items():
        torch.testing.assert_close(delta(*pair), delta(*read.factors()[name]))


def test_int8_of_zeros_is_zero(tmp_path: Path) -> None:
    made = person()
    empty = replace(made, tokens=0 * made.tokens, relaxed={})
    assert not Personalization.load(empty.save(tmp_path / "a.safetensors", torch.int8)).tokens.any()


def test_the_papers_size_on_sd15(tmp_path: Path) -> None:
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    with torch.device("meta"):
        unet, text_encoder = (
            UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            CLIPTextModel(clip),
        )
    layout = Layout.of(find_targets(unet, text_encoder))
    tokens = LiDBConfig().build(layout).template
    made = Personalization(layout, tokens, base="0" * 16)
    scales = 192 * 2 * 4
    for dtype, size in ((torch.float32, 115_200), (torch.float16, 57_600), (torch.int8, 28_800 + scales)):
        path = made.save_lidb(tmp_path / "lidb.safetensors", dtype)
        assert sum(x.nbytes for x in load_file(path).values()) == size
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header <= 16 * 1024
        assert path.stat().st_size == 8 + header + size < 131_072
        read = Personalization.load(path).tokens
        torch.testing.assert_close(read, tokens, atol=0 if dtype is torch.float32 else 5e-3, rtol=0)


# ---- files and values that must be refused ----


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Path:
    """Apply `change`, then make the data digest right again: only the change itself is wrong."""
    tensors, metadata = load_file(path), load_metadata(path)
    change(tensors, metadata)
    if all(x.dtype in (torch.float16, torch.float32, torch.int8) for x in tensors.values()):
        metadata.setdefault("data_digest", "")
        metadata["data_digest"] = metadata["data_digest"] and _data_digest(tensors)
    save_file(tensors, path, metadata)
    return path


HOSTILE = {
    "foreign": (lambda t, m: m.clear(), "not a hyperdb adapter"),
    "newer": (lambda t, m: m.update(version="3"), "update hyperdb"),
    "no layout": (lambda t, m: m.pop("layout"), "lacks 'layout'"),
    "no word": (lambda t, m: m.pop("rare_token"), "lacks 'rare_token'"),
    "layout not text": (lambda t, m: m.update(layout="[1, 2"), "is not 'name out in'"),
    "layout changed": (lambda t, m: m.update(layout=m["layout"].replace("40 12", "12 40")), "digest"),
    "a not a number": (lambda t, m: m.update(a="10.0"), "its a is '10.0'"),
    "a of 10,000 digits": (lambda t, m: m.update(a="9" * 10_000), "its a is"),
    "rank 0": (lambda t, m: m.update(rank="0"), "rank=0"),
    "another rank": (lambda t, m: m.update(rank="1"), "needs \\[35\\] LiDB numbers"),
    "another basis": (lambda t, m: m.update(basis="qr-normal-9"), "bases are of kind"),
    "no digest": (lambda t, m: m.update(data_digest=""), "digest"),
    "no numbers": (lambda t, m: t.pop("lidb"), "there are none"),
    "numbers as a matrix": (lambda t, m: t.update(lidb=t["lidb"][None]), "there are \\[1, 70\\]"),
    "whole numbers": (lambda t, m: t.update(lidb=t["lidb"].long()), "torch.int64"),
    "not finite": (lambda t, m: t["lidb"][3].fill_(torch.nan), "not finite"),
    "relaxed not finite": (lambda t, m: t["flat.up"][0].fill_(torch.inf), "not finite"),
    "unknown tensor": (lambda t, m: t.update(more=torch.zeros(1)), "'more' is missing or unknown"),
    "scalar": (lambda t, m: t.update({"flat.up": torch.tensor(1.0)}), "do not fit layer flat"),
    "missing tensor": (lambda t, m: t.pop("flat.up"), "'flat.up' is missing or unknown"),
    "swapped sides": (
        lambda t, m: t.update({"flat.up": t["flat.up"].mT.contiguous()}),
        "do not fit layer flat",
    ),
    "rank 0 relaxed": (
        lambda t, m: t.update({"flat.down": torch.zeros(0, 30), "flat.up": torch.zeros(9, 0)}),
        "do not fit layer flat",
    ),
    "long word": (lambda t, m: m.update(rare_token="x" * 201), "rare_token"),
    "two lines": (lambda t, m: m.update(class_word="a\nb"), "class_word"),
}


HOSTILE_INT8 = {
    "no scale": (lambda t, m: t.pop("scale"), "'scale' has shape None, not \\[9\\]"),
    "no LiDB scale": (lambda t, m: t.pop("lidb.scale"), "'lidb.scale' has shape None"),
    "scales too many": (lambda t, m: t.update(scale=torch.ones(10)), "'scale' has shape \\[10\\]"),
    "scale of int8": (lambda t, m: t.update(scale=torch.ones(9).char()), "'scale' is torch.int8"),
    "scale not finite": (lambda t, m: t["scale"][0].fill_(torch.nan), "not finite"),
    "mixed": (lambda t, m: t.update({"flat.up": torch.zeros(9, 3)}), "'flat.up' is torch.float32"),
    "scalar": (lambda t, m: t.update({"flat.up": torch.tensor(1).char()}), "do not fit layer flat"),
}


@pytest.mark.parametrize("case", HOSTILE_INT8)
def test_hostile_int8_files_give_one_clear_line(tmp_path: Path, case: str) -> None:
    change, message = HOSTILE_INT8[case]
    path = person().save(tmp_path / "a.safetensors", torch.int8)
    with pytest.raises(UserError, match=message):
        Personalization.load(rewrite(path, change))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_give_one_clear_line(saved: Path, case: str) -> None:
    change, message = HOSTILE[case]
    with pytest.raises(UserError, match=message) as caught:
        Personalization.load(rewrite(saved, change))
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_give_one_clear_line(saved: Path) -> None:
    good = saved.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 0x10
    for bad in (b"", good[:7], good[:1000], good[:-1], bytes(flipped), b"\xff" * 64, good + b"\0"):
        saved.write_bytes(bad)
        with pytest.raises(UserError, match=r"a\.safetensors"):
            Personalization.load(saved)
    with pytest.raises(UserError, match="no such file"):
        Personalization.load(saved.with_name("absent.safetensors"))


def test_other_bases_are_refused_when_rebuilt(saved: Path) -> None:
    read = Personalization.load(rewrite(saved, lambda t, m: m.update(fingerprint="f" * 16)))
    with pytest.raises(UserError, match="safetensors needs ffff"):
        read.factors()


def test_divergence_and_overflow_are_not_saved(tmp_path: Path) -> None:
    made = person()
    with pytest.raises(UserError, match="not finite"):
        replace(made, tokens=made.tokens / 0)
    with pytest.raises(UserError, match="too large"):
        replace(made, tokens=made.tokens * 1e6).save(tmp_path / "a.safetensors", torch.float16)
    assert not list(tmp_path.iterdir())


# ---- application ----


@pytest.fixture
def pipeline() -> SimpleNamespace:
    """Return something with the two models of a Stable Diffusion pipeline, tiny."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    clip = CLIPTextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return SimpleNamespace(unet=unet.eval(), text_encoder=CLIPTextModel(clip).eval())


@torch.no_grad()
def outputs(pipeline: SimpleNamespace) -> torch.Tensor:
    context = pipeline.text_encoder(torch.arange(5)[None]).last_hidden_state
    return pipeline.unet(noise(1, 4, 8, 8), 10, context).sample


def test_apply_replaces_removes_and_scales(pipeline: SimpleNamespace) -> None:
    modules = find_targets(pipeline.unet, pipeline.text_encoder)
    adapter = person(Layout.of(modules), base=base_hash(modules))
    plain = outputs(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = adapter.apply(pipeline)
    assert isinstance(handle, Injection)
    personal = outputs(pipeline)
    assert not torch.allclose(personal, plain)
    again = adapter.apply(pipeline)
    torch.testing.assert_close(outputs(pipeline), personal)
    again.set(adapter.factors(), 0.0)
    torch.testing.assert_close(outputs(pipeline), plain)
    again.remove()
    handle.remove()
    assert torch.equal(outputs(pipeline), plain)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_apply_to_a_network_that_is_compiled_and_has_run(pipeline: SimpleNamespace, how: str) -> None:
    modules = find_targets(pipeline.unet, pipeline.text_encoder)
    adapter = person(Layout.of(modules), base=base_hash(modules))
    plain = outputs(pipeline)
    handle = adapter.apply(pipeline)
    personal = outputs(pipeline)
    handle.remove()
    torch.compiler.reset()
    part = pipeline.unet.mid_block  # the whole takes a minute to compile
    if how == "wrapped":
        pipeline.unet.mid_block = torch.compile(part, backend="eager")
    else:
        part.compile(backend="eager")
    torch.testing.assert_close(outputs(pipeline), plain)
    handle = adapter.apply(pipeline)
    torch.testing.assert_close(outputs(pipeline), personal)
    handle.set(adapter.factors(), 0.0)
    torch.testing.assert_close(outputs(pipeline), plain)
    handle = adapter.apply(pipeline)
    torch.testing.assert_close(outputs(pipeline), personal)
    handle.remove()
    torch.testing.assert_close(outputs(pipeline), plain)


def test_apply_to_plain_modules() -> None:
    modules = {layer.name: nn.Linear(layer.in_, layer.out) for layer in LAYOUT.layers}
    adapter, x = person(), noise(2, 30)
    expected = modules["flat"](x) + 0.5 * x @ delta(*adapter.factors()["flat"])[0].mT
    handle = adapter.apply(modules, strength=0.5)
    torch.testing.assert_close(modules["flat"](x), expected)
    handle.remove()


def test_another_layout_is_refused_and_leaves_the_first_adapter(pipeline: SimpleNamespace) -> None:
    adapter = person(Layout.of(find_targets(pipeline.unet, pipeline.text_encoder)))
    adapter.apply(pipeline)
    personal = outputs(pipeline)
    with pytest.raises(UserError, match="made for another model: its layer 0 is \\[tall 40 12\\]"):
        person().apply(pipeline)
    assert torch.equal(outputs(pipeline), personal)


def test_another_base_of_the_same_layout_warns_once(pipeline: SimpleNamespace) -> None:
    adapter = person(Layout.of(find_targets(pipeline.unet, pipeline.text_encoder)), base="feedbeef")
    with pytest.warns(UserWarning, match="made for base feedbeef") as caught:
        adapter.apply(pipeline)
    assert len(caught) == 1
