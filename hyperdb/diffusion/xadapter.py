"""An old base that steers a new one: X-Adapter (Ran et al. 2024, arXiv 2312.02238), in its least form.

Both UNets run. What the blocks of the old one's decoder make, with an adapter of the old base in it, goes through small
trained networks and is added to what the new one's make. Nothing of either base is trained.

Left out of the paper: a new base with other latents. Here both look at the same noisy latent, so that autoencoder,
noise levels and vocabulary have to be the same, as they are of a base and its descendants. So there is no first stage
either, in which the old base draws alone and its picture is translated. The networks are one of two convolutions a
block, not stacks of residual blocks, and all blocks of the decoder are steered, not some.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.diffusion.base import Base
from hyperdb.diffusion.digest import digest_vae
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata, load_tensors, save_tensors
from hyperdb.runtime.seed import derive

KIND, VERSION = "hyperdb.xadapter", "1"
FILE = "xadapter.safetensors"
MOST = 4096  # channels between the two convolutions


def require_pair(old: Base, new: Base) -> None:
    """Raise `UserError` unless the old base can look at the new one's latents and read its prompts."""
    known = [(base.tokenizer.get_vocab(), base.tokenizer.model_max_length) for base in (old, new)]
    levels = [base.schedule.alphas_cumprod for base in (old, new)]
    blocks = [len(base.unet.up_blocks) for base in (old, new)]
    for what, same in (
        ("autoencoders", digest_vae(old.vae) == digest_vae(new.vae)),
        ("vocabularies", known[0] == known[1]),
        ("noise levels", torch.equal(*levels)),
        ("numbers of blocks", blocks[0] == blocks[1]),
    ):
        if not same:
            raise UserError(
                f"{old.config.path} cannot steer {new.config.path}: they have other {what}, and an X-Adapter here is "
                "for a base and its descendants"
            )


class Mapper(nn.Module):
    """For each block of the decoder, what is added to the new base's features for those of the old one's.

    `old` and `new` are the channels of the blocks' outputs, `width` those between the two convolutions. The last
    convolution begins at zero: an untrained mapper adds nothing.
    """

    def __init__(self, old: list[int], new: list[int], width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "mapper"))  # the only way to seed the modules' initialisation
            self.blocks = nn.ModuleList(self._block(m, n, width) for m, n in zip(old, new, strict=True))

    @staticmethod
    def _block(old: int, new: int, width: int) -> nn.Sequential:
        last = nn.Conv2d(width, new, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        first = nn.Conv2d(old, width, 3, padding=1)
        return nn.Sequential(nn.GroupNorm(gcd(32, old), old), nn.SiLU(), first, nn.SiLU(), last)

    @classmethod
    def between(cls, old: Base, new: Base, width: int, seed: int = 0) -> Mapper:
        """Return an untrained one for two bases. Raises `UserError` unless they fit together."""
        require_pair(old, new)
        of_old, of_new = ([int(c) for c in reversed(base.unet.config.block_out_channels)] for base in (old, new))
        return cls(of_old, of_new, width, seed)

    def save(self, path: Path, old: Base, new: Base) -> Path:
        """Write it, float32, with the digests of the bases and the place of the old one."""
        bases = {"old": old.digest, "new": new.digest, "old_path": old.config.path}
        bases |= {"old_variant": old.config.variant or "", "old_revision": old.config.revision or ""}
        width = str(self.blocks[0][2].out_channels)  # type: ignore[index]
        return save_tensors(path, self.state_dict(), {"kind": KIND, "version": VERSION, "width": width, **bases})

    @classmethod
    def load(cls, path: Path, old: Base, new: Base) -> Mapper:
        """Read the one that was trained for two bases. Raises `UserError` for a file of others, or a damaged one."""
        told = header(path)
        for name, base in (("old", old), ("new", new)):
            if told[name] != base.digest:
                raise UserError(
                    f"{path} was trained with the {name} base {told[name]}; {base.config.path} is {base.digest}"
                )
        made = cls.between(old, new, int(told["width"]))
        tensors, own = load_tensors(path)[0], made.state_dict()
        fits = tensors.keys() == own.keys() and all(tensors[k].shape == own[k].shape for k in own)
        if not fits or not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise UserError(f"{path} is damaged: its numbers are not those of its settings, or not finite")
        made.load_state_dict(tensors)
        return made.eval().requires_grad_(False)


def find(path: str) -> Path:
    """Return the file meant by a file or by the folder of a training."""
    given = Path(path).expanduser()
    file = given / FILE if given.is_dir() else given
    if not file.is_file():
        raise UserError(f"no X-Adapter at {path}; `hyperdb train_xadapter` makes one")
    return file


def header(path: Path) -> dict[str, str]:
    """Return what a file says: digests `old` and `new` of its bases, where the old was, `width`. Raises `UserError`."""
    told = load_metadata(path)
    if told.get("kind") != KIND:
        raise UserError(f"{path} is no X-Adapter; give the {FILE} that `hyperdb train_xadapter` wrote")
    if told.get("version") != VERSION:
        version = told.get("version")
        raise UserError(f"{path} has format version {version!r}, this hyperdb reads {VERSION}: update hyperdb")
    width = told.get("width", "")
    if {"old", "new", "old_path"} - told.keys() or not (width.isascii() and width.isdigit() and len(width) < 5):
        raise UserError(f"{path} is damaged: it does not say its bases and its width")
    if not 1 <= int(width) <= MOST:
        raise UserError(f"{path} has a width of {width}: expected 1 to {MOST}")
    return told


class XAdapter:
    """The old base and a mapper on the new base, until `remove`: whatever runs the new one runs both.

    The text encoder of the old one reads the ids that the new one's reads, or those of `saying`; its UNet sees the
    latent and the timestep that the new one's sees. An adapter on the old base is applied to `old`.
    """

    def __init__(self, old: Base, new: Base, mapper: Mapper) -> None:
        self.old, self.mapper = old, mapper.to(new.device)
        self._ids: Tensor | None = None
        self._context: Tensor | None = None
        self._made: list[Tensor] = []  # by the old decoder's blocks in this pass
        self._handles = [
            new.text_encoder.register_forward_hook(self._read),
            new.unet.register_forward_pre_hook(self._run),
            *(block.register_forward_hook(self._keep) for block in old.unet.up_blocks),
            *(block.register_forward_hook(self._steer(i)) for i, block in enumerate(new.unet.up_blocks)),
        ]

    def _read(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        with torch.no_grad():
            self._context = self.old.text_encoder(inputs[0] if self._ids is None else self._ids)[0]

    def _run(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        z, t, _ = inputs
        self._made = []
        with torch.no_grad():
            self.old.unet(z, t, self._context)

    def _keep(self, _: nn.Module, inputs: Any, output: Tensor) -> None:
        self._made.append(output)

    # F_i' = F_i + M_i(F_i of the old base)
    def _steer(self, i: int) -> Any:
        def steer(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            added = self.mapper.blocks[i](self._made[i])
            if added.shape[2:] != output.shape[2:]:
                added = F.interpolate(added, output.shape[2:])
            return output + added.to(output)

        return steer

    @contextmanager
    def saying(self, ids: Tensor) -> Iterator[None]:
        """Within a block tell the old base other token ids `[B, L]` than the new one."""
        self._ids = ids
        try:
            yield
        finally:
            self._ids = None

    def remove(self) -> None:
        """Leave both bases as they were; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._made, self._context = [], [], None
