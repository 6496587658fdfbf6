"""The hypernetwork: shapes, refinement, gradient paths, weight-space losses, its file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.loss import diffusion_loss
from hyperdb.hypernet import EncoderConfig, HypernetConfig, loss
from hyperdb.hypernet.encoder import Encoder
from hyperdb.hypernet.model import Hypernet
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_tensors

ENCODER = EncoderConfig(name="vit_tiny_patch16_224", size=32, patch=16, depth=1)
CONFIG = HypernetConfig(width=32, heads=2, layers=2, iterations=2, encoder=ENCODER)


@pytest.fixture(scope="module")
def base(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture
def lidb(base):
    return LiDB(Layout.of(base.targets()), a=12, b=8)


@pytest.fixture
def model(lidb):
    torch.manual_seed(0)
    return Hypernet(CONFIG, lidb)


def _images(count=3):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("head", ["shared", "per_layer"])
def test_one_token_a_layer_and_zero_padding(lidb, head):
    model = Hypernet(HypernetConfig(width=32, heads=2, head=head, encoder=ENCODER), lidb)
    tokens = model(_images())
    assert tokens.shape == (3, *lidb.mask.shape)
    assert (tokens[:, ~lidb.mask] == 0).all()


def test_refinement_changes_the_prediction_and_starts_at_zero(lidb, model):
    seen = model.features(_images())
    model.decoder.iterations = 0
    assert (model.decoder(*seen) == 0).all()
    model.decoder.iterations = 1
    once = model.decoder(*seen)
    model.decoder.iterations = 2
    assert not torch.allclose(once, model.decoder(*seen))


def test_the_image_is_encoded_once(model, monkeypatch):
    calls = []
    forward = model.encoder.net.forward_features
    monkeypatch.setattr(model.encoder.net, "forward_features", lambda x: calls.append(1) or forward(x))
    model(_images())
    assert len(calls) == 1


def test_encoder_gets_gradient_from_the_diffusion_loss_alone(base, lidb, model):
    """The trap of zero heads and zero tokens: a step must move something, and the trunk must hear of it."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    injection = Injection(base.targets())
    ids = base.tokenize(["a [V] face"]).expand(3, -1)
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(3, *base.latent_shape, generator=g) for _ in "zn")
    t = torch.tensor([100, 500, 900])
    for _ in range(2):
        optimizer.zero_grad()
        with injection.using(lidb.factors({"tokens": model(_images())})):
            diffusion_loss(base, z, noise, t, ids).mean().backward()
        gradients = [p.grad.abs().sum() for p in model.encoder.parameters() if p.grad is not None]
        optimizer.step()
    injection.remove()
    assert torch.stack(gradients).sum() > 0
    assert all(p.grad is None for p in base.unet.parameters())


def test_gauge_free_loss_equals_the_dense_residual_distance(base):
    for rank in (1, 3):
        lidb = LiDB(Layout.of(base.targets()), a=12, b=8, rank=rank)
        g = torch.Generator().manual_seed(0)
        one, two = (torch.randn(2, *lidb.mask.shape, generator=g) * lidb.mask for _ in "ab")
        ones = torch.ones(len(lidb.layout))
        found = loss.gauge_free(lidb, one, two, ones)
        f1, f2 = lidb.factors({"tokens": one}), lidb.factors({"tokens": two})
        dense = [(f1[n][1] @ f1[n][0] - f2[n][1] @ f2[n][0]).square().sum((1, 2)) for n in f1]
        assert torch.allclose(found, torch.stack(dense).mean(0), rtol=1e-4)


def test_gauge_changes_plain_but_not_gauge_free(lidb):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, *lidb.mask.shape, generator=g) * lidb.mask
    A, B = lidb.split(tokens)
    moved = lidb.join(2 * A, B / 2)
    ones = torch.ones(len(lidb.layout))
    assert loss.gauge_free(lidb, moved, tokens, ones).abs().max() < 1e-2
    assert loss.plain(lidb, moved, tokens, ones).min() > 1


@pytest.mark.parametrize("kind", ["plain", "gauge_free", "fisher"])
def test_scales_make_predicting_the_mean_cost_one(lidb, kind):
    g = torch.Generator().manual_seed(0)
    tokens = (lidb.template + 0.1 * torch.randn(6, *lidb.mask.shape, generator=g)) * lidb.mask
    scale = loss.scales(lidb, tokens, kind, torch.rand(lidb.mask.shape, generator=g))
    mean = tokens.mean(0, keepdim=True).expand_as(tokens)
    assert getattr(loss, kind)(lidb, mean, tokens, scale).mean() == pytest.approx(1, rel=1e-3)


