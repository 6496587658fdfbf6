"""Copies score near 1, a person's other photos near 0, and a set of equal pictures has no diversity."""

from __future__ import annotations

import pytest
import torch

from hyperdb.metrics import copying


@pytest.fixture
def features():
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 4, generator=g)
    return reference[:, None], reference[:, None] + torch.randn(5, 6, 4, generator=g)


def test_similarity_is_zero_for_other_photos_and_one_for_a_copy(features):
    reference, others = features
    assert copying.similarity(others, reference, others).mean().item() == pytest.approx(0, abs=1e-5)
    copies = reference.repeat(1, 3, 1)
    assert torch.allclose(copying.similarity(copies, reference, others), torch.ones(5))


def test_of_several_photos_the_nearest_one_counts(features):
    _, photos = features
    given, others = photos[:, :2], photos[:, 2:]
    assert torch.allclose(copying.similarity(given.flip(1), given, others), torch.ones(5))  # of another one
    assert copying.similarity(others, given, others).mean().item() == pytest.approx(0, abs=1e-5)
    unseen = given.clone()
    unseen[:, 1] = float("nan")  # no face in the second one: the first is left
    one = copying.similarity(others[:, :1], given[:, :1], others)
    assert torch.allclose(copying.similarity(others[:, :1], unseen, others), one)


def test_missing_faces_are_left_out(features):
    reference, others = features
    holes = others.clone()
    holes[0] = float("nan")
    holes[1, 0] = float("nan")
    found = copying.similarity(holes, reference, others)
    assert found[0] == 0
    assert found.isfinite().all()


def test_background_ignores_the_middle():
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    changed = images.clone()
    changed[:, :, 24:, 24:40] = 0
    assert torch.equal(copying.background(images), copying.background(changed))
    changed[:, :, :, :4] = 0
    assert not torch.equal(copying.background(images), copying.background(changed))


def test_pose_follows_the_head(in_tmp):
    from hyperdb.heads import Identity, View, render

    views = [View(yaw=yaw) for yaw in (-0.35, 0.0, 0.35)]
    images = torch.stack([torch.from_numpy(render(Identity(1_100_003), v, 128)).permute(2, 0, 1) for v in views])
    left, middle, right = copying.pose(images)[:, 0].tolist()
    assert left < middle < right or left > middle > right
    assert copying.pose(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).isnan().all()


def test_diversity():
    g = torch.Generator().manual_seed(0)
    same = torch.randint(0, 255, (2, 1, 3, 32, 32), dtype=torch.uint8, generator=g).repeat(1, 4, 1, 1, 1)
    assert copying.diversity(same).max().item() == pytest.approx(0, abs=1e-3)
    different = torch.randint(0, 255, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=g)
    assert copying.diversity(different).min().item() > 0.01
