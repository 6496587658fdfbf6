"""The space of many people's adapters: coordinates, attributes, new people."""

from __future__ import annotations

import pytest
import torch

from hyperdb.tuning.space import Space, ridge


@pytest.fixture
def numbers():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=g) @ torch.randn(5, 30, generator=g) + 3


def test_coordinates_are_those_of_the_people(numbers):
    space = Space(numbers, 20)
    assert space.axes.shape == (5, 30)  # no more than there are
    found = space.encode(numbers)
    assert torch.allclose(space.decode(found), numbers, atol=1e-3)
    assert torch.allclose(found.mean(0), torch.zeros(5), atol=1e-4)
    assert torch.allclose(found.std(0), torch.ones(5), atol=1e-4)
    assert (space.explained.diff() > 0).all()
    assert space.explained[-1] == pytest.approx(1, abs=1e-4)


def test_a_few_components_keep_the_most(numbers):
    few, more = Space(numbers, 2), Space(numbers, 4)
    left = [(numbers - s.decode(s.encode(numbers))).square().sum() for s in (few, more)]
    assert left[1] < left[0] < (numbers - few.mean).square().sum()


def test_new_people_vary_as_those_who_made_the_space(numbers):
    new = Space(numbers, 5).sample(4000, torch.Generator().manual_seed(1))
    assert torch.allclose(new.mean(0), numbers.mean(0), atol=0.2)
    assert torch.allclose(new.std(0), numbers.std(0), rtol=0.1)


def test_a_step_moves_one_attribute_and_leaves_the_others(numbers):
    space, g = Space(numbers, 5), torch.Generator().manual_seed(2)
    attributes = space.encode(numbers) @ torch.randn(5, 2, generator=g) + 0.1 * torch.randn(40, 2, generator=g)
    directions = space.directions(numbers, attributes)
    assert directions.shape == (2, 30)
    read, _ = ridge(space.encode(numbers), attributes, penalty=4.0)
    moved = [(space.encode(numbers + step) - space.encode(numbers)) @ read for step in directions]
    for k, change in enumerate(moved):
        assert torch.allclose(change, torch.eye(2)[k].expand(40, 2), atol=1e-3)


def test_ridge_finds_a_linear_function():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 4, generator=g), torch.randn(4, 2, generator=g)
    found, offset = ridge(x, x @ w + 7, 1e-4)
    assert torch.allclose(found, w, atol=1e-3)
    assert torch.allclose(offset, torch.full((2,), 7.0), atol=1e-3)
