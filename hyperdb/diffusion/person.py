"""A rare token that stands for whoever is in the picture, while the embedded base trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperdb.diffusion.base import Base


class PersonWord(nn.Module):
    """What the rare token stands for while a base trains: its embedding plus W (appearance - mean) / std.

    `rows [B, K]` are the appearances of the next prompts' people, a row of NaN for a prompt about nobody.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, base: Base, appearances: Tensor) -> None:
        super().__init__()
        embedding = base.text_encoder.get_input_embeddings()
        self.token = base.tokenizer.convert_tokens_to_ids(base.tokenizer.tokenize(base.config.rare_token))[0]
        mean, std = appearances.mean(0), appearances.std(0).clamp_min(1e-3)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        g = torch.Generator().manual_seed(0)
        size = embedding.weight.detach().std() / len(mean) ** 0.5
        self.weight = nn.Parameter(torch.randn(embedding.weight.shape[1], len(mean), generator=g) * size)
        self.rows: Tensor | None = None
        embedding.register_forward_hook(self._add)

    def forward(self, appearances: Tensor) -> Tensor:
        """Return what is added to the rare token's embedding, `[B, D]`, of appearances `[B, K]`."""
        return ((appearances - self.mean) / self.std).clamp(-3, 3) @ self.weight.mT

    def _add(self, _: nn.Module, given: tuple[Tensor], embedded: Tensor) -> Tensor:
        if self.rows is None:
            return embedded
        spoken = (given[0] == self.token) & self.rows[:, :1].isfinite()
        return embedded + spoken[..., None] * self(self.rows.nan_to_num())[:, None]
