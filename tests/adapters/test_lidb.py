"""LiDB: eq. 1 written out, bases, padding, gauge, and the paper's arithmetic on SD1.5."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hyperdb.adapters import LiDBConfig, LoRAConfig
from hyperdb.adapters.base import delta
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.diffusion.targets import base_hash, find_targets
from hyperdb.runtime.errors import UserError

LAYOUT = Layout((Layer("tall", (40, 12)), Layer("flat", (9, 30)), Layer("tiny", (2, 3)), Layer("tall2", (40, 12))))


def random_tokens(lidb: LiDB, identities: int = 2) -> torch.Tensor:
    return torch.randn(identities, *lidb.mask.shape, generator=torch.Generator().manual_seed(0)) * lidb.mask


def bases(lidb: LiDB, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's frozen `(A_aux [n, a], B_aux [b, m])`: the factors of unit vectors."""
    layer = lidb.layout.names.index(name)
    a, b = lidb.sizes[layer]
    A = torch.zeros(max(a, b), len(lidb.layout), lidb.max_a, lidb.rank)
    B = torch.zeros(max(a, b), len(lidb.layout), lidb.rank, lidb.max_b)
    A[range(a), layer, range(a), 0] = 1
    B[range(b), layer, 0, range(b)] = 1
    down, up = lidb.factors({"tokens": lidb.join(A, B).to(lidb.device)})[name]
    return down[:a, 0].mT, up[:b, :, 0]


# ---- the paper's arithmetic ----


@cache
def sd15() -> tuple[nn.Module, nn.Module]:
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), CLIPTextModel(clip)


@pytest.mark.parametrize(
    ("without", "modules", "lidb", "lora"),
    [
        ((), 192, 28_800, 385_344),
        ((".proj",), 176, 26_400, 273_024),
        ((".proj", "_proj"), 128, 19_200, 199_296),
    ],
    ids=["paper", "no GEGLU", "UNet attention"],
)
def test_paper_arithmetic(without: tuple[str, ...], modules: int, lidb: int, lora: int) -> None:
    targets = {k: v for k, v in find_targets(*sd15()).items() if not k.endswith(without or ("?",))}
    layout = Layout.of(targets)
    adapter = LiDBConfig().build(layout)
    assert len(layout) == modules
    assert adapter.numbers == int(adapter.mask.sum()) == lidb
    assert adapter.pack(adapter.init(1)["tokens"]).shape == (1, lidb)
    assert LoRAConfig(rank=1).build(layout).numbers == lora
    assert len(layout.to_text()) < 15_000


@pytest.mark.parametrize("rank", [1, 3])
def test_parts_are_the_factors(rank: int) -> None:
    lidb = LiDBConfig(a=5, b=4, rank=rank).build(Layout((Layer("x", (3, 9)), Layer("y", (8, 2)))))
    tokens = torch.randn(2, *lidb.mask.shape)
    A, B = lidb.split(tokens)
    nothing = torch.zeros_like(A), torch.zeros_like(B)
    assert torch.equal(tokens * lidb.part("A"), lidb.join(A, nothing[1]))
    assert torch.equal(tokens * lidb.part("B"), lidb.join(nothing[0], B))


