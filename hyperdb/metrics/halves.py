"""Whether the two halves of a picture show the people who were asked for there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hyperdb.metrics.feature import Feature

SIDES = ("left", "right")


def halves(images: Tensor) -> Tensor:
    """Return the left and the right halves of pictures, `[K, 3, H, W]` -> `[2, K, 3, H, W // 2]`."""
    half = images.shape[-1] // 2
    return torch.stack([images[..., :half], images[..., -half:]])


def shown(feature: Feature, images: Tensor, gallery: Tensor) -> dict[str, dict[str, float]]:
    """Return what the halves of pictures `[K, 3, H, W]` uint8 show, `{left: {...}, right: {...}}`.

    `gallery [N, C]` are the features of N people, the first of them meant on the left and the second on the right. Of
    each half: `rank1`, the share of pictures in which its person is the nearest of the N; `swapped`, in which the other
    half's person is; `detected`, in which there is a face at all; and the mean `cosine` with its person, 0 without a
    face. A person of the gallery without features (NaN) is never the nearest.
    """
    found = feature(halves(images).flatten(0, 1)).unflatten(0, (2, -1))  #                     [2, K, C]
    cosine = found @ gallery.mT  #                                                             [2, K, N]
    nearest = cosine.nan_to_num(-2.0).argmax(-1)
    detected = found.isfinite().all(-1)
    return {
        name: {
            "rank1": _share((nearest[side] == side) & detected[side]),
            "swapped": _share((nearest[side] == 1 - side) & detected[side]),
            "detected": _share(detected[side]),
            "cosine": round(cosine[side, :, side].nan_to_num(0.0).mean().item(), 4),
        }
        for side, name in enumerate(SIDES)
    }


def mean(every: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean of each figure of several results of `shown`."""
    return {
        side: {figure: round(sum(one[side][figure] for one in every) / len(every), 4) for figure in every[0][side]}
        for side in SIDES
    }


def _share(hits: Tensor) -> float:
    return round(hits.float().mean().item(), 4)
