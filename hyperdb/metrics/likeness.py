"""How like a person pictures are: the cosine of their embeddings with those of known views."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hyperdb.metrics.feature import Feature


def galleries(feature: Feature, views: Tensor) -> Tensor:
    """Return each person's unit mean embedding `[I, C]` over views `[I, K, 3, H, W]`; undetected views are left out."""
    return middle(feature(views.flatten(0, 1)).unflatten(0, views.shape[:2]))


def middle(embeddings: Tensor) -> Tensor:
    """Return the unit mean `[I, C]` of embeddings `[I, K, C]`, of which undetected views are NaN and left out."""
    return torch.nn.functional.normalize(embeddings.nanmean(1), dim=-1)


def face_cosine(feature: Feature, images: Tensor, gallery: Tensor) -> Tensor:
    """Return the cosine `[I, K]` of images `[I, K, 3, H, W]` with `gallery [I, C]`; 0 where no face is found."""
    embeddings = feature(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return (embeddings * gallery[:, None]).sum(-1).nan_to_num(0.0)
