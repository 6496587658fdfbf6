"""The laws every additive adapter obeys, over adapters, dtypes and identity batches, on non-square layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperdb.adapters import LiDBConfig, LoRAConfig
from hyperdb.adapters.base import Adapter, Factors, delta, select
from hyperdb.adapters.inject import Injection, merge, unmerge
from hyperdb.adapters.layout import Layout
from hyperdb.runtime.errors import UserError

ADAPTERS = {
    "lidb": LiDBConfig(a=6, b=4),
    "lidb-rank2": LiDBConfig(a=6, b=4, rank=2, seed=3),
    "lidb-wider-than-layers": LiDBConfig(),
    "lora": LoRAConfig(rank=3),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 6e-2}


class Model(nn.Module):
    """Two non-square linear layers with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(9, 14), nn.Linear(14, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(x)))


def modules_of(model: Model) -> dict[str, nn.Module]:
    return {"wide": model.wide, "narrow": model.narrow}


@pytest.fixture(params=ADAPTERS)
def config(request: pytest.FixtureRequest) -> LiDBConfig | LoRAConfig:
    return ADAPTERS[request.param]


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def model(dtype: torch.dtype) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().to(dtype).requires_grad_(False)


@pytest.fixture
def adapter(config: LiDBConfig | LoRAConfig, model: Model, dtype: torch.dtype) -> Adapter:
    return config.build(Layout.of(modules_of(model))).to(dtype=dtype)


def trained(adapter: Adapter, identities: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters that stand for different residuals of size about 1."""
    g = torch.Generator().manual_seed(1)
    return {
        k: (v + 0.3 * torch.randn(v.shape, generator=g)).to(dtype)
        for k, v in adapter.init(identities).items()
    }


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_residual_is_zero_at_init_and_everyone_starts_alike(adapter: Adapter) -> None:
    params = adapter.init(3)
    assert all(x.dtype == torch.float32 and torch.equal(x, x[:1].expand_as(x)) for x in params.values())
    for layer, (down, up) in zip(adapter.layout.layers, adapter.factors(params).values(), strict=True):
        assert delta(down, up).shape == (3, layer.out, layer.in_)
        assert not delta(down, up).any()
        assert down.any(), "both factors zero is a saddle: no gradient would ever flow"


@pytest.mark.parametrize("identities", [1, 2, 3])
def test_hook_adds_x_delta_transposed(
    adapter: Adapter, model: Model, dtype: torch.dtype, identities: int
) -> None:
    factors = adapter.factors(trained(adapter, identities, dtype))
    x = rows(6, 7, 9, dtype=dtype)
    plain = model.wide(x)
    injection = Injection(modules_of(model))
    with injection.using(factors):
        adapted = model.wide(x)
    dense = delta(*factors["wide"]).repeat_interleave(6 // identities, dim=0)
    close(adapted, plain + x @ dense.mT)
    close(model.wide(x), plain)


@pytest.mark.parametrize("identities", [2, 3])
@pytest.mark.parametrize("repeat", [1, 2])
def test_batch_of_identities_is_a_loop_over_them(
    adapter: Adapter, model: Model, dtype: torch.dtype, identities: int, repeat: int
) -> None:
    factors = adapter.factors(trained(adapter, identities, dtype))
    injection = Injection(modules_of(model))
    x = rows(repeat, identities, 2, 7, 9, dtype=dtype)
    with injection.using(factors, 0.7, repeat):
        together = model(x.flatten(0, 2)).reshape(repeat, identities, 2, 7, 5)
    for block in range(repeat):
        for i in range(identities):
            with injection.using(select(factors, i), 0.7):
                close(together[block, i], model(x[block, i]))


@pytest.mark.parametrize("plain", [1, 2])
@pytest.mark.parametrize("identities", [1, 3])
def test_plain_blocks_are_left_alone(
    adapter: Adapter, model: Model, dtype: torch.dtype, identities: int, plain: int
) -> None:
    factors = adapter.factors(trained(adapter, identities, dtype))
    injection = Injection(modules_of(model))
    x = rows(plain + 2, identities, 2, 7, 9, dtype=dtype)
    bare = model(x[:plain].flatten(0, 2))
    with injection.using(factors, 0.7, repeat=2):
        adapted = model(x[plain:].flatten(0, 2))
    with injection.using(factors, 0.7, repeat=2, plain=plain):
        together = model(x.flatten(0, 2))
    close(together, torch.cat([bare, adapted]))
    with injection.using(factors, 0.7, repeat=2, plain=plain), pytest.raises(UserError, match="cannot be divided"):
        model(rows(identities * (plain + 2) + 1, 9, dtype=dtype))


def test_merge_equals_hook_and_unmerge_restores(adapter: Adapter, model: Model, dtype: torch.dtype) -> None:
    factors = select(adapter.factors(trained(adapter, 2, dtype)), 1)
    modules, x = modules_of(model), rows(4, 9, dtype=dtype)
    before = model(x)
    injection = Injection(modules)
    with injection.using(factors, 0.5):
        hooked = model(x)
    injection.remove()
    merge(modules, factors, 0.5)
    close(model(x), hooked)
    unmerge(modules, factors, 0.5)
    close(model(x), before)


def _gradients(adapter: Adapter, model: Model, dtype: torch.dtype, remember: bool) -> dict[str, torch.Tensor]:
    params = {k: v.requires_grad_() for k, v in trained(adapter, 2, dtype).items()}
    x = rows(4, 9, dtype=dtype).requires_grad_()
    injection = Injection(modules_of(model))
    with injection.using(adapter.factors(params)):
        y = model(x) if remember else checkpoint(model, x, use_reentrant=False)
        y.square().sum().backward()
    injection.remove()
    assert x.grad is not None
    return {"x": x.grad, **{k: v.grad for k, v in params.items()}}


def test_gradient_reaches_the_trainables_and_the_input_only(
    adapter: Adapter, model: Model, dtype: torch.dtype
) -> None:
    gradients = _gradients(adapter, model, dtype, remember=True)
    assert all(g is not None and g.flatten(1).any(dim=1).all() for g in gradients.values())
    assert all(p.grad is None for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(adapter: Adapter, model: Model, dtype: torch.dtype) -> None:
    plain, checkpointed = (_gradients(adapter, model, dtype, remember) for remember in (True, False))
    for name, gradient in plain.items():
        close(checkpointed[name], gradient)


def test_gradient_at_init_reaches_the_output_side(adapter: Adapter, model: Model, dtype: torch.dtype) -> None:
    params = {k: v.to(dtype).requires_grad_() for k, v in adapter.init(2).items()}
    injection = Injection(modules_of(model))
    with injection.using(adapter.factors(params)):
        model(rows(4, 9, dtype=dtype)).square().sum().backward()
    gradients = [v.grad for v in params.values() if v.grad is not None]
    assert any(g.any() for g in gradients)


def test_global_random_state_is_untouched(config: LiDBConfig | LoRAConfig, model: Model) -> None:
    state = torch.get_rng_state()
    adapter = config.build(Layout.of(modules_of(model)))
    adapter.factors(adapter.init(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_reload_gives_the_same(config: LiDBConfig | LoRAConfig, dtype: torch.dtype) -> None:
    def make() -> Factors:
        layout = Layout.of(modules_of(Model()))
        adapter = config.build(layout).to(dtype=dtype)
        return adapter.factors(adapter.init(1))

    for (down, up), (again_down, again_up) in zip(make().values(), make().values(), strict=True):
        assert torch.equal(down, again_down)
        assert torch.equal(up, again_up)
