"""What judges learn: losses are those of their papers, measures right where that is known; verifier and CLIP learn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hyperdb.data.people import People
from hyperdb.heads import PLACES, STYLES, prompt, vocabulary
from hyperdb.metrics.objectives import (
    ClipConfig,
    PromptsConfig,
    VerifierConfig,
    VICRegConfig,
    clip,
    unseen,
    verifier,
    vicreg,
)
from hyperdb.stages.train_base import build_tokenizer

G = torch.Generator().manual_seed(0)
BASE = SimpleNamespace(tokenizer=build_tokenizer(vocabulary(), 24))


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=G), dim=-1)


# --- losses


def test_pictures_of_one_caption_are_no_wrong_answers_for_each_other():
    seen, said, scale = unit(4, 8), unit(3, 8)[[0, 0, 1, 2]], torch.tensor(5.0)
    found = clip.contrast(seen, said, torch.tensor([7, 7, 3, 1]), scale)
    scores = (5 * seen @ said.T).exp()
    others = [[0, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    caption = torch.stack([-(scores[i, i] / scores[i, who].sum()).log() for i, who in enumerate(others)]).mean()
    picture = torch.stack([-(scores[i, i] / scores[who, i].sum()).log() for i, who in enumerate(others)]).mean()
    assert found["caption"].item() == pytest.approx(caption.item(), rel=1e-5)
    assert found["picture"].item() == pytest.approx(picture.item(), rel=1e-5)
    alone = clip.contrast(seen, said[[0] * 4], torch.zeros(4), scale)
    assert sum(alone.values()) == 0  # nothing to be told apart


def test_the_verifiers_loss_is_that_of_supervised_contrast():
    z, who = unit(5, 6), torch.tensor([0, 1, 0, 1, 1])
    terms = []
    for i in range(5):
        rest = [a for a in range(5) if a != i]
        below = sum((z[i] @ z[a] / 0.2).exp() for a in rest)
        mine = [p for p in rest if who[p] == who[i]]
        terms.append(-sum(((z[i] @ z[p] / 0.2).exp() / below).log() for p in mine) / len(mine))
    assert verifier.contrast(z, who, 0.2).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_whitened_features_vary_alike_in_all_directions():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=g) @ torch.diag(torch.tensor([30.0, 9, 9, 8, 8, 8])) + 5
    matrix, offset = vicreg.whitening(features)
    spread = torch.linalg.eigvalsh((features @ matrix.mT + offset).mT.cov())
    assert (features @ matrix.mT + offset).mean(0).abs().max() < 1e-4
    assert 0.7 < spread.min() <= spread.max() < 1.01
    flat = vicreg.whitening(torch.cat([features, torch.ones(500, 1)], 1))  # a number that never changes
    assert all(x.isfinite().all() for x in flat)


def test_vicregs_terms_are_nothing_where_all_is_well():
    """Views that agree, of numbers of variance one that know nothing of each other; then what spoils each term."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * (7 / 8) ** 0.5
    well = vicreg.vicreg(corners, corners)
    assert {name: round(x.item(), 6) for name, x in well.items()} == {"invariance": 0, "variance": 0, "covariance": 0}
    assert vicreg.vicreg(corners, corners + 0.2)["invariance"].item() == pytest.approx(25 * 0.04, rel=1e-5)
    constant = torch.ones(8, 3)
    assert vicreg.vicreg(constant, constant)["variance"].item() == pytest.approx(25 * (1 - 0.01), rel=1e-5)
    twice = corners[:, [0, 0, 1]]  # a covariance of 1 in two of nine places, of both views
    assert vicreg.vicreg(twice, twice)["covariance"].item() == pytest.approx(2 * 2 / 3, rel=1e-5)


