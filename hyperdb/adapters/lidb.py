"""LiDB, the paper's Lightweight DreamBooth (eq. 1): `r * (a + b)` numbers a layer in frozen random bases.

A token is one layer's numbers: A_train `[a, r]` row by row, then B_train `[r, b]` row by row, each padded to
the largest layer. Layers narrower than a or b use min(a, n), min(b, m); `mask` is True on the numbers in use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hyperdb.adapters.base import AdapterConfig, Factors, LowRank, whole_number
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.seed import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site

ALGORITHM = "qr-uniform-1"
MAX_BASES, MAX_TOKENS = 10**9, 10**8  # numbers, against hostile files; SD1.5: 26.7 million and 28,800


@dataclass
class LiDBConfig(AdapterConfig):
    """Lightweight DreamBooth: `rank * (a + b)` numbers a layer in bases from `seed` (paper: 100, 50, 1)."""

    a: int = 100
    b: int = 50
    rank: int = 1
    seed: int = 0
    kinds = ("linear",)
    predictable = True

    def __post_init__(self) -> None:
        whole_number("a", self.a, 1, 4096)
        whole_number("b", self.b, 1, 4096)
        whole_number("rank", self.rank, 1, 256)
        whole_number("seed", self.seed, 0, 2**63 - 1)

    def build(self, layout: Layout) -> LiDB:
        """Return the adapter over `layout`."""
        return LiDB(layout, self.a, self.b, self.rank, self.seed)


def _draw(rows: int, columns: int, seed: int, *keys: str) -> Tensor:
    """Return 24-bit integers from a private stream, the same on every platform."""
    import torch

    stream = generator(seed, ALGORITHM, *keys, rows, columns)
    return torch.randint(2**24, (rows, columns), generator=stream, dtype=torch.int32)


def _centre(draws: Tensor) -> Tensor:
    return (draws.double() + 0.5) / 2**23 - 1  # uniform in (-1, 1)


def _orthonormal(draws: Tensor) -> Tensor:
    """Return the orthonormal columns of the QR decomposition whose R has a positive diagonal, in float32."""
    import torch

    q, r = torch.linalg.qr(_centre(draws))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).float()


class LiDB:
    """LiDB over `layout`; parameters are `{'tokens': [I, N, D]}`.

    Bases are built on first use, depend on algorithm, seed, layer name and shape alone, and are never saved.
    """

    places = 1

    def __init__(self, layout: Layout, a: int = 100, b: int = 50, rank: int = 1, seed: int = 0) -> None:
        import torch

        self.config = LiDBConfig(a, b, rank, seed)
        self.layout, self.rank = layout, rank
        self.sizes = [(min(a, layer.in_), min(b, layer.out)) for layer in layout.layers]
        self.max_a, self.max_b = (max(column) for column in zip(*self.sizes, strict=True))
        self.width = rank * (self.max_a + self.max_b)
        bases = sum(x.in_ * p + x.out * q for x, (p, q) in zip(layout.layers, self.sizes, strict=True))
        if bases > MAX_BASES or len(layout) * self.width > MAX_TOKENS:
            raise UserError(f"a={a}, b={b}, rank={rank} on this layout needs too much memory; lower them")
        used_a = torch.arange(self.max_a) < torch.tensor([a for a, _ in self.sizes])[:, None]  # [N, a]
        used_b = torch.arange(self.max_b) < torch.tensor([b for _, b in self.sizes])[:, None]  # [N, b]
        used = used_a[..., None].expand(-1, -1, rank), used_b[:, None].expand(-1, rank, -1)
        self.mask = self.join(*used)  #                                           [N, D]
        self.device, self.dtype = torch.device("cpu"), torch.float32

    @property
    def numbers(self) -> int:
        """Count of trainable numbers of one identity."""
        return self.rank * sum(a + b for a, b in self.sizes)

    @cached_property
    def template(self) -> Tensor:
        """Where everyone starts, `[N, D]`: columns of A of unit norm, B zero."""
        import torch

        A = torch.zeros(len(self.layout), self.max_a, self.rank)
        for i, (layer, (a, _)) in enumerate(zip(self.layout.layers, self.sizes, strict=True)):
            column = _centre(_draw(a, self.rank, self.config.seed, layer.name, "template"))
            A[i, :a] = column / column.norm(dim=0)
        return self.join(A, torch.zeros(len(self.layout), self.rank, self.max_b)).to(self.device)

    def _draws(self, i: int) -> tuple[Tensor, Tensor]:
        layer, (a, b), seed = self.layout.layers[i], self.sizes[i], self.config.seed
        return _draw(layer.in_, a, seed, layer.name, "A"), _draw(layer.out, b, seed, layer.name, "B")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the integers that the bases are made of: the same on every platform."""
        digest = hashlib.sha256(ALGORITHM.encode())
        for i in range(len(self.layout)):
            for draws in self._draws(i):
                digest.update(draws.numpy().astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _masters(self) -> list[tuple[Tensor, Tensor]]:
        """Float32 bases on the CPU, of which every other dtype is a cast."""
        return [tuple(map(_orthonormal, self._draws(i))) for i in range(len(self.layout))]  # type: ignore[misc]

    @cached_property
    def _groups(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Bases stacked by shape, a list a side: (token indices [g], bases [g, n, a] or [g, m, b])."""
        import torch

        sides = []
        for side in (0, 1):
            by_shape: dict[torch.Size, list[int]] = {}
            for i, bases in enumerate(self._masters):
                by_shape.setdefault(bases[side].shape, []).append(i)
            sides.append(
                [
                    (
                        torch.tensor(indices, device=self.device),
                        torch.stack([self._masters[i][side] for i in indices]).to(self.device, self.dtype),
                    )
                    for indices in by_shape.values()
                ]
            )
        return sides[0], sides[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LiDB:
        """Move bases, mask and template; `dtype` is that of bases and factors. Return the adapter."""
        import torch

        self.device = torch.device(device) if device is not None else self.device
        self.dtype = dtype or self.dtype
        self.mask = self.mask.to(self.device)
        for cached in ("template", "_groups"):
            self.__dict__.pop(cached, None)
        return self

    def join(self, A: Tensor, B: Tensor) -> Tensor:
        """Return tokens `[..., N, D]` of `A [..., N, a, r]` and `B [..., N, r, b]`."""
        import torch

        return torch.cat([A.flatten(-2), B.flatten(-2)], dim=-1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return `A [..., N, a, r]` and `B [..., N, r, b]` of tokens `[..., N, D]`; padding reads as zero."""
        A, B = (tokens * self.mask).split([self.rank * self.max_a, self.rank * self.max_b], dim=-1)
        return A.unflatten(-1, (self.max_a, self.rank)), B.unflatten(-1, (self.rank, self.max_b))

    def part(self, name: str) -> Tensor:
        """Return a mask `[N, D]` of the numbers of one factor, A or B, in a token."""
        import torch

        boundary = self.rank * self.max_a
        inside = torch.arange(self.width, device=self.mask.device) < boundary
        return self.mask & (inside if name == "A" else ~inside)

    def pack(self, tokens: Tensor) -> Tensor:
        """Return only the numbers in use, `[..., N, D]` -> `[..., numbers]`."""
        return tokens[..., self.mask]

    def unpack(self, numbers: Tensor) -> Tensor:
        """Undo `pack`; padding is zero."""
        tokens = numbers.new_zeros(*numbers.shape[:-1], *self.mask.shape)
        tokens[..., self.mask] = numbers
        return tokens

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tokens'."""
        return {"tokens": tuple(self.mask.shape)}

    def rate(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""
        return 1.0

    def init(self, identities: int, sites: Mapping[str, Site] | None = None) -> dict[str, Tensor]:
        """Return `{'tokens': [I, N, D]}`, float32: the template for everyone."""
        return {"tokens": self.template.repeat(identities, 1, 1)}

    # Eq. 1: x dW = x A_aux A_train B_train B_aux
    def factors(self, params: dict[str, Tensor]) -> Factors:
        """Return `down = (A_aux A_train)^T: [I, r, n]` and `up = (B_train B_aux)^T: [I, m, r]` a layer."""
        import torch

        A, B = self.split(params["tokens"].to(self.dtype))  #                  [I, N, a, r], [I, N, r, b]
        downs: dict[int, Tensor] = {}
        ups: dict[int, Tensor] = {}
        for indices, A_aux in self._groups[0]:
            a = A_aux.shape[-1]
            group = torch.einsum("gna,igar->girn", A_aux, A.index_select(1, indices)[:, :, :a])
            downs.update(zip(indices.tolist(), group.unbind(), strict=True))
        for indices, B_aux in self._groups[1]:
            b = B_aux.shape[-1]
            group = torch.einsum("gmb,igrb->gimr", B_aux, B.index_select(1, indices)[..., :b])
            ups.update(zip(indices.tolist(), group.unbind(), strict=True))
        return {name: LowRank(downs[i], ups[i]) for i, name in enumerate(self.layout.names)}

    changes = factors