def test_fisher_loss_by_hand(lidb):
    """Numbers count by the mean square of their gradient, padding never: 2 of one number, 1 of another."""
    tokens, moment = torch.zeros(2, *lidb.mask.shape), torch.zeros(lidb.mask.shape)
    first, last = lidb.mask[0].nonzero()[0, 0], lidb.mask[-1].nonzero()[-1, 0]
    moment[0, first], moment[-1, last] = 3.0, 5.0
    tokens[:, 0, first], tokens[:, -1, last] = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    scale = loss.scales(lidb, tokens, "fisher", moment)
    # about the mean, both people lie at 1 and 1/2: 3 * 1 + 5 / 4 = 17 / 4
    found = loss.fisher(lidb, tokens + 1e3 * ~lidb.mask, torch.zeros_like(tokens), scale)
    torch.testing.assert_close(found, torch.tensor([(3 * 4 + 5) / (17 / 4), 0.0]))


def test_numbers_that_all_fits_share_are_not_predicted(lidb):
    model, g = Hypernet(CONFIG, lidb), torch.Generator().manual_seed(0)
    fits = torch.randn(5, *lidb.mask.shape, generator=g) * lidb.mask
    shared = lidb.part("A")
    fits[:, shared] = fits[0, shared]
    model.standardise(fits)
    found = model(_images())
    assert torch.equal(found[:, shared], fits[0, shared].expand(len(found), -1))
    assert (found[:, lidb.part("B")].std(0) > 0).all()


def test_standardised_features_have_mean_zero_and_deviation_one(model):
    images = _images(40)
    model.standardise_features(images)
    features, summary = (x.detach() for x in model.features(images))
    assert features.shape == (40, model.encoder.tokens, model.encoder.dim)
    assert features.mean(0).abs().max() < 1e-3
    assert features.std(0).median() == pytest.approx(1, abs=1e-3)
    model.standardise_features(images)  # a second time finds the same, not the standardised ones'
    assert torch.allclose(model.features(images)[0], features, atol=1e-4)
    covariance = summary.mT.cov()
    found = covariance.diagonal() > 0  # forty faces have fewer components than the summary has room for
    assert 20 < found.sum() < 40
    assert torch.allclose(covariance[found][:, found], torch.eye(int(found.sum())), atol=1e-2)


def test_what_is_measured_of_features_is_kept_for_an_encoder(model, monkeypatch):
    images, measured = _images(40), []
    real = Hypernet._measure_features
    monkeypatch.setattr(Hypernet, "_measure_features", lambda self, some: measured.append(1) or real(self, some))
    for _ in range(2):
        model.standardise_features(images, "faces")
        there = model.feature_mean.clone(), model.feature_std.clone(), model.whiten.clone()
    assert len(measured) == 1
    model.standardise_features(images)
    assert all(map(torch.equal, there, (model.feature_mean, model.feature_std, model.whiten)))
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    model.standardise_features(images, "faces")
    assert len(measured) == 3


def test_the_first_feature_is_the_mean_over_the_patches(model):
    features = model.encoder(_images())
    assert torch.allclose(features[:, 0], features[:, 1 + model.encoder.net.num_prefix_tokens :].mean(1), atol=1e-5)


def test_a_convolutional_encoder_gives_its_map_and_keeps_its_statistics():
    encoder = Encoder(EncoderConfig(name="cs3darknet_focus_s", size=64)).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features = encoder(_images())
    assert features.shape == (len(_images()), encoder.tokens, encoder.dim)
    assert encoder.tokens == 1 + 2 * 2
    assert torch.allclose(features[:, 0], features[:, 1:].mean(1), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_the_linear_map_begins_at_the_centre_and_learns_from_differences(lidb):
    torch.manual_seed(0)
    model = Hypernet(replace(CONFIG, linear=True, summary=3), lidb)
    images = _images(8)
    model.standardise_features(images)
    assert torch.equal(model(images), model.centre.expand(8, -1, -1))
    g = torch.Generator().manual_seed(0)
    wanted = torch.randn(8, *model.mask.shape, generator=g)
    (model(images) * wanted).sum().backward()
    with torch.no_grad():
        summary = model.features(images)[1]
        own = torch.einsum("ik,ind->knd", summary - summary.mean(0), wanted * model.spread * model.mask)
        torch.testing.assert_close(model.decoder.linear.grad, own, atol=1e-5, rtol=1e-4)
        # a person's tokens are the same alone and among others
        model.decoder.linear.copy_(torch.randn(own.shape, generator=g))
        torch.testing.assert_close(model(images)[2:3], model(images[2:3]), atol=1e-4, rtol=1e-4)


def test_a_summary_is_cut_to_the_directions_that_move_the_tokens(lidb):
    torch.manual_seed(0)
    model = Hypernet(replace(CONFIG, linear=True, iterations=0, summary=4), lidb)
    images, g = _images(8), torch.Generator().manual_seed(0)
    model.standardise_features(images)
    rank2 = torch.einsum("kr,rnd->knd", torch.randn(4, 2, generator=g), torch.randn(2, *model.mask.shape, generator=g))
    with torch.no_grad():
        model.decoder.linear.copy_(rank2)
        whole = model(images)
        model.cut(2)
        assert model.config.summary == 2
        assert model.features(images)[1].shape == (8, 2)
        torch.testing.assert_close(model(images), whole, atol=1e-4, rtol=1e-4)
        model.cut(1)  # what is left is the best map of one direction, which is not the whole
        assert not torch.allclose(model(images), whole, atol=1e-3)
    with pytest.raises(UserError, match=r"model.summary=0: expected at least 1 of the hypernetwork's 1"):
        model.cut(0)
    with pytest.raises(UserError, match=r"model.summary=2: only that of a hypernetwork with model.linear"):
        Hypernet(CONFIG, lidb).cut(2)


def test_the_spread_of_fits_with_gradients_makes_layers_move_alike(lidb):
    model, g = Hypernet(CONFIG, lidb), torch.Generator().manual_seed(0)
    fits = torch.randn(5, *lidb.mask.shape, generator=g) * lidb.mask
    fits[:, lidb.part("A")] = fits[0, lidb.part("A")]
    moment = torch.rand(lidb.mask.shape, generator=g) ** 4 * lidb.mask
    model.standardise(fits, moment)
    B = lidb.part("B")
    assert (model.spread[lidb.part("A")] == 0).all()
    torch.testing.assert_close(model.spread[B].square().mean(), fits.std(0)[B].square().mean())
    # a gradient as long as a person's moves every layer equally far: spread^2 * gradient
    moved = (model.spread.square() * moment.sqrt() * B).norm(dim=1)
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))


