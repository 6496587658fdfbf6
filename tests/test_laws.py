"""The laws that every adapter obeys, over adapters, dtypes and identity batches, on sites of every kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperdb.adapters import (
    KINDS,
    A1111Config,
    AdapterConfig,
    CustomConfig,
    DoRAConfig,
    E4TConfig,
    FouRAConfig,
    FullConfig,
    LiDBConfig,
    LoRAConfig,
    LoRAXConfig,
    PlusConfig,
    SVDiffConfig,
    TokenConfig,
)
from hyperdb.adapters.base import Adapter, NotMergeableError, both, select
from hyperdb.adapters.inject import Injection, Merging
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.runtime.errors import UserError

CONFIGS: dict[str, AdapterConfig] = {
    "lidb": LiDBConfig(a=6, b=4),
    "lidb-rank2": LiDBConfig(a=6, b=4, rank=2, seed=3),
    "lidb-wider-than-layers": LiDBConfig(),
    "lora": LoRAConfig(rank=3),
    "full": FullConfig(),
    "lorax": LoRAXConfig(rank=3),
    "lorax-wider-than-layers": LoRAXConfig(rank=320),
    "a1111": A1111Config(bias=False),  # of those that can be merged
    "svdiff": SVDiffConfig(),
    "dora": DoRAConfig(rank=2),
    "foura": FouRAConfig(rank=3),
    "custom": CustomConfig(row=3, start=3),
    "e4t": E4TConfig(row=3, start=3),
    "token": TokenConfig(row=3, start=3),  # begun at another word it would be that word
}
UNMERGED: dict[str, AdapterConfig] = {  # of which no weight stands for what they do
    "a1111-relu": A1111Config(activation="relu"),
    "foura-adaptive": FouRAConfig(rank=3, adaptive=True),
    "words": TokenConfig(row=3, start=3, vectors=2),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-1}


class Model(nn.Module):
    """Non-square layers of every kind: ids `[B, 8]` -> `[B, 8, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.norm, self.wide, self.plain = nn.LayerNorm(6), nn.Linear(6, 14), nn.Linear(14, 10, bias=False)
        self.conv, self.group = nn.Conv2d(10, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.narrow = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.plain(torch.tanh(self.wide(self.norm(self.words(ids)))))  #        [B, 8, 10]
        x = self.group(self.conv(x.mT.unflatten(2, (2, 4))))  #                       [B, 4, 2, 4]
        return self.narrow(torch.tanh(x).flatten(2).mT)


@dataclass
class Case:
    """An adapter over the sites of a model that it can change."""

    config: AdapterConfig
    model: Model
    dtype: torch.dtype
    sites: dict[str, Site] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = [(name, m) for name, m in self.model.named_children()]
        every += [(f"{n}.bias", m) for n, m in every if getattr(m, "bias", None) is not None]
        sites = {name: Site(name, m) for name, m in every}
        self.sites = {name: site for name, site in sites.items() if site.kind in self.config.kinds}

    @property
    def adapter(self) -> Adapter:
        return self.config.build(Layout.listing(self.sites)).to(dtype=self.dtype)

    def trained(self, identities: int) -> dict[str, torch.Tensor]:
        """Return parameters that stand for different changes of size about 1."""
        g = torch.Generator().manual_seed(1)
        start = self.adapter.init(identities, self.sites)
        return {k: (v + 0.3 * torch.randn(v.shape, generator=g)).to(self.dtype) for k, v in start.items()}

    def changes(self, identities: int) -> Mapping[str, Any]:
        return self.adapter.changes(self.trained(identities))


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=CONFIGS)
def mergeable(request: pytest.FixtureRequest, dtype: torch.dtype) -> Case:
    return make(CONFIGS[request.param], dtype)


@pytest.fixture(params=[*CONFIGS, *UNMERGED])
def case(request: pytest.FixtureRequest, dtype: torch.dtype) -> Case:
    return make((CONFIGS | UNMERGED)[request.param], dtype)


def make(config: AdapterConfig, dtype: torch.dtype) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().to(dtype).requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.startswith(("norm", "group")):  # as after a training, neither ones nor zeros
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return Case(config, model, dtype)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, (*shape, 8), generator=torch.Generator().manual_seed(2))


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_every_kind_has_its_laws() -> None:
    known = {type(config) for config in CONFIGS.values()}
    assert known == set(KINDS.values()) - {PlusConfig}  # which needs a text encoder: tests/adapters/test_plus.py


def test_nothing_changes_at_init_and_everyone_starts_alike(mergeable: Case) -> None:
    params = mergeable.adapter.init(3, mergeable.sites)
    assert params
    assert all(x.dtype == torch.float32 and torch.equal(x, x[:1].expand_as(x)) for x in params.values())
    changes = mergeable.adapter.changes(params)
    assert list(changes) == list(mergeable.sites)
    for name, site in mergeable.sites.items():
        change = changes[name].dense(site.weight())
        assert change.shape == (3, *site.shape)
        assert change.abs().max() < 1e-6
    with Injection(mergeable.sites).using(changes):
        changed = mergeable.model(ids(6))
    close(changed, mergeable.model(ids(6)))


@pytest.mark.parametrize("identities", [1, 2, 3])
def test_hooking_adds_what_the_dense_change_makes_of_the_input(mergeable: Case, identities: int) -> None:
    changes = mergeable.changes(identities)
    for name, site in mergeable.sites.items():
        with Injection({name: site}).using({name: changes[name]}):
            hooked = mergeable.model(ids(identities))
        frozen = site.parameter.clone()
        for i, dense in enumerate(changes[name].dense(site.weight())):
            site.parameter.copy_(frozen + dense)
            close(hooked[i], mergeable.model(ids(identities))[i])
            site.parameter.copy_(frozen)
        assert not torch.allclose(hooked, mergeable.model(ids(identities)), atol=1e-4), name


@pytest.mark.parametrize("identities", [2, 3])
@pytest.mark.parametrize("repeat", [1, 2])
def test_batch_of_identities_is_a_loop_over_them(case: Case, identities: int, repeat: int) -> None:
    changes = case.changes(identities)
    injection = Injection(case.sites)
    x = ids(repeat, identities, 2)
    with injection.using(changes, 0.7, repeat):
        together = case.model(x.flatten(0, 2)).unflatten(0, (repeat, identities, 2))
    for block in range(repeat):
        for i in range(identities):
            with injection.using(select(changes, i), 0.7):
                close(together[block, i], case.model(x[block, i]))


@pytest.mark.parametrize("plain", [1, 2])
@pytest.mark.parametrize("identities", [1, 3])
def test_plain_blocks_are_left_alone(case: Case, identities: int, plain: int) -> None:
    changes = case.changes(identities)
    injection = Injection(case.sites)
    x = ids(plain + 2, identities, 2)
    bare = case.model(x[:plain].flatten(0, 2))
    with injection.using(changes, 0.7, repeat=2):
        adapted = case.model(x[plain:].flatten(0, 2))
    with injection.using(changes, 0.7, repeat=2, plain=plain):
        together = case.model(x.flatten(0, 2))
    close(together, torch.cat([bare, adapted]))
    with injection.using(changes, 0.7, repeat=2, plain=plain), pytest.raises(UserError, match="cannot be divided"):
        case.model(ids(identities * (plain + 2) + 1))


def test_merging_is_hooking(mergeable: Case) -> None:
    changes = select(mergeable.changes(2), 1)
    injection = Injection(mergeable.sites)
    with injection.using(changes, 0.5):
        hooked = mergeable.model(ids(4))
    injection.remove()
    with torch.no_grad():
        for name, change in changes.items():
            mergeable.sites[name].parameter.add_(0.5 * change.dense(mergeable.sites[name].weight())[0])
    close(mergeable.model(ids(4)), hooked)


def test_both_is_the_sum(mergeable: Case) -> None:
    first, second = (select(mergeable.changes(2), i) for i in (0, 1))
    for name, site in mergeable.sites.items():
        total = both(first, second)[name].dense(site.weight())
        close(total, first[name].dense(site.weight()) + second[name].dense(site.weight()))
        with Injection({name: site}).using({name: both(first, second)[name]}):
            together = mergeable.model(ids(2))
        frozen = site.parameter.clone()
        site.parameter.add_(total[0])
        close(together, mergeable.model(ids(2)))
        site.parameter.copy_(frozen)


@pytest.mark.parametrize("remember", [True, False])
def test_training_merged_is_training_hooked(case: Case, remember: bool) -> None:
    before = dict(case.model.named_parameters())
    tolerance = max(TOLERANCE[case.dtype], 1e-4)  # some adapters compute in float32, whatever the model does
    hooked = _gradients(case, remember=True, identities=1)
    for name, gradient in _gradients(case, remember, identities=1, merged=True).items():
        torch.testing.assert_close(gradient, hooked[name], rtol=tolerance, atol=tolerance)
    after = dict(case.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_several_identities_are_never_merged(case: Case) -> None:
    with pytest.raises(UserError, match="2 identities"), Merging(Injection(case.sites)).using(case.changes(2)):
        pass


def _gradients(
    case: Case, remember: bool, identities: int = 2, merged: bool = False
) -> dict[str, torch.Tensor | None]:
    params = {k: v.requires_grad_() for k, v in case.trained(identities).items()}
    injection, x = Injection(case.sites), ids(4)
    x[:, 0] = 3  # the word that a token adapter changes
    changes = case.adapter.changes(params)
    with Merging(injection).using(changes) if merged else injection.using(changes):
        y = case.model(x) if remember else checkpoint(case.model, x, use_reentrant=False)
        y.square().sum().backward()
    injection.remove()
    return {k: v.grad for k, v in params.items()}


def test_gradient_reaches_the_trainables_only(case: Case) -> None:
    for name, gradient in _gradients(case, remember=True).items():
        assert gradient is not None, name
        assert gradient.flatten(1).any(dim=1).all(), name
    assert all(p.grad is None for p in case.model.parameters())


def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    plain, checkpointed = (_gradients(case, remember) for remember in (True, False))
    for name, gradient in plain.items():
        close(checkpointed[name], gradient)


def test_something_can_be_learned_from_the_start(case: Case) -> None:
    params = {k: v.to(case.dtype).requires_grad_() for k, v in case.adapter.init(2, case.sites).items()}
    x = ids(4)
    x[:, 0] = 3
    with Injection(case.sites).using(case.adapter.changes(params)):
        case.model(x).square().sum().backward()
    assert any(v.grad is not None and v.grad.any() for v in params.values())


def test_global_random_state_is_untouched(case: Case) -> None:
    state = torch.get_rng_state()
    case.adapter.changes(case.adapter.init(2, case.sites))
    assert torch.equal(torch.get_rng_state(), state)


def test_reload_gives_the_same(mergeable: Case) -> None:
    """Of an adapter that is built once more only what was learned is added: the rest is drawn as it was."""
    first, second = mergeable, make(mergeable.config, mergeable.dtype)
    assert first.adapter is not second.adapter
    there, again = first.changes(1), second.changes(1)
    for name, site in first.sites.items():
        one = there[name].dense(site.weight())
        assert one.any()
        assert torch.equal(one, again[name].dense(second.sites[name].weight()))


def test_a_learning_rate_for_every_parameter(case: Case) -> None:
    assert all(0 < case.adapter.rate(name) <= 1 for name in case.adapter.init(1, case.sites))


@pytest.mark.parametrize("name", UNMERGED)
def test_what_no_weight_does_is_never_merged(name: str) -> None:
    case = make(UNMERGED[name], torch.float32)
    refused = 0
    for place, change in case.changes(1).items():
        try:
            change.dense(case.sites[place].weight())
        except NotMergeableError:
            refused += 1
    assert refused == len(case.sites)
