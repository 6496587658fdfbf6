"""The iterative transformer decoder over one weight token a layer (paper section 4.2, eq. 3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Head(nn.Module):
    """Linear map of each layer's token `[I, N, width] -> [I, N, D]`, shared by all layers or one a layer.

    Small normal weights, not zeros: a zero head would send no gradient to the trunk.
    """

    def __init__(self, tokens: int, width: int, out: int, shared: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1 if shared else tokens, width, out) * 0.1 / width**0.5)
        self.bias = nn.Parameter(torch.zeros(tokens, out))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[I, N, width]` to `[I, N, D]`."""
        return torch.einsum("inw,nwd->ind", x, self.weight.expand(x.shape[1], -1, -1)) + self.bias


class IterativeDecoder(nn.Module):
    """Features `[I, P, C]` -> standardised tokens `[I, N, D]`, refined `iterations` times.

    The first are zero, or with `linear` a linear map of the summary, which itself begins at zero.
    Every token attends to all features and is given `summary [I, K]`, the face in few numbers: attention that is still
    uniform would average the face away. Summary and layer start of one size, or one would drown the other.
    """

    def __init__(
        self, tokens: int, token_width: int, feature_dim: int, summary_dim: int, width: int, heads: int, layers: int,
        iterations: int, shared_head: bool, linear: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.iterations, self.shape = iterations, (tokens, token_width)
        self.memory = nn.Sequential(nn.Linear(feature_dim, width), nn.LayerNorm(width))
        self.summary = nn.Linear(summary_dim, width)
        self.embed = nn.Linear(token_width, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.5)
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.trunk = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.head = Head(tokens, width, token_width, shared_head)
        self.linear = nn.Parameter(torch.zeros(summary_dim, tokens, token_width)) if linear else None
        if linear:  # that sends the gradient; what the trunk adds to it begins at nothing
            nn.init.zeros_(self.head.weight)

    def _begin(self, summary: Tensor) -> Tensor:
        """Return theta_0 of eq. 3, `[I, N, D]`.

        The map learns from how people differ from the mean of their batch. What they have in common is left to the
        biases: a gradient in common, multiplied by a mean that is zero only over many batches, would be noise.
        """
        if self.linear is None:
            return summary.new_zeros(len(summary), *self.shape)
        mean = summary.mean(0, keepdim=True)
        if self.training and dist.is_available() and dist.is_initialized():  # the batch is that of all processes
            mean = mean.detach() / dist.get_world_size()
            dist.all_reduce(mean)
        own = torch.einsum("ik,knd->ind", summary - mean, self.linear)
        return own + torch.einsum("ik,knd->ind", mean, self.linear.detach())

    # eq. 3: theta_k = T(f, theta_{k-1}), k = 1..s, each step adding a delta
    def forward(self, features: Tensor, summary: Tensor) -> Tensor:
        """Return tokens `[I, N, D]`, looking at features `[I, P, C]` and their summary `[I, K]`."""
        f = self.memory(features)  #                                                [I, P, width]
        face = self.summary(summary)[:, None]  #                                    [I, 1, width]
        theta = self._begin(summary)  #                                             [I, N, D]
        for _ in range(self.iterations):
            x = self.embed(theta) + self.position + face  #                         [I, N, width]
            theta = theta + self.head(self.trunk(x, f))
        return theta