def test_different_faces_get_different_tokens_before_any_training(lidb):
    """Without standardised features and the summary, what differs between faces drowns in what they share."""
    torch.manual_seed(0)
    model = Hypernet(CONFIG, lidb)
    images = _images(40)
    model.standardise_features(images)
    theta = model.decoder(*model.features(images))[:, model.mask]
    assert theta.std(0).mean() > 0.3 * theta.square().mean().sqrt()
    size = torch.linalg.svdvals((theta - theta.mean(0)).detach())
    assert size.square().sum().square() / size.pow(4).sum() > 10  # they differ in many ways, not in the few largest


def test_file_round_trip(model, tmp_path):
    model.standardise_features(_images(20))
    model.standardise(torch.randn(5, *model.mask.shape))
    path = model.save(tmp_path / "h.safetensors", {"base": "abc"})
    again = Hypernet.load(path)
    assert again.metadata["base"] == "abc"
    assert torch.allclose(again(_images()), model.eval()(_images()), atol=2e-2)


def test_what_refines_no_prediction_is_not_stored(lidb, tmp_path):
    model = Hypernet(replace(CONFIG, linear=True, iterations=0, summary=4), lidb)
    with torch.no_grad():
        model.decoder.linear.normal_()
    model.standardise_features(_images(20))
    path = model.save(tmp_path / "h.safetensors", {})
    assert [name for name in load_tensors(path)[0] if name.startswith("decoder.")] == ["decoder.linear"]
    again = Hypernet.load(path)
    assert torch.allclose(again(_images()), model.eval()(_images()), atol=2e-2)
    again.begin_refining(replace(CONFIG, width=16, iterations=2))  # begins at what it was
    assert torch.equal(again(_images()), Hypernet.load(path)(_images()))
    assert load_tensors(again.save(path, {}))[0]["decoder.head.weight"].shape[1] == 16
    assert Hypernet.load(path).config == replace(again.config, encoder=Hypernet.load(path).config.encoder)


def test_a_frozen_encoder_is_not_stored(lidb, tmp_path):
    frozen = EncoderConfig(name="vit_tiny_patch16_224", size=32, patch=16, depth=1, frozen=True)
    model = Hypernet(HypernetConfig(width=32, heads=2, encoder=frozen), lidb)
    path = model.save(tmp_path / "h.safetensors", {})
    assert not any(name.startswith("encoder.") for name in load_tensors(path)[0])
    model(_images()).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    model.unfreeze()
    model(_images()).sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters() if p.requires_grad)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1.0)
    again = Hypernet.load(model.save(tmp_path / "trained.safetensors", {}))
    assert not again.encoder.frozen
    torch.testing.assert_close(again.encoder.state_dict(), model.encoder.state_dict(), atol=1e-2, rtol=1e-2)


def test_foreign_and_damaged_files_are_refused(model, tmp_path):
    path = model.save(tmp_path / "h.safetensors", {})
    tensors, metadata = load_tensors(path)
    cases = {
        "kind": (tensors, {**metadata, "kind": "other"}),
        "layout": (tensors, {**metadata, "layout": "nonsense"}),
        "fingerprint": (tensors, {**metadata, "fingerprint": "0" * 16}),
        "shape": ({**tensors, "centre": tensors["centre"][:1]}, metadata),
        "missing": ({k: v for k, v in tensors.items() if k != "spread"}, metadata),
        "nan": ({**tensors, "centre": tensors["centre"] * float("nan")}, metadata),
    }
    for name, (bad, header) in cases.items():
        broken = save_tensors(tmp_path / f"{name}.safetensors", bad, header)
        with pytest.raises(UserError):
            Hypernet.load(broken)


def test_an_unknown_encoder_is_a_user_error(lidb):
    with pytest.raises(UserError, match="no_such_vit"):
        Hypernet(HypernetConfig(width=32, heads=2, encoder=EncoderConfig(name="no_such_vit")), lidb)
