"""Is a likeness a copy? Background and pose taken over from the given photos, and how varied a person's pictures are.

Distances become similarities `1 - d / d0`, d0 the mean distance of people's other photos from the given ones: 1 is a
copy, 0 as unlike as another photo. Of several photos given the nearest one counts, on both sides. Drawing the average
of all photos scores some .3 without copying, so compare with a row that cannot copy (another person's adapter).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperdb.faces.detect import detect

_BORDER = 2  # of the 16 x 16 cells, on the left, on the right and on top: there the background shows


def _cells(images: Tensor) -> Tensor:
    """Shrink `[N, 3, H, W]` uint8 to `[N, 3, 16, 16]` in [0, 1]."""
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 255, 16) for part in images.split(64)])


def background(images: Tensor) -> Tensor:
    """Return the colours at the border of pictures `[N, 3, H, W]` uint8, `[N, C]` in [0, 1]."""
    cells = _cells(images)
    sides = [cells[..., :_BORDER], cells[..., -_BORDER:], cells[..., :_BORDER, :]]
    return torch.cat([s.flatten(1) for s in sides], 1)


def pose(images: Tensor) -> Tensor:
    """Return where the nose is between the eyes and between eyes and mouth, `[N, 2]`; NaN without a face.

    In units of the distance between the eyes: 0 is frontal, about 0.5 at a yaw of 45 degrees.
    """
    found = torch.full((len(images), 2), float("nan"))
    for row, image in zip(found, images.permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
        faces = detect(image)
        if faces:
            eye, other, nose, mouth, corner = torch.as_tensor(faces[0].points, dtype=torch.float32)
            middle, span = (eye + other) / 2, (eye - other).norm()
            row.copy_((nose - (middle + (mouth + corner) / 2) / 2) / span)
    return found


def _nearest(features: Tensor, given: Tensor) -> Tensor:
    """Return the distance of features `[I, K, C]` from the nearest photo of those given `[I, V, C]`; NaN without."""
    found = (features[:, :, None] - given[:, None]).norm(dim=-1).nan_to_num(torch.inf).amin(-1)
    return torch.where(found.isfinite(), found, torch.nan)


def similarity(pictures: Tensor, given: Tensor, others: Tensor) -> Tensor:
    """Compare features of pictures `[J, K, C]` with those of the nearest photo given `[I, V, C]`, `[J]`.

    `others [I, L, C]` set the scale. The pictures are of all people or of the first J. Missing ones (NaN) are left
    out; a person with none counts 0.
    """
    d = _nearest(pictures, given[: len(pictures)]).nanmean(1)
    return (1 - d / _nearest(others, given).nanmean()).nan_to_num(0.0)


def diversity(images: Tensor) -> Tensor:
    """Return the mean root mean square between a person's pictures `[I, K, 3, H, W]`, K >= 2, `[I]`, in 0 .. 1."""
    cells = _cells(images.flatten(0, 1)).flatten(1).unflatten(0, images.shape[:2])
    k = cells.shape[1]
    distances = torch.cdist(cells, cells) / cells.shape[-1] ** 0.5
    return distances.sum((1, 2)) / (k * (k - 1))
