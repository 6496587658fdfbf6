"""How unseen people are measured while a hypernetwork is trained."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.layout import Layout
from hyperdb.data.fits import FitStore
from hyperdb.data.people import load_people
from hyperdb.hypernet.loss import WeightSpace
from hyperdb.tuning import validation as validation_module
from hyperdb.tuning.validation import Validation, verdict


class Predicts(nn.Module):
    """Predicts the same tokens whatever it sees."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens


@pytest.fixture(scope="module")
def lidb(base):
    return LiDBConfig(a=12, b=8).tokens(Layout.of(base.targets()))


@pytest.fixture(scope="module")
def tokens(lidb):
    g = torch.Generator().manual_seed(0)
    return lidb.template + 0.3 * lidb.mask * torch.randn(4, *lidb.mask.shape, generator=g)


@pytest.fixture
def make(base, lidb, rendered):
    def new(**settings) -> Validation:
        how = {"logit_normal": None, "signal_weight": None, "face_weight": 0.0, "style": "a sketch of a [V] face"}
        how["changed"] = ["a [V] face, on the beach"]
        return Validation(base=base, lidb=lidb, people=load_people(rendered), **how, **settings)

    return new


def test_an_adapter_that_is_everybody_s_is_no_better_than_another_s(make, tokens, tmp_path):
    model = Predicts(tokens[:1].expand(4, -1, -1))
    scores, pairs = make().measure(model, tmp_path / "sheet.png")
    assert scores["diffusion_own"] == scores["diffusion_shuffled"] == scores["diffusion_mean"] > 0
    assert pairs["diffusion_own-shuffled"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "weights" not in scores
    assert model.training
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 5 * 32
    said = verdict({"people": 4, "step": 10, **pairs})
    assert said.startswith("on 4 unseen people after 10 steps")


def test_unseen_people_are_the_same_and_their_own_adapters_differ(make, tokens, tmp_path):
    validation = make()
    scores, pairs = validation.measure(Predicts(tokens), tmp_path / "a.png")
    again, _ = validation.measure(Predicts(tokens), tmp_path / "b.png")
    assert scores == again
    turned, _ = validation.measure(Predicts(tokens.roll(1, 0)), tmp_path / "c.png")
    assert scores["diffusion_mean"] == turned["diffusion_mean"]
    assert scores["diffusion_own"] != scores["diffusion_shuffled"]
    assert pairs["diffusion_own-shuffled"]["mean"] == pytest.approx(
        scores["diffusion_own"] - scores["diffusion_shuffled"], abs=2e-5
    )


def test_the_losses_are_the_same_however_many_people_share_a_pass(make, lidb, tokens, monkeypatch):
    ways = {"own": lidb.factors({"tokens": tokens}), "mean": lidb.factors({"tokens": tokens.mean(0, keepdim=True)})}
    together = make()._losses(ways)
    monkeypatch.setattr(validation_module, "together", lambda size: 3 * validation_module.LEVELS)  # three, then one
    for name, apart in make()._losses(ways).items():
        assert apart.shape == (4,)
        torch.testing.assert_close(apart, together[name], rtol=1e-4, atol=1e-6)


def test_those_who_have_a_fit_are_compared_with_it(make, lidb, tokens, rendered, tmp_path):
    people = load_people(rendered)
    seeds = torch.stack([people.seed[rows[0]] for rows in people.rows])
    fits = FitStore(tokens[[2, 0]], seeds[[2, 0]], "person", lidb, {})
    validation = make(fits=fits, weight_space=WeightSpace(lidb, tokens, "plain"))
    assert validation.fit_rows.tolist() == [1, -1, 0, -1]
    scores, _ = validation.measure(Predicts(tokens), tmp_path / "a.png")
    assert scores["weights"] == pytest.approx(0, abs=1e-5)
    others, _ = validation.measure(Predicts(tokens.roll(1, 0)), tmp_path / "b.png")
    assert others["weights"] > 0.5


@pytest.mark.parametrize(("hi", "said"), [(-0.001, "it carries the person"), (0.001, "it is not better")])
def test_the_verdict_is_by_the_interval_of_the_loss(hi, said):
    pair = {"mean": -0.01, "lo": -0.02, "hi": hi}
    names = (f"{kind}_own-{other}" for kind in ("diffusion", "face_cosine") for other in ("shuffled", "mean"))
    text = verdict({"people": 3, "step": 5, **dict.fromkeys(names, pair)})
    assert text.count(said) == 2
