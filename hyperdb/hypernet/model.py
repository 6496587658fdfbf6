"""The whole hypernetwork: image -> encoder (once) -> iterative decoder -> LiDB tokens. It never writes into modules."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from hyperdb.adapters import KINDS
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import LiDB
from hyperdb.hypernet import EncoderConfig, HypernetConfig
from hyperdb.hypernet.decoder import IterativeDecoder
from hyperdb.hypernet.encoder import Encoder
from hyperdb.runtime.cache import kept
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_tensors, load_tensors, reading, save_tensors
from hyperdb.runtime.lazy import PART, Lazy, mean_std

KIND = "hyperdb-hypernet-1"


def header(path: Path, metadata: Mapping[str, str]) -> tuple[HypernetConfig, LiDB]:
    """Return what a hypernetwork's file says of itself. Raises `UserError` for a foreign or damaged one."""
    if metadata.get("kind") != KIND:
        raise UserError(f"{path} is not a hyperdb hypernetwork; train one with `hyperdb train_hypernet`")
    with reading(path):
        settings = json.loads(metadata["config"])
        encoder = EncoderConfig(**settings.pop("encoder"))
        kind = KINDS[metadata.get("adapter", "lidb")]
        lidb = kind(**json.loads(metadata["lidb"])).tokens(Layout.from_text(metadata["layout"]))
        if not encoder.frozen:  # its weights are in the file
            encoder.weights, encoder.pretrained = None, False
        return HypernetConfig(**settings, encoder=encoder), lidb


