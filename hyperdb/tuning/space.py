"""The space of people: the principal components of many people's adapters, and what can be read from them.

Everybody's LiDB numbers lie in the same frozen bases, so that they can be added, averaged and sampled like vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Space:
    """Principal components of adapters `[I, C]`: `mean [C]`, `axes [K, C]`, `std [K]` (weights2weights' space).

    `explained [K]` is the share of the variance that the components up to each one hold.
    """

    def __init__(self, numbers: Tensor, components: int) -> None:
        self.mean = numbers.mean(0)
        _, size, axes = torch.linalg.svd(numbers - self.mean, full_matrices=False)
        kept = min(components, int((size > 1e-5 * size[0]).sum()))
        self.axes, self.std = axes[:kept], size[:kept] / (len(numbers) - 1) ** 0.5
        self.explained = (size[:kept].square() / size.square().sum()).cumsum(0)

    def encode(self, numbers: Tensor) -> Tensor:
        """Return coordinates `[I, K]` at unit variance over the people that made the space."""
        return (numbers - self.mean) @ self.axes.mT / self.std

    def decode(self, coordinates: Tensor) -> Tensor:
        """Return the adapters `[I, C]` of coordinates `[I, K]`."""
        return self.mean + (coordinates * self.std) @ self.axes

    def sample(self, people: int, generator: torch.Generator) -> Tensor:
        """Return adapters `[people, C]` drawn from the Gaussian of those that made the space."""
        return self.decode(torch.randn(people, len(self.std), generator=generator))

    def directions(self, numbers: Tensor, attributes: Tensor) -> Tensor:
        """Return what one step of each attribute adds to an adapter, `[T, C]`.

        The attributes `[I, T]` of the adapters `numbers [I, C]` are read from their coordinates by ridge regression. A
        step moves one of them by 1 and leaves the others where they are.
        """
        coefficients, _ = ridge(self.encode(numbers), attributes, penalty=len(numbers) / 10)  # [K, T]
        return (torch.linalg.pinv(coefficients) * self.std) @ self.axes


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return coefficients `[F, T]` and offset `[T]` that predict `y [I, T]` from `x [I, F]`."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.mT @ centred + penalty * torch.eye(x.shape[1])
    coefficients = torch.linalg.solve(gram, centred.mT @ (y - mean_y))
    return coefficients, mean_y - mean_x @ coefficients