def test_target_names() -> None:
    names = list(find_targets(*sd15()))
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert names[:4] == [f"{block}.attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert f"{block}.ff.net.0.proj" in names
    assert names[-4] == "text_encoder.encoder.layers.11.self_attn.q_proj"

    wrapped = nn.Module()
    wrapped.text_model = sd15()[1]
    assert list(find_targets(sd15()[0], wrapped)) == names


def test_targets_refuse_models_without_attention() -> None:
    with pytest.raises(UserError, match="no attention layers"):
        find_targets(nn.Linear(1, 1), nn.Linear(1, 1))


def test_base_hash_tells_descendants_apart_but_not_precisions() -> None:
    modules = {"a": nn.Linear(300, 40), "b": nn.Linear(40, 300)}
    original = base_hash(modules)
    for dtype in (torch.float16, torch.bfloat16):
        assert base_hash({k: copy.deepcopy(v).to(dtype) for k, v in modules.items()}) == original
    with torch.no_grad():
        modules["a"].weight += 0.05 * modules["a"].weight.std() * torch.randn(40, 300)
    assert base_hash(modules) != original
    assert base_hash({"a": nn.Linear(3, 4, device="meta")}) == ""


# ---- eq. 1 ----


@pytest.mark.parametrize("rank", [1, 3])
def test_equation_1_in_the_papers_letters(rank: int) -> None:
    lidb = LiDB(LAYOUT, a=10, b=5, rank=rank)
    tokens = random_tokens(lidb)
    A, B = lidb.split(tokens)
    assert A.shape == (2, 4, 10, rank)
    assert B.shape == (2, 4, rank, 5)
    for i, layer in enumerate(LAYOUT.layers):
        a, b = min(10, layer.in_), min(5, layer.out)
        A_aux, B_aux = bases(lidb, layer.name)
        assert (A_aux.shape, B_aux.shape) == ((layer.in_, a), (b, layer.out))
        x = torch.randn(7, layer.in_)
        down, up = lidb.factors({"tokens": tokens})[layer.name]
        assert down.shape == (2, rank, layer.in_)
        assert up.shape == (2, layer.out, rank)
        for who in range(2):
            paper = x @ A_aux @ A[who, i, :a] @ B[who, i, :, :b] @ B_aux
            torch.testing.assert_close(x @ delta(down, up)[who].mT, paper)


def test_a_is_the_input_side() -> None:
    """A swap of a and b counts the same on square layers: only non-square ones tell."""
    lidb = LiDB(LAYOUT, a=10, b=5)
    assert lidb.numbers == (10 + 5) + (10 + 5) + (3 + 2) + (10 + 5)
    assert lidb.mask[2].nonzero().flatten().tolist() == [0, 1, 2, 10, 11]
    assert LiDB(LAYOUT, a=5, b=10).numbers != lidb.numbers


# ---- tokens ----


@pytest.mark.parametrize("rank", [1, 2])
def test_params_and_tokens_are_inverse(rank: int) -> None:
    lidb = LiDB(LAYOUT, a=10, b=5, rank=rank)
    tokens = random_tokens(lidb, 3)
    assert torch.equal(lidb.join(*lidb.split(tokens)), tokens)
    assert torch.equal(lidb.unpack(lidb.pack(tokens)), tokens)
    assert lidb.pack(tokens).shape == (3, lidb.numbers)


def test_padding_has_no_effect_and_no_gradient() -> None:
    lidb = LiDB(LAYOUT, a=10, b=5, rank=2)
    tokens = random_tokens(lidb)
    dirty = (tokens + 7.0 * ~lidb.mask).requires_grad_()
    clean = lidb.factors({"tokens": tokens})
    loss = torch.zeros(())
    for name, (down, up) in lidb.factors({"tokens": dirty}).items():
        torch.testing.assert_close((down, up), clean[name])
        loss = loss + delta(down, up).square().sum()
    loss.backward()
    assert dirty.grad is not None
    assert not dirty.grad[:, ~lidb.mask].any()
    assert dirty.grad[:, lidb.mask].all()
    assert not lidb.init(1)["tokens"][:, ~lidb.mask].any()


def test_template_has_unit_columns_and_no_output_side() -> None:
    A, B = LiDB(LAYOUT, a=10, b=5, rank=2).split(LiDB(LAYOUT, a=10, b=5, rank=2).template)
    torch.testing.assert_close(A.norm(dim=-2), torch.ones(4, 2))
    assert not B.any()


def test_gauge_and_norm() -> None:
    """(cA, B/c) is the same residual, and with orthonormal bases |dW| = |A| |B| at rank 1."""
    lidb = LiDB(LAYOUT, a=10, b=5)
    A, B = lidb.split(random_tokens(lidb))
    here, there = (lidb.factors({"tokens": t}) for t in (lidb.join(A, B), lidb.join(-3 * A, B / -3)))
    for i, name in enumerate(LAYOUT.names):
        torch.testing.assert_close(delta(*here[name]), delta(*there[name]))
        size = A[:, i].flatten(1).norm(dim=1) * B[:, i].flatten(1).norm(dim=1)
        torch.testing.assert_close(delta(*here[name]).flatten(1).norm(dim=1), size)


# ---- bases ----


def test_bases_are_orthonormal_and_differ_by_layer_and_seed() -> None:
    lidb = LiDB(LAYOUT, a=10, b=5)
    for name in LAYOUT.names:
        A_aux, B_aux = bases(lidb, name)
        torch.testing.assert_close(A_aux.mT @ A_aux, torch.eye(A_aux.shape[1]))
        torch.testing.assert_close(B_aux @ B_aux.mT, torch.eye(B_aux.shape[0]))
    assert not torch.equal(bases(lidb, "tall")[0], bases(lidb, "tall2")[0])
    other = LiDB(LAYOUT, a=10, b=5, seed=1)
    assert not torch.equal(bases(lidb, "tall")[0], bases(other, "tall")[0])
    assert lidb.fingerprint != other.fingerprint


def test_basis_depends_on_its_layer_alone() -> None:
    alone = bases(LiDB(Layout(LAYOUT.layers[1:2]), a=10, b=5), "flat")
    among = bases(LiDB(Layout(LAYOUT.layers[::-1]), a=10, b=5), "flat")
    assert all(torch.equal(x, y) for x, y in zip(alone, among, strict=True))


def test_bases_of_every_dtype_are_casts_of_the_same_float32() -> None:
    lidb = LiDB(LAYOUT, a=10, b=5)
    original = bases(lidb, "flat")[0]
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        assert lidb.to(dtype=dtype) is lidb
        assert torch.equal(bases(lidb, "flat")[0], original.to(dtype))
        down, up = lidb.factors(lidb.init(1))["flat"]
        assert (down.dtype, up.dtype) == (dtype, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bases_are_the_same_on_every_device() -> None:
    lidb = LiDB(LAYOUT, a=10, b=5)
    original, state = bases(lidb, "flat")[0], torch.cuda.get_rng_state()
    assert torch.equal(bases(lidb.to("cuda"), "flat")[0].cpu(), original)
    assert lidb.factors(lidb.init(1))["flat"][0].is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_fingerprint_is_frozen() -> None:
    """A change here makes every adapter in the world unreadable: give ALGORITHM a new id instead."""
    lidb = LiDB(LAYOUT, a=10, b=5)
    assert lidb.fingerprint == "2b0cd43758297fc2"
    tiny = [[-0.874127, 0.477284, -0.090018], [0.446335, 0.862457, 0.238649], [-0.19154, -0.168431, 0.966925]]
    torch.testing.assert_close(bases(lidb, "tiny")[0], torch.tensor(tiny), atol=1e-6, rtol=0)


def test_oversized_bases_are_refused() -> None:
    with pytest.raises(UserError, match="lower them"):
        LiDB(Layout((Layer("huge", (999_999, 999_999)),)), a=4096, b=4096)
    with pytest.raises(UserError, match="lower them"):
        LiDB(
            Layout((Layer("big", (4096, 4096)), *(Layer(f"l{i}", (1, 1)) for i in range(9000)))), 4096, 4096, 256
        )


# ---- configuration ----


@pytest.mark.parametrize("wrong", [{"a": 0}, {"b": -1}, {"rank": 0}, {"seed": -1}, {"rank": True}])
def test_config_ranges(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        LiDBConfig(**wrong)


def test_configs_import_no_torch() -> None:
    code = "import sys, hyperdb.adapters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
