"""Scores against closed forms."""

import numpy as np
import pytest

from hyperdb.metrics.score import auc, bootstrap, cosine, frechet, paired, rank1


def test_cosine_counts_a_missing_face_as_zero():
    a = np.array([[1.0, 0], [3, 3], [np.nan, np.nan]])
    assert np.allclose(cosine(a, [1, 0]), [1, 2**-0.5, 0])
    assert np.allclose(cosine(a, [1, 0], missing=-1), [1, 2**-0.5, -1])
    assert cosine(a[:, None], a[None]).shape == (3, 3)


def test_bootstrap_matches_the_normal_interval():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    result = bootstrap(values, seed=0)
    half = 1.96 * values.std() / 20
    assert result["mean"] == values.mean()
    assert abs(result["lo"] - (values.mean() - half)) < 0.001
    assert abs(result["hi"] - (values.mean() + half)) < 0.001
    assert bootstrap(values, seed=0) == result
    assert bootstrap(values, seed=1) != result


@pytest.mark.parametrize(("people", "share"), [(25, 0.93), (12, 0.91), (8, 0.89), (3, 0.75)])
def test_bootstrap_covers_the_truth_as_often_as_it_says(people, share):
    rng = np.random.default_rng(1)
    results = [bootstrap(rng.normal(0, 1, people), seed=i, draws=500) for i in range(600)]
    assert abs(np.mean([r["lo"] <= 0 <= r["hi"] for r in results]) - share) < 0.035


def test_missing_people_count_only_when_said():
    values = [0.5, np.nan, 0.7]
    with pytest.raises(ValueError, match="no value"):
        bootstrap(values, 0)
    assert np.isclose(bootstrap(values, 0, missing=0.0)["mean"], 0.4)
    with pytest.raises(ValueError, match="one value a person"):
        bootstrap([], 0)
    with pytest.raises(ValueError, match="one value a person"):
        bootstrap([[[1.0, 2.0]]], 0)


def test_paired_sees_what_separate_intervals_hide():
    rng = np.random.default_rng(2)
    people = rng.normal(0, 1, 50)
    a, b = people + 0.1 + rng.normal(0, 0.05, 50), people
    difference = paired(a, b, seed=0)
    assert 0 < difference["lo"] < 0.1 < difference["hi"]
    assert bootstrap(a, 0)["lo"] < bootstrap(b, 0)["hi"]
    assert np.isclose(paired([1, np.nan], [0, 0], 0, missing=0)["mean"], 0.5)
    with pytest.raises(ValueError, match="must match"):
        paired([1.0], [1.0, 2.0], 0)


def test_one_seed_is_the_bootstrap_over_people():
    people = np.random.default_rng(3).normal(size=30)
    assert bootstrap(people[:, None], seed=0) == bootstrap(people, seed=0)


def test_people_and_seeds_are_both_drawn():
    rng = np.random.default_rng(4)
    people, seeds, rest = rng.normal(0, 1, (200, 1)), rng.normal(0, 0.5, (1, 50)), rng.normal(0, 0.1, (200, 50))
    table = people + seeds + rest
    found = bootstrap(table, seed=0)
    assert found["mean"] == table.mean()
    # the variances of the two means add; the rest is averaged away
    half = 1.96 * (people.var() / 200 + seeds.var() / 50) ** 0.5
    assert abs((found["hi"] - found["lo"]) / 2 - half) < 0.1 * half
    only_people = bootstrap(table.mean(1), seed=0)
    assert only_people["hi"] - only_people["lo"] < found["hi"] - found["lo"]


def test_pairs_of_several_seeds_against_one():
    table = np.random.default_rng(5).normal(size=(20, 3))
    single = np.arange(20.0)[:, None]
    assert paired(table, single, 0) == bootstrap(table - single, 0)
    assert paired(table, table, 0) == {"mean": 0.0, "lo": 0.0, "hi": 0.0}
    with pytest.raises(ValueError, match="must match"):
        paired(table, table[:, :2], 0)
    with pytest.raises(ValueError, match="must match"):
        paired(table[:, 0], table, 0)


def test_auc():
    assert auc([0.9, 0.8], [0.1, 0.2]) == 1
    assert auc([0.1, 0.2], [0.9, 0.8]) == 0
    assert auc([0.5], [0.5]) == 0.5
    same, different = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0.0, 0.4, 0.6])
    pairs = same[:, None] - different[None]
    assert np.isclose(auc(same, different), ((pairs > 0) + 0.5 * (pairs == 0)).mean())
    rng = np.random.default_rng(0)  # two normals one deviation apart: Phi(1 / sqrt 2)
    assert abs(auc(rng.normal(1, 1, 20_000), rng.normal(0, 1, 20_000)) - 0.7602) < 0.01
    with pytest.raises(ValueError, match="NaN"):
        auc([np.nan], [0.0])
    with pytest.raises(ValueError, match="at least one"):
        auc([], [0.0])


def test_rank1():
    gallery = np.eye(3, 4)
    queries = np.stack([gallery, gallery], 1) + 0.1  # [P, 2, C]
    assert np.array_equal(rank1(queries, gallery), [1, 1, 1])
    queries[1, 0] = gallery[2]
    queries[2, :] = np.nan
    assert np.array_equal(rank1(queries, gallery), [1, 0.5, 0])
    gallery[0] = np.nan
    assert rank1(queries, gallery)[0] == 0
    with pytest.raises(ValueError, match="shapes"):
        rank1(queries[:2], gallery)


def test_frechet_of_gaussians():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(500, 6))
    base -= base.mean(0)
    assert frechet(base, base) < 1e-9
    assert np.isclose(frechet(base, base + 2), 6 * 4)
    # commuting covariances: sum of (sigma_a - sigma_b)^2
    white = np.linalg.solve(np.linalg.cholesky(np.cov(base.T)), base.T).T
    scales = np.array([0.5, 1, 1.5, 2, 3, 0.0])
    assert np.isclose(frechet(white, white * scales), ((1 - scales) ** 2).sum())
    mixed = white @ rng.normal(size=(6, 6))
    assert np.isclose(frechet(mixed, white), frechet(white, mixed))
    # against the textbook matrix root
    from scipy.linalg import sqrtm

    a, b = np.cov(mixed.T), np.cov(white.T)
    expected = np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert np.isclose(frechet(mixed, white), expected, rtol=1e-5)


def test_frechet_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="expected"):
        frechet(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        frechet(np.full((3, 2), np.nan), np.zeros((3, 2)))
