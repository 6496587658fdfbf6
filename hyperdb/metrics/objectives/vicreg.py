"""Train an image encoder without labels, by VICReg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.metrics.dino import Dino
from hyperdb.metrics.obedience import BACKBONE, SIDE
from hyperdb.metrics.objectives import VICRegConfig
from hyperdb.metrics.objectives.encoder import EncoderObjective
from hyperdb.metrics.objectives.objective import pixels
from hyperdb.metrics.objectives.unseen import probed, told_apart
from hyperdb.metrics.pretrained import BATCH

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base

AREA = (0.3, 1.0)  # of a picture that a view shows
JITTER = 0.1  # of saturation and contrast; half of it of brightness: the colours of skin and hair are the person
WHITENED_ON = 4096  # pictures, at most


def view(x: Tensor, g: torch.Generator) -> Tensor:
    """Return another view of each picture `[B, 3, SIDE, SIDE]` in [-1, 1]: a part, perhaps mirrored, other colours."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(len(x), *shape, generator=g)).to(x)

    side = uniform(*AREA).sqrt()
    mirrored = (uniform(0, 1) < 0.5).to(x) * -2 + 1
    middle = uniform(-1, 1, 2) * (1 - side[:, None])
    line = (2 * torch.arange(SIDE).to(x) + 1) / SIDE - 1  # where pixels are, the picture from -1 to 1
    across = middle[:, :1] + (mirrored * side)[:, None] * line  #                       [B, SIDE]
    down = middle[:, 1:] + side[:, None] * line
    grid = torch.stack(torch.broadcast_tensors(across[:, None], down[:, :, None]), -1)
    x = F.grid_sample(x, grid, align_corners=False)
    saturation = uniform(1 - JITTER, 1 + JITTER, 1, 1, 1)
    grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
    x = mean + (grey + saturation * (x - grey) - mean) * uniform(1 - JITTER, 1 + JITTER, 1, 1, 1)
    return (x + uniform(-JITTER / 2, JITTER / 2, 1, 1, 1)).clamp(-1, 1)


# 25 s + 25 v + c (Bardes et al. 2022, equation 6), the mean square and the two variances averaged as in their code
def vicreg(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return how far two views of the same pictures are apart, `[B, D]` each, how little they vary, how redundantly."""
    variance, covariance = a.new_zeros(()), a.new_zeros(())
    for z in (a, b):
        z = z - z.mean(0)
        square = z.mT @ z / (len(z) - 1)  #                                            [D, D]
        spread = square.diagonal()
        variance = variance + F.relu(1 - (spread + 1e-4).sqrt()).mean() / 2
        covariance = covariance + (square.square().sum() - spread.square().sum()) / z.shape[1]
    return {"invariance": 25 * F.mse_loss(a, b), "variance": 25 * variance, "covariance": covariance}


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map `[C, C]` and the offset `[C]` after which features `[N, C]` vary alike in all directions.

    Directions in which they vary by less than a tenth of the mean keep some of their smallness.
    """
    features = features.double()
    mean = features.mean(0)
    spread, axes = torch.linalg.eigh((features - mean).mT @ (features - mean) / len(features))
    matrix = axes * (spread + 0.1 * spread.mean()).clamp_min(1e-12).rsqrt() @ axes.mT
    return matrix.float(), -(matrix @ mean).float()


class VICRegObjective(EncoderObjective):
    """Two views of one picture are alike, and what is said of pictures varies from one to another, every number apart.

    No label is read in training: neither who it is nor the style, the place or the caption.
    """

    name = "vicreg"

    def __init__(self, config: VICRegConfig, people: People, seen: Tensor, base: Base) -> None:
        super().__init__(config, people, seen)
        sizes = [self.net.num_features, config.expander, config.expander]
        layers: list[nn.Module] = []
        for size in sizes[:-1]:  # a step's own statistics: none are kept, so that a checkpoint of parameters is all
            layers += [nn.Linear(size, config.expander), nn.BatchNorm1d(config.expander, track_running_stats=False)]
            layers += [nn.ReLU()]
        self.expander = nn.Sequential(*layers, nn.Linear(config.expander, config.expander, bias=False))

    def forward(self, images: Tensor, rows: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return what the expander makes of two views of every picture, `[B, D]` each."""
        x = pixels(images)
        a, b = view(x, g), view(x, g)
        return self.expander(self.net(a)), self.expander(self.net(b))

    def loss(self, found: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return the three terms."""
        return vicreg(*(z.float() for z in found))

    @torch.no_grad()
    def judging(self) -> Any:
        """Return the network with a linear layer that whitens its features, as those of the pictures it learned from.

        As they are, style and place are nearly all of the variance, and the cosine of two pictures with it.
        """
        rows = self.seen[:: -(-len(self.seen) // WHITENED_ON)]
        self.net.eval()
        device = next(self.net.parameters()).device
        parts = (pixels(self.people.images[some]).to(device) for some in rows.split(BATCH))
        matrix, offset = whitening(torch.cat([self.net(x).cpu() for x in parts]))
        model = timm.create_model(BACKBONE, num_classes=len(offset), **self.sizes)
        model.load_state_dict(self.net.state_dict(), strict=False)
        head = model.get_classifier()
        head.weight.copy_(matrix)
        head.bias.copy_(offset)
        return model

    def measure(self, judge: Dino, images: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
        """Return how well people are told apart, and how well a linear probe tells style and place."""
        features = judge(images)
        return told_apart(features, self.people, rows) | {"probe": probed(features, self.people, rows)}
