"""What judges from a model hub share: their files found, what is wrong with these said, pictures encoded in batches."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import hash_files, load_tensors
from hyperdb.runtime.paths import resolve

BATCH = 32  # pictures in one pass
SETTINGS, WEIGHTS = "config.json", "model.safetensors"
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # what the id of a repository looks like
FILES = ["*.json", "*.txt", WEIGHTS]  # what is fetched of a repository: settings, words, weights


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def fill(net: Any, folder: Path) -> Any:
    """Give a network the weights of a folder, which may have further ones. Raises `ValueError` if one is missing."""
    found, wanted = load_tensors(folder / WEIGHTS)[0], net.state_dict()
    if odd := [name for name, own in wanted.items() if name not in found or found[name].shape != own.shape]:
        raise ValueError(f"{WEIGHTS} has no {odd[0]} of shape {list(wanted[odd[0]].shape)}")
    net.load_state_dict({name: found[name].float() for name in wanted})
    return net


class Pretrained(ABC):
    """A frozen encoder of whole pictures, read from `path`: a folder in the hub's layout, or a hub id `ID[@REVISION]`.

    Only `config.json`, further JSON and text files, and `model.safetensors` are read. Everything is tried once when it
    is made. Raises `UserError` for what is missing, or for files that are no such model. The weights move to `device`
    when pictures are first judged, for until then something else may need its memory.
    """

    name: str
    dim: int
    net: Any  # a timm or transformers model
    made_by = ""  # the command that trains one, where this repository does
    without = "or to null to go without"

    def __init__(self, path: str, device: torch.device) -> None:
        folder = self._find(path)
        self.device = torch.device("cpu")
        try:
            self.net = self.load(folder).requires_grad_(False).eval()
            self.dim = self.attempt().shape[-1]
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise self._unusable(path, f"{folder} holds no model of this kind ({_first_line(error)})") from error
        self.digest = hash_files([folder / WEIGHTS])
        self.device = device

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """Return the network of a folder, which has the two files."""

    @abstractmethod
    def pixels(self, image: Tensor) -> Tensor:
        """Prepare a picture `[3, H, W]` uint8 of any size as the model's own pictures are: `[3, h, w]`."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Encode prepared pictures `[B, 3, h, w]` as `[B, dim]`."""

    def attempt(self) -> Tensor:
        """Encode a black picture, `[1, dim]`, so that what does not fit together is known before the long work."""
        found = self.encode(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))
        if not found.isfinite().all():
            raise ValueError("its weights make a picture into NaN")
        return found

    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 `[N, 3, H, W]` as float32 `[N, dim]` of length 1, on the CPU."""
        return self.encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures as they are, whatever the judge looks for in them."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
        self.net.to(self.device)
        ready = (torch.stack([self.pixels(image) for image in part]) for part in images.cpu().split(BATCH))
        found = [self.features(pixels.to(self.device)).float().cpu() for pixels in ready]
        return F.normalize(torch.cat(found), dim=-1)

    def _find(self, path: str) -> Path:
        """Return the folder that holds the model."""
        folder = resolve(path)
        if not folder.is_dir():
            if not HUB.fullmatch(path.partition("@")[0]):
                raise self._unusable(path, "there is no such folder")
            from huggingface_hub import snapshot_download

            repository, _, revision = path.partition("@")
            try:
                folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
            except Exception as error:  # no network, no such repository, no permission: the line says which
                raise self._unusable(path, f"no such folder, and not to be had from the hub ({_first_line(error)})"
                                     ) from error  # fmt: skip
        for file in (SETTINGS, WEIGHTS):
            if not (folder / file).is_file():
                only = " (other formats can run code when they are opened, and are not read)" if file == WEIGHTS else ""
                raise self._unusable(path, f"{folder} has no {file}{only}")
        return folder

    def _unusable(self, path: str, why: str) -> UserError:
        repository, _, revision = path.partition("@")
        fetch = f"fetch it with `hf download {repository}{f' --revision {revision}' if revision else ''}`, "
        fetch = fetch if HUB.fullmatch(repository) and not resolve(path).exists() else ""
        such = f", such as `{self.made_by}` writes," if self.made_by else ","
        return UserError(
            f"judges.{self.name}={path!r}: {why}; {fetch}"
            f"set judges.{self.name} to a folder with {SETTINGS} and {WEIGHTS}{such} {self.without}"
        )
