"""The hypernetwork: one face image in, LiDB tokens out (paper section 4.2). Its configurations import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from hyperdb.adapters.base import whole_number
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath


@dataclass
class EncoderConfig:
    """A timm vision transformer or convolutional network by name.

    `size` is the image's side, `patch` and `depth` are a transformer's (None keeps the model's own); `weights` is a
    safetensors file, `pretrained` asks timm for its own; a frozen encoder is not stored in the hypernetwork's file.
    """

    name: str = "cs3darknet_focus_s"
    size: int | None = 64
    patch: int | None = None
    depth: int | None = None
    weights: FilePath | None = None
    pretrained: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("size", 8, 4096), ("patch", 1, 256), ("depth", 1, 256)):
            if (value := getattr(self, name)) is not None:
                whole_number(f"encoder.{name}", value, low, high)


@dataclass
class HypernetConfig:
    """The iterative decoder (eq. 3): `iterations` is s, `head` is shared by all layers or one a layer.

    With 0 iterations the linear map alone predicts, which needs `linear`; they can be added when training goes on.

    `summary`: how many principal components of the encoder's mean feature every token is given. With `linear`, eq. 3
    begins at a linear map of the summary instead of zeros. What a person's gradient says is nearly linear in the
    summary, and a linear map averages it over all people; the trunk refines the rest.
    """

    width: int = 256
    heads: int = 4
    layers: int = 2
    iterations: int = 4
    head: str = "per_layer"
    summary: int = 64
    linear: bool = False
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        bounds = {"width": (1, 2**14), "heads": (1, 256), "layers": (0, 128), "iterations": (0, 128)}
        for name, (low, high) in (bounds | {"summary": (0, 2**14)}).items():
            whole_number(f"model.{name}", getattr(self, name), low, high)
        if self.head not in ("shared", "per_layer"):
            raise UserError(f"model.head={self.head!r}: expected shared or per_layer")
        if self.iterations < (not self.linear) or self.width % self.heads:
            raise UserError(
                "model.iterations must be at least 1, or 0 with model.linear, and model.width a multiple of model.heads"
            )
        if self.linear and self.summary < 1:
            raise UserError("model.linear needs model.summary of at least 1")
