"""The image encoder: a timm vision transformer whose patch features the decoder attends to."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.hypernet import EncoderConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors


class Encoder(nn.Module):
    """Images `[I, 3, H, W]` uint8 -> features `[I, P, C]`: the mean over the patches, then every token."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        given = {"img_size": config.size, "patch_size": config.patch, "depth": config.depth}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            self.vit = timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, **options)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"encoder.name={config.name!r}: timm cannot build it ({error})") from error
        data = timm.data.resolve_model_data_config(self.vit)
        self.size = config.size or data["input_size"][-1]
        self.dim = self.vit.num_features
        self.tokens = 1 + self.vit.num_prefix_tokens + self.vit.patch_embed.num_patches
        self.register_buffer("mean", torch.tensor(data["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data["std"])[:, None, None], persistent=False)
        if config.weights is not None:
            self.load(Path(config.weights))
        self.frozen = config.frozen
        if self.frozen:
            self.requires_grad_(False)

    def load(self, path: Path) -> None:
        """Read the transformer's weights from a safetensors file, a hypernetwork's included."""
        tensors, _ = load_tensors(path)
        inner = {k.removeprefix("encoder.vit."): v.float() for k, v in tensors.items() if k.startswith("encoder.vit.")}
        missing = sorted(self.vit.state_dict().keys() - (inner or tensors).keys())
        if missing:
            raise UserError(f"{path} is not this encoder: it lacks {missing[0]} and {len(missing) - 1} more")
        self.vit.load_state_dict(inner or tensors, strict=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images `[I, 3, H, W]` in [0, 255] as features `[I, P, C]`."""
        x = images.to(self.mean.device).float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.vit.forward_features(x)
            mean = tokens[:, self.vit.num_prefix_tokens :].mean(1, keepdim=True)
            return torch.cat([mean, tokens], 1)  #                                  [I, P, C]
