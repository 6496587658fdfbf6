"""DINO as a judge: how like pictures are as a whole, by an encoder that was trained without labels."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import timm
from PIL import Image
from torch import Tensor, nn

from hyperdb.metrics.pretrained import Pretrained, fill


class Dino(Pretrained):
    """A timm model in the hub's layout: DINO ViT-S/16 (Caron et al. 2021), timm's `vit_small_patch16_224.dino`.

    The feature is the model's pooled one, of DINO the class token's. Sizes, crop and colours are those of the model's
    own data configuration. DreamBooth (Ruiz et al. 2023) took this metric because, unlike CLIP, it was not trained to
    overlook what tells two subjects of one class apart.
    """

    name = "dino"
    classes: ClassVar[dict[str, int]] = {"num_classes": 0}  # without the classifier, of a model that has one

    def load(self, folder: Path) -> nn.Module:
        """Build the architecture of `config.json` and fill it."""
        net = timm.create_model(f"local-dir:{folder}", pretrained=False, **self.classes)
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
        return fill(net, folder)

    def pixels(self, image: Tensor) -> Tensor:
        """Resize, crop and normalise one picture."""
        return self.transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))

    def features(self, pixels: Tensor) -> Tensor:
        """Return the pooled features, or what stands in place of a classifier."""
        return self.net(pixels)