def test_a_view_shows_a_part_of_the_picture_and_is_drawn_by_its_seed():
    x = torch.linspace(-0.2, 0.2, 64).expand(6, 3, 64, 64).clone()  # rises from left to right
    one, again, other = (vicreg.view(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    slope = one.mean(1).diff(dim=-1).mean((1, 2))
    assert (slope > 0).any()
    assert (slope < 0).any()  # mirrored
    assert (slope.abs() < 0.4 / 63 * 1.4).all()  # a part, spread out
    assert one.shape == x.shape


# --- measures


def few(people=6, views=4):
    """Return people whose photos are of their own colour, and their sketches have little of it, behind bars."""
    who, style = torch.arange(people).repeat_interleave(views), torch.arange(views).repeat(people) % 2
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).repeat(2, 1)[who]
    colours = colours[:, :, None, None].expand(-1, -1, 32, 32).float()
    bars = (torch.arange(32) % 8 < 4).float()
    images = torch.where(style[:, None, None, None] == 0, 0.2 + 0.6 * colours, 0.1 * colours + 0.8 * bars)
    images = (235 * images + 20 * torch.rand(images.shape, generator=G)).byte()
    styles = ["photo", "sketch"]
    captions = [prompt(styles[s], "sks" if i % 5 == 0 else "") for i, s in enumerate(style.tolist())]
    labels = {"style": style, "place": torch.zeros_like(style)}
    return People(images, who + 100, captions, labels, {"style": styles, "place": ["plain"]})


def test_people_are_told_apart_by_photos_and_never_by_the_same_one():
    people = few()
    rows = torch.arange(len(people))
    known = F.one_hot(people.identity).float()
    assert unseen.told_apart(known, people, rows) == {
        "auc": {"photo": 1.0, "sketch": 1.0}, "rank1": {"photo": 1.0, "sketch": 1.0},
    }  # fmt: skip
    each = torch.eye(len(people))  # every picture is like itself alone: a photo is never the nearest to itself
    apart = unseen.told_apart(each, people, rows)
    assert apart["auc"] == {"photo": 0.5, "sketch": 0.5}
    assert apart["rank1"]["photo"] < 0.5
    single = torch.cat([rows[people.is_style("photo")][::2], rows[~people.is_style("photo")]])
    # one photo of each: none to compare with
    assert set(unseen.told_apart(known[single], people, single)["auc"]) == {"sketch"}


def test_a_probe_finds_what_is_linear_and_nothing_else():
    labels, half = torch.arange(90) % 3, torch.arange(90) < 45
    features = torch.randn(90, 8, generator=G)
    assert unseen.probe(features + 6 * F.one_hot(labels, 8), labels, half) == 1
    assert unseen.probe(features, labels, half) < 0.6


# --- learning, on people for whom it must work


def learn(config, people, steps, rate=2e-3):
    torch.manual_seed(0)
    objective = config.objective(people, torch.arange(len(people)), BASE)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=rate)
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        rows = objective.draw(16, g)
        optimizer.zero_grad()
        sum(objective.loss(objective(people.images[rows].float(), rows, g), rows).values()).backward()
        optimizer.step()
    return objective


def test_the_verifier_learns_to_see_past_the_style(tmp_path):
    people = few()
    rows = torch.arange(len(people))
    before, after = (
        objective.measure(objective.save(tmp_path / str(steps), {}), people.images, rows)
        for steps in (0, 15) for objective in [learn(VerifierConfig(width=32), people, steps)]
    )  # fmt: skip
    assert before["rank1"]["sketch"] < 0.5  # the bars count for more than the colour
    assert min(after["auc"].values()) > 0.95  # the same person above another
    assert after["rank1"]["sketch"] > 0.9


def test_the_judge_of_prompts_is_measured_by_word():
    people = few()
    objective = PromptsConfig().objective(people, torch.arange(len(people)), None)
    right = people.labels["style"].clone()
    right[[1, 3]] = 0  # two of the twelve sketches are called photos

    class Said:
        words = objective.judge.words

        def __call__(self, images):
            return {"style": right, "place": people.labels["place"]}

    found = objective.measure(Said(), people.images, torch.arange(len(people)))
    assert found["accuracy"] == pytest.approx({"style": 22 / 24, "place": 1})
    assert found["style"] == pytest.approx({"photo": 1, "sketch": 10 / 12})
    assert found["place"] == {"plain": 1}


def test_clip_learns_the_captions_without_the_rare_word(tmp_path):
    people = few()
    small = ClipConfig(width=32, layers=1, patch=16, text_width=32, text_layers=1)
    objective = learn(small, people, 40, 5e-3)
    assert objective.captions == ["a pencil sketch of a face", "a photo of a face"]
    found = objective.measure(objective.save(tmp_path, {}), people.images, torch.arange(len(people)))
    assert found["recall1"] == {"caption": 1.0, "picture": 1.0}
    assert found["accuracy"] == {"style": 1.0, "place": 1.0}  # of one place


def test_a_clip_and_an_encoder_are_small():
    people = few(2)
    people.names |= {"style": list(STYLES), "place": list(PLACES)}
    for config in (ClipConfig(), VICRegConfig(), VerifierConfig()):
        net = config.objective(people, torch.arange(len(people)), BASE).net
        assert 2 * sum(p.numel() for p in net.parameters()) < 2.5e6
        assert not [name for name, _ in net.named_buffers() if name.split(".")[-1].startswith("running")]


def test_the_verifier_draws_people_whole_and_mixed():
    people = few(12)
    objective = VerifierConfig(pictures=3).objective(people, torch.arange(24), BASE)  # six of them are seen
    rows = objective.draw(9, torch.Generator().manual_seed(0))
    who = people.identity[rows]
    assert sorted(who.unique(return_counts=True)[1].tolist()) == [3, 3, 3]
    assert len(rows.unique()) == 9
    assert int(who.max()) < 6
    assert who[:3].unique().numel() > 1  # the half that goes through the autoencoder is not of some people alone