class Hypernet(nn.Module):
    """Images `[I, 3, H, W]` uint8 -> tokens `[I, N, D]`: `centre + spread * decoder(encoder(image))`.

    `centre` and `spread` `[N, D]` are the mean and standard deviation of the fits it learns from; without fits the
    LiDB template (A nonzero, B zero) and `default_spread`. The encoder's features are standardised by those of many
    faces: most of a feature is what all faces have in common, and the decoder would hardly see the rest. Of their mean,
    the largest principal components are taken at unit variance: hair and skin fill more of a picture than the shape of
    a nose, and would be all that is learned. This holds as long as the encoder stays as it was then.
    """

    metadata: dict[str, str]
    centre: Tensor
    spread: Tensor
    mask: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    whiten: Tensor

    def __init__(self, config: HypernetConfig, lidb: LiDB, default_spread: float = 0.1) -> None:
        super().__init__()
        self.config, self.lidb = config, lidb
        self.encoder = Encoder(config.encoder)
        tokens, width = lidb.mask.shape
        self.decoder = self._new_decoder()
        self.register_buffer("mask", lidb.mask.clone(), persistent=False)
        self.register_buffer("centre", lidb.template.clone())
        self.register_buffer("spread", torch.full((tokens, width), default_spread))
        self.register_buffer("feature_mean", torch.zeros(self.encoder.tokens, self.encoder.dim))
        self.register_buffer("feature_std", torch.ones(self.encoder.tokens, self.encoder.dim))
        self.register_buffer("whiten", torch.eye(self.encoder.dim, config.summary))

    def _new_decoder(self) -> IterativeDecoder:
        config, (tokens, width) = self.config, self.lidb.mask.shape
        return IterativeDecoder(
            tokens, width, self.encoder.dim, config.summary, config.width, config.heads, config.layers,
            config.iterations, config.head == "shared", config.linear,
        )  # fmt: skip

    def require(self, lidb: LiDB, what: str) -> None:
        """Raise `UserError` naming `what` unless this predicts the numbers of `lidb`: the same layers and settings."""
        lidb.layout.require(self.lidb.layout, f"the hypernetwork {what}")
        if self.lidb.config != lidb.config:
            raise UserError(f"{what} was made with lidb {asdict(self.lidb.config)}; set the same")

    def refine(self, iterations: int) -> None:
        """Refine the prediction so many times from now on."""
        self.config = replace(self.config, iterations=iterations)
        self.decoder.iterations = iterations

    def unfreeze(self) -> None:
        """Let the encoder be trained; from now on its weights are in the file."""
        encoder = replace(self.config.encoder, frozen=False, weights=None, pretrained=False)
        self.config, self.encoder.frozen = replace(self.config, encoder=encoder), False
        self.encoder.requires_grad_(True)

    def begin_refining(self, config: HypernetConfig) -> None:
        """Put a new decoder of the width, heads, layers, iterations and head of `config` on the linear map.

        It begins by adding nothing to the map's predictions.
        """
        linear = self.decoder.linear
        names = ("width", "heads", "layers", "iterations", "head")
        self.config = replace(self.config, **{name: getattr(config, name) for name in names})
        self.decoder = self._new_decoder().to(self.centre.device)
        self.decoder.linear = linear

    @torch.no_grad()
    def cut(self, size: int) -> None:
        """Keep of the summary the `size` directions in which the linear map moves the tokens most.

        What the gradients of a batch have in common is of few directions, and their noise is of all: cut down, the map
        loses most of its noise and little of what distinguishes people. Raises `UserError` if there is no such map, or
        nothing of it would be left.
        """
        decoder = self.decoder
        if decoder.linear is None:
            raise UserError(f"model.summary={size}: only that of a hypernetwork with model.linear can be cut")
        if size < 1:
            raise UserError(f"model.summary={size}: expected at least 1 of the hypernetwork's {self.config.summary}")
        moving = decoder.linear * self.spread * self.mask
        axes = torch.linalg.svd(moving.flatten(1), full_matrices=False).U[:, :size]  # [K, size]
        decoder.linear = nn.Parameter(torch.einsum("ks,knd->snd", axes, decoder.linear))
        entry = nn.Linear(size, decoder.summary.out_features, device=axes.device)
        entry.weight.copy_(decoder.summary.weight @ axes)
        entry.bias.copy_(decoder.summary.bias)
        decoder.summary, self.whiten = entry, self.whiten @ axes
        self.config = replace(self.config, summary=size)

    def standardise(self, tokens: Tensor | Lazy, moment: Tensor | None = None) -> None:
        """Take centre and spread from fits `[I, N, D]`; the spread never falls under a tenth of its layer's.

        A number that all fits share, such as those of an A that is everybody's, has a spread of 0: it is not predicted.
        With `moment [N, D]`, the mean square of people's gradients, the numbers of a layer have one spread, the inverse
        root of the gradient's length there. Then a step along the gradient moves every layer about equally far, as a
        step of the fits does (`hyperdb.tuning.start`).
        """
        mean, std = mean_std(tokens)
        first = tokens[0]
        shared = torch.stack([(part == first).all(0) for part in tokens.split(PART)]).all(0)
        if moment is None:
            floor = 0.1 * std.square().mean(1, keepdim=True).sqrt() + 1e-4
            spread = torch.maximum(std, floor)
        else:
            moving = self.mask.cpu() & ~shared.cpu()
            length = (moment * moving).sum(1, keepdim=True).sqrt().clamp_min(1e-12)  # [N, 1]
            spread = length.pow(-0.5).expand_as(std)
            spread = spread * (std[moving].square().mean() / spread[moving].square().mean()).sqrt()
        self.centre.copy_(mean.where(~shared, first))
        self.spread.copy_(spread.masked_fill(shared, 0.0))

    def standardise_features(self, images: Tensor | Lazy, key: str | None = None) -> None:
        """Take the features' mean and standard deviation `[P, C]` and the principal components `[C, K]` of the first,
        the mean over the patches, from many faces `[I, 3, H, W]` uint8.

        With a `key`, which says what images they are, these are kept for the encoder: every start of a training wants
        them.
        """
        wanted = (self.feature_mean, self.feature_std, self.whiten)
        if key is None:
            self._measure_features(images)
            return

        def measured(_: int) -> Iterator[Tensor]:
            self._measure_features(images)
            yield torch.cat([x.cpu().flatten() for x in wanted])[None]

        encoder = f"{json.dumps(asdict(self.config.encoder))} {hash_tensors(self.encoder.state_dict().values())}"
        packed = kept(None, "features", f"{key} {encoder} {self.config.summary} running", 1, measured)[0]
        for buffer, value in zip(wanted, packed.split([x.numel() for x in wanted]), strict=True):
            buffer.copy_(value.view_as(buffer))

    @torch.no_grad()
    def _measure_features(self, images: Tensor | Lazy) -> None:
        count, total, square = len(images), torch.zeros(()), torch.zeros(())
        summaries = []  # of all features only these, for those of many patches are gigabytes
        for part in images.split(64):
            features = self.encoder(part).cpu().double()  #                             [64, P, C]
            total, square = total + features.sum(0), square + features.square().sum(0)
            summaries.append(features[:, 0])
        self.feature_mean.copy_(total / count)
        if count > 1:
            std = ((square - total.square() / count).clamp_min(0) / (count - 1)).sqrt()
            self.feature_std.copy_(std.clamp_min(0.1 * std.mean() + 1e-6))
            centred = torch.cat(summaries) - total[0] / count
            _, size, axes = torch.linalg.svd(centred, full_matrices=False)
            some = min(self.whiten.shape[1], int((size > 1e-3 * size[0]).sum()))
            self.whiten.zero_()
            self.whiten[:, :some] = (axes[:some].mT * (count - 1) ** 0.5 / size[:some]).float()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images `[I, 3, H, W]` uint8 as standardised features `[I, P, C]` and their summary `[I, K]`."""
        centred = self.encoder(images).float() - self.feature_mean
        return centred / self.feature_std, centred[:, 0] @ self.whiten

    def forward(self, images: Tensor) -> Tensor:
        """Predict tokens `[I, N, D]` of images `[I, 3, H, W]` uint8."""
        theta = self.decoder(*self.features(images))
        return (self.centre + self.spread * theta.float()) * self.mask

    def used(self) -> dict[str, Tensor]:
        """Return the weights that a prediction depends on: with 0 iterations, none of those that would refine it."""
        refines = self.config.iterations > 0
        return {
            name: value for name, value in self.state_dict().items()
            if refines or not name.startswith("decoder.") or name == "decoder.linear"
        }  # fmt: skip

    def save(self, path: Path, metadata: dict[str, str]) -> Path:
        """Write the weights used in fp16 with layout, LiDB settings and `metadata`; a frozen encoder is left out."""
        frozen = self.encoder.frozen
        state = {k: v.half() for k, v in self.used().items() if not (frozen and k.startswith("encoder."))}
        header = {
            "kind": KIND,
            "layout": self.lidb.layout.to_text(),
            "lidb": json.dumps(asdict(self.lidb.config)),
            "fingerprint": self.lidb.fingerprint,
            "config": json.dumps(asdict(self.config)),
        }
        return save_tensors(path, state, {**header, **metadata})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a hypernetwork. Raises `UserError` for a foreign or damaged file."""
        tensors, metadata = load_tensors(path)
        config, lidb = header(path, metadata)
        encoder = config.encoder
        if lidb.fingerprint != metadata.get("fingerprint"):
            raise UserError(f"{path} was made with other LiDB bases than this version builds; train it again")
        lidb.template  # noqa: B018 (made once, before everything is made on that device)
        bare = replace(config, encoder=replace(encoder, weights=None, pretrained=False))
        with reading(path), torch.device("meta"):
            empty = cls(bare, lidb)  # in no memory: a file can claim any size
        own = empty.state_dict()
        for name, value in tensors.items():
            if name not in own or own[name].shape != value.shape:
                raise UserError(f"{path}: unexpected tensor {name} {list(value.shape)}")
            if not torch.isfinite(value).all():
                raise UserError(f"{path}: {name} has non-finite values")
        missing = [k for k in empty.used() if k not in tensors and not (encoder.frozen and k.startswith("encoder."))]
        if missing:
            raise UserError(f"{path} lacks {missing[0]}")
        model = cls(config, lidb)
        model.load_state_dict(tensors, strict=False)
        model.metadata = metadata
        return model.eval()
