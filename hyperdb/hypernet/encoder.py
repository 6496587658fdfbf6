"""The image encoder: a timm vision transformer or convolutional network whose features the decoder attends to."""

from __future__ import annotations

import math
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.hypernet import EncoderConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors
from hyperdb.runtime.paths import resolve


class Encoder(nn.Module):
    """Images `[I, 3, H, W]` uint8 -> features `[I, P, C]`: the mean over the patches, then every token.

    Batch normalisation keeps its statistics even in training: those of a few faces would be noise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        options = {} if config.depth is None else {"depth": config.depth}
        try:
            self.net = timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, **options)
            if hasattr(self.net, "set_input_size"):  # a transformer; a convolutional network takes any
                self.net.set_input_size(config.size, config.patch)
        except (RuntimeError, TypeError, OSError) as error:  # OSError: its weights cannot be fetched
            missing = config.pretrained and isinstance(error, OSError)
            fetch = f"; fetch its weights with `hf download timm/{config.name}`, or use diffusion=embedded"
            raise UserError(
                f"encoder.name={config.name!r}: timm cannot build it ({error}){fetch if missing else ''}"
            ) from error
        self.net.to(memory_format=torch.channels_last)  # convolutions on a CPU are a fifth faster
        data = timm.data.resolve_model_data_config(self.net)
        self.size = config.size or data["input_size"][-1]
        self.dim = self.net.num_features
        self.prefix = getattr(self.net, "num_prefix_tokens", 0)
        if hasattr(self.net, "patch_embed"):
            patches = self.net.patch_embed.num_patches
        else:
            patches = math.ceil(self.size / self.net.feature_info[-1]["reduction"]) ** 2
        self.tokens = 1 + self.prefix + patches
        self.register_buffer("mean", torch.tensor(data["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data["std"])[:, None, None], persistent=False)
        if config.weights is not None:
            self.load(resolve(config.weights))
        self.frozen = config.frozen
        if self.frozen:
            self.requires_grad_(False)
        self.train()  # modules begin in training: batch normalisation must not

    def load(self, path: Path) -> None:
        """Read the network's weights from a safetensors file, a hypernetwork's included."""
        if not path.is_file():
            raise UserError(f"no encoder at {path}; run `hyperdb train_encoder`, or set model.encoder.weights=FILE")
        tensors, _ = load_tensors(path)
        inner = {k.removeprefix("encoder.net."): v.float() for k, v in tensors.items() if k.startswith("encoder.net.")}
        found, wanted = inner or tensors, self.net.state_dict()
        missing = sorted(wanted.keys() - found.keys())
        if missing:
            raise UserError(f"{path} is not this encoder: it lacks {missing[0]} and {len(missing) - 1} more")
        for name, own in wanted.items():
            if found[name].shape != own.shape:
                here, there = list(own.shape), list(found[name].shape)
                raise UserError(f"{path} is not this encoder: {name} is {there}, not {here}")
        self.net.load_state_dict(found, strict=False)

    def train(self, mode: bool = True) -> Encoder:
        """Switch to training, batch normalisation excepted."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def pixels(self, images: Tensor) -> Tensor:
        """Return images `[I, 3, H, W]` in [0, 255] as the network's input `[I, 3, size, size]`."""
        x = images.to(self.mean.device).float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Encode images `[I, 3, H, W]` in [0, 255] as features `[I, P, C]`."""
        x = self.pixels(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not self.frozen or x.requires_grad)):
            tokens = self.net.forward_features(x)
            if tokens.ndim == 4:  # a convolutional network's map [I, C, h, w]
                tokens = tokens.flatten(2).mT
            mean = tokens[:, self.prefix :].mean(1, keepdim=True)
            return torch.cat([mean, tokens], 1)  #                                  [I, P, C]
