"""hyperdb's own file: one person's LiDB numbers, the relaxed factors or other adapters if any, and what they need.

The LiDB numbers are one flat tensor without padding: 28,800 numbers, 115,200 bytes of float32, for SD1.5.
The bases are not stored; their algorithm, seed and fingerprint are. Everything is checked before any is used.

As int8 the largest of each layer's A and of its B is 127, the largest of each relaxed direction too, and the float32
scales that undo it are in one tensor each.

A file of version 1 holds LiDB's numbers and low-rank factors. One of version 2 may lack LiDB's numbers and hold parts:
the header describes each by its kind, configuration and layout, and its tensors are called `part0:NAME`
(docs/formats.md).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdb.adapters import KINDS, AdapterConfig, LiDBConfig, PlusConfig, kind_of
from hyperdb.adapters.base import Adapter, Changes, Factors, LowRank, both
from hyperdb.adapters.inject import Injection, settled
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.lidb import ALGORITHM, LiDB
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_metadata, load_tensors, save_tensors
from hyperdb.runtime.version import __version__

KIND, VERSIONS = "hyperdb.personalization", ("1", "2")  # the second has parts beside LiDB's
MAX_BYTES = 16 * 2**30  # DreamBooth of Stable Diffusion 1.5 is 3.4 GB, as factors of full rank 4.3
KEYS = ("version", "layout", "layout_digest", "data_digest")
LIDB_KEYS = ("a", "b", "rank", "seed", "basis", "fingerprint")
WORDS = ("base", "rare_token", "class_word")
ADAPTERS = ("adapter.safetensors", "lidb.safetensors")  # of a folder, the first that is there


def _data_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _int8(values: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return int8 numbers and the scales, along every axis but `dim`, that they are to be multiplied by."""
    scale = values.abs().amax(dim, keepdim=True) / 127
    return (values / scale.clamp_min(1e-30)).round().to(torch.int8), scale


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _in_order(layout: Layout, names: Iterable[str]) -> list[str]:
    """Sort names of layers: those of the layout as there, then others."""
    place = {name: i for i, name in enumerate(layout.names)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


def _number(metadata: Mapping[str, str], key: str) -> int:
    text = metadata[key]
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise UserError(f"its {key} is {text[:40]!r}, not a number")
    return int(text)


@dataclass
class Part:
    """What one adapter learned of a person: `params` `[1, ...]` of the adapter that `config` builds over `layout`.

    Raises `UserError` for numbers of other names or shapes than that adapter has, or not finite.
    """

    config: AdapterConfig
    layout: Layout
    params: dict[str, Tensor]

    def __post_init__(self) -> None:
        shapes = self.adapter.shapes()
        if odd := sorted(self.params.keys() ^ shapes.keys()):
            raise UserError(f"the numbers {odd[0][:80]!r} of its adapter {self.kind} are missing or unknown")
        for name, shape in shapes.items():
            if tuple(self.params[name].shape) != (1, *shape):
                found = list(self.params[name].shape)
                raise UserError(f"{name} of its adapter {self.kind} has shape {found}, not {[1, *shape]}")
        self.params = {name: _plain(self.params[name]) for name in shapes}
        if not all(bool(x.isfinite().all()) for x in self.params.values()):
            raise UserError("some numbers are not finite: the training diverged, or the file is damaged")

    @property
    def kind(self) -> str:
        """The name of the adapter's kind in `hyperdb.adapters.KINDS`."""
        return kind_of(self.config)

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter that reads `params`."""
        return self.config.build(self.layout)

    def changes(self) -> Changes:
        """Return what it changes, one identity, float32 on the CPU."""
        return self.adapter.changes(self.params)

    @classmethod
    def parse(cls, described: Any, tensors: Mapping[str, Tensor]) -> Part:
        """Make one of its description in a file's header and its tensors without the identity axis."""
        if not isinstance(described, dict) or {"kind", "config", "layout"} - described.keys():
            raise UserError("a part of it has no kind, config and layout")
        kind, settings = described["kind"], described["config"]
        if not isinstance(kind, str) or kind not in KINDS or not isinstance(settings, dict):
            raise UserError(f"it holds an adapter of kind {str(kind)[:40]!r}, unknown to this hyperdb: update")
        try:
            config = KINDS[kind](**settings)
        except TypeError as error:
            raise UserError(f"its adapter {kind} has settings of another version ({error})") from error
        layout = Layout.from_text(str(described["layout"]))
        return cls(config, layout, {name: tensor[None].float() for name, tensor in tensors.items()})


@dataclass
class Personalization:
    """A person, for one kind of model: what `personalize` writes and `generate` reads.

    `tokens` [N, D] are the LiDB numbers as `config` lays them out, None where there are none. `relaxed` are the factors
    of the fast fine-tuning or of an imported LoRA. They may adapt layers and convolutions beyond the layout. `parts`
    are adapters of other kinds. All these changes add up.

    `layout` lists the paper's layers of the model, of whatever kind the adapter is. `fingerprint` is that of LiDB's
    random bases (`LiDB.fingerprint`), or "" to compute it when needed. `base` is the hash of the model that the person
    was made for (`hyperdb.diffusion.targets.base_hash`), or "" if unknown. Raises `UserError` for shapes that do not
    fit and for numbers that are not finite.
    """

    layout: Layout
    tokens: Tensor | None
    config: LiDBConfig = field(default_factory=LiDBConfig)
    base: str = ""
    rare_token: str = "sks"
    class_word: str = "face"
    relaxed: Factors = field(default_factory=dict)
    fingerprint: str = ""
    parts: list[Part] = field(default_factory=list)
    source: str = field(default="this adapter", compare=False)  # the file, for messages

    def __post_init__(self) -> None:
        for key in WORDS:
            if len(value := getattr(self, key)) > 200 or not value.isprintable():
                raise UserError(f"{key}={value[:40]!r}: at most 200 printable characters")
        if self.tokens is not None and self.tokens.shape != self.lidb.mask.shape:
            shape, expected = list(self.tokens.shape), list(self.lidb.mask.shape)
            raise UserError(f"tokens of shape {shape}: this layout takes {expected}")
        known = {layer.name: layer for layer in self.layout.layers}
        for name, pair in self.relaxed.items():
            down, up = (list(x.shape) for x in pair)
            fits = len(down) in (3, 5) and len(up) == 3 and down[0] == up[0] == 1 and down[1] == up[2] > 0
            if not fits or (name in known and (down[2:], up[1]) != ([known[name].in_], known[name].out)):
                raise UserError(f"factors of shape {down} and {up} do not fit layer {known.get(name, name)}")
        ordered = {name: self.relaxed[name] for name in _in_order(self.layout, self.relaxed)}
        self.relaxed = {name: LowRank(_plain(down), _plain(up)) for name, (down, up) in ordered.items()}
        numbers = [x for pair in self.relaxed.values() for x in pair]
        if self.tokens is not None:
            self.tokens = self.lidb.unpack(self.lidb.pack(_plain(self.tokens)))
            numbers.append(self.tokens)
        if not all(bool(x.isfinite().all()) for x in numbers):
            raise UserError("some numbers are not finite: the training diverged, or the file is damaged")

    @cached_property
    def lidb(self) -> LiDB:
        """The adapter that reads `tokens`; its bases are built on first use."""
        return self.config.build(self.layout)

    def changes(self) -> Changes:
        """Return all that is changed, one identity, float32 on the CPU: LiDB's, the relaxed factors' and the parts'.

        Raises `UserError` when the rebuilt bases are not those that the numbers were trained in.
        """
        own: Factors = {}
        if self.tokens is not None:
            if self.fingerprint not in ("", self.lidb.fingerprint):
                raise UserError(
                    f"the random bases rebuilt here have fingerprint {self.lidb.fingerprint}, {self.source} needs "
                    f"{self.fingerprint}: install the versions that made it, or personalise again"
                )
            own = self.lidb.factors({"tokens": self.tokens[None]})
        return both(own, self.relaxed, *(part.changes() for part in self.parts)) or {}

    @property
    def has_contexts(self) -> bool:
        """Whether its text encoder gives several contexts (P+), for which a pipeline has to ask in its own way."""
        return any(isinstance(part.config, PlusConfig) for part in self.parts)

    def factors(self) -> Factors:
        """Return `changes` as low-rank factors. Raises `UserError`, naming the kind, where they are of no low rank."""
        changes = self.changes()
        for part in self.parts:
            if not all(isinstance(change, LowRank) for change in part.changes().values()):
                raise UserError(
                    f"{self.source} is an adapter of kind {part.kind}, which has no low-rank factors that another tool "
                    "could load; use it with `hyperdb generate`, or with Personalization.load(FILE).apply(pipe)"
                )
        return dict(changes)  # type: ignore[arg-type]

    def apply(self, target: Any, strength: float = 1.0) -> Injection:
        """Personalise a diffusers Stable Diffusion pipeline (or a mapping {layer: nn.Linear}).

        `remove()` on what is returned restores the model. A second call on a pipeline replaces the first.
        Raises `UserError` for a model of another layout; warns for another base of the same layout.
        """
        from hyperdb.diffusion.targets import base_hash, find_set, find_targets, forget_compiled

        changes = self.changes()
        beyond = changes.keys() - set(self.layout.names)  # what others than LiDB change besides
        if isinstance(target, Mapping):
            sites: Mapping[str, nn.Module] = target
            targets: Any = {name: module for name, module in sites.items() if name not in beyond}
        else:
            if self.has_contexts and callable(target) and not hasattr(target, "personalize"):
                raise UserError(
                    f"{self.source} is of P+, with a context for each attention, which this pipeline does not read; "
                    "take hyperdb.formats.pipeline.HybridPipeline"
                )
            targets = find_targets(target.unet, target.text_encoder)
            sites = find_set("any", target.unet, target.text_encoder) if beyond else {}
            forget_compiled(target.unet, target.text_encoder)
        Layout.of(targets).require(self.layout, self.source)
        here = base_hash(targets)
        if self.base and here and self.base != here:
            message = (
                f"{self.source} was made for base {self.base} and is used on {here}: expect less likeness"
            )
            warnings.warn(message, stacklevel=2)
        if missing := sorted(beyond - sites.keys()):
            raise UserError(f"{self.source} adapts {missing[0]}, which this model does not have")
        modules: dict[str, Any] = {**targets, **{name: sites[name] for name in beyond}}
        handle = Injection(modules)
        try:
            handle.set(settled(changes, handle.sites), strength)
        except UserError:
            handle.remove()
            raise
        if isinstance(before := getattr(target, "_hyperdb_injection", None), Injection):
            before.remove()
        if not isinstance(target, Mapping):
            target._hyperdb_injection = handle
        return handle

    def _write(self, path: str | Path, relaxed: Factors, parts: list[Part], dtype: torch.dtype) -> Path:
        tensors: dict[str, Tensor] = {}
        if dtype is torch.int8:
            if parts or self.tokens is None:
                raise UserError("int8 is a format of LiDB's numbers; save this adapter as fp16 or fp32")
            tensors = self._quantised(relaxed)
        else:
            if self.tokens is not None:
                tensors = {"lidb": self.lidb.pack(self.tokens).to(dtype)}
            for name, (down, up) in relaxed.items():
                tensors |= {f"{name}.down": down[0].to(dtype), f"{name}.up": up[0].to(dtype)}
        for number, part in enumerate(parts):
            tensors |= {f"part{number}:{name}": x[0].to(dtype) for name, x in part.params.items()}
        if not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise UserError(f"some numbers are too large for {dtype}; save as torch.float32")
        if (size := sum(x.nbytes for x in tensors.values())) > MAX_BYTES:
            raise UserError(f"an adapter of {size:,} bytes; {MAX_BYTES:,} at most can be read again")
        metadata = {
            "kind": KIND,
            "version": VERSIONS[0] if self.tokens is not None and not parts else VERSIONS[1],
            "layout": self.layout.to_text(),
            "layout_digest": self.layout.digest,
        }
        if self.tokens is not None:
            metadata |= {key: str(getattr(self.config, key)) for key in ("a", "b", "rank", "seed")}
            metadata |= {"basis": ALGORITHM, "fingerprint": self.fingerprint or self.lidb.fingerprint}
        metadata |= {
            "data_digest": _data_digest(tensors),
            **{key: getattr(self, key) for key in WORDS},
            "created_by": f"hyperdb {__version__}",
        }
        if parts:
            listed = [{"kind": p.kind, "config": asdict(p.config), "layout": p.layout.to_text()} for p in parts]
            metadata["parts"] = json.dumps(listed)
        return save_tensors(path, tensors, metadata, check=False)

    def _quantised(self, relaxed: Factors) -> dict[str, Tensor]:
        """Return the tensors of an int8 file."""
        assert self.tokens is not None
        sides = [_int8(side, (-2, -1)) for side in self.lidb.split(self.tokens)]  # scales [N, 1, 1]
        numbers = self.lidb.join(*(side for side, _ in sides))
        tensors = {"lidb": self.lidb.pack(numbers), "lidb.scale": torch.cat([s.flatten(1) for _, s in sides], 1)}
        scales = []
        for name, (down, up) in relaxed.items():
            (tensors[f"{name}.down"], a) = _int8(down[0], tuple(range(1, down.ndim - 1)))
            (tensors[f"{name}.up"], b) = _int8(up[0], 0)
            scales.append(a.flatten() * b.flatten())  # one a direction: only their product matters
        return {**tensors, "scale": torch.cat(scales)} if scales else tensors

    def save_lidb(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the LiDB numbers alone, as float32, float16 or int8, atomically."""
        if self.tokens is None:
            raise UserError(f"{self.source} has no LiDB numbers")
        return self._write(path, {}, [], dtype)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write all there is of the person, as float32, float16 or (LiDB and relaxed factors) int8, atomically."""
        return self._write(path, self.relaxed, self.parts, dtype)

    @classmethod
    def load(cls, path: str | Path) -> Personalization:
        """Read a file of `save` or `save_lidb`; for any other, raise one `UserError` that names it."""
        metadata = load_metadata(path)
        if metadata.get("kind") != KIND:
            raise UserError(
                f"{path} is not a hyperdb adapter; give the adapter.safetensors or lidb.safetensors that "
                f"'hyperdb personalize' wrote, or make one of another tool's LoRA with `hyperdb import path={path}`"
            )
        if (version := metadata.get("version")) not in VERSIONS:
            raise UserError(
                f"{path} has format version {version!r}, this hyperdb reads {' and '.join(VERSIONS)}: update hyperdb"
            )
        try:
            if Path(path).stat().st_size > MAX_BYTES:
                raise UserError(f"it is larger than {MAX_BYTES} bytes")
            made = cls._parse(load_tensors(path)[0], metadata)
            made.source = str(path)
            return made
        except Exception as error:  # a header from outside can make anything go wrong
            raise UserError(f"{path} is damaged or not a hyperdb adapter: {error}") from error

    @classmethod
    def _parse(cls, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Personalization:
        if missing := [key for key in (*KEYS, *WORDS) if key not in metadata]:
            raise UserError(f"it lacks {missing[0]!r}")
        layout = Layout.from_text(metadata["layout"])
        if layout.digest != metadata["layout_digest"]:
            raise UserError("its layout does not have the digest it states")
        has_lidb = metadata["version"] == VERSIONS[0] or "a" in metadata
        if missing := [key for key in LIDB_KEYS if has_lidb and key not in metadata]:
            raise UserError(f"it lacks {missing[0]!r}")
        if has_lidb and metadata["basis"] != ALGORITHM:
            raise UserError(
                f"its bases are of kind {metadata['basis'][:40]!r}, not {ALGORITHM}: update hyperdb"
            )
        config = LiDBConfig(*(_number(metadata, key) for key in ("a", "b", "rank", "seed") if has_lidb))
        lidb, numbers = config.build(layout), tensors.get("lidb")
        if has_lidb and (numbers is None or numbers.shape != (lidb.numbers,)):
            found = "none" if numbers is None else list(numbers.shape)
            raise UserError(f"its layout needs [{lidb.numbers}] LiDB numbers, there are {found}")
        quantised = numbers is not None and numbers.dtype is torch.int8
        scales = {"lidb.scale", "scale"} if quantised else set()
        kinds = (torch.int8,) if quantised else (torch.float32, torch.float16)
        for name, tensor in tensors.items():
            expected_kinds = (torch.float32,) if name in scales else kinds
            if tensor.dtype not in expected_kinds:
                raise UserError(f"tensor {name[:80]!r} is {tensor.dtype}, not {' or '.join(map(str, expected_kinds))}")
        if _data_digest(tensors) != metadata["data_digest"]:
            raise UserError("its numbers do not have the digest it states")
        apart: dict[str, dict[str, Tensor]] = {}
        for name in sorted(name for name in tensors if ":" in name):
            number, _, inner = name.partition(":")
            apart.setdefault(number, {})[inner] = tensors.pop(name)
        parts = cls._parts(metadata.get("parts", "[]"), apart)
        if parts and quantised:
            raise UserError("its parts are int8, which only LiDB's numbers may be")
        names = tensors.keys() - ({"lidb"} if has_lidb else set()) - scales
        adapted = {name.rpartition(".")[0] for name in names}
        expected = {f"{name}.{part}" for name in adapted for part in ("down", "up")}
        if odd := sorted(names ^ expected, key=lambda name: (name in expected, name)):
            raise UserError(f"tensor {odd[0][:80]!r} is missing or unknown")
        relaxed = {
            name: LowRank(tensors[f"{name}.down"][None].float(), tensors[f"{name}.up"][None].float())
            for name in _in_order(layout, adapted)  # that of an int8 file's scales
        }
        tokens = lidb.unpack(numbers.float()) if numbers is not None else None
        if quantised and tokens is not None:
            tokens, relaxed = cls._scaled(lidb, tokens, relaxed, tensors)
        words = {key: metadata[key] for key in WORDS} | {"fingerprint": metadata.get("fingerprint", "")}
        return cls(layout, tokens, config, relaxed=relaxed, parts=parts, **words)

    @staticmethod
    def _parts(described: str, tensors: Mapping[str, dict[str, Tensor]]) -> list[Part]:
        """Read a file's parts from the header and the tensors of each. Raises `UserError` when they do not agree."""
        try:
            listed = json.loads(described)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"the description of its parts is damaged ({error})") from error
        if not isinstance(listed, list) or tensors.keys() != {f"part{i}" for i in range(len(listed))}:
            raise UserError("its parts are not those that it describes")
        return [Part.parse(one, tensors[f"part{i}"]) for i, one in enumerate(listed)]

    @staticmethod
    def _scaled(
        lidb: LiDB, tokens: Tensor, relaxed: Factors, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Factors]:
        """Multiply an int8 file's numbers by its scales. Raises `UserError` when these do not fit."""
        for name, (down, up) in relaxed.items():
            if down.ndim not in (3, 5) or up.ndim != 3 or down.shape[1] != up.shape[2]:
                raise UserError(f"factors of shape {list(down.shape)} and {list(up.shape)} do not fit layer {name}")
        ranks = {name: down.shape[1] for name, (down, _) in relaxed.items()}
        for key, shape in (("lidb.scale", [len(tokens), 2]), ("scale", [sum(ranks.values())])):
            found = list(tensors[key].shape) if key in tensors else None
            if found != (shape if key == "lidb.scale" or relaxed else None):
                raise UserError(f"tensor {key!r} has shape {found}, not {shape}")
        A, B = lidb.split(tokens)
        a, b = tensors["lidb.scale"][..., None, None].unbind(1)  #                 [N, 1, 1] each
        if relaxed:
            each = tensors["scale"].split(list(ranks.values()))
            relaxed = {n: LowRank(down, up * s) for (n, (down, up)), s in zip(relaxed.items(), each, strict=True)}
        return lidb.join(A * a, B * b), relaxed


def places(path: str | Path) -> int:
    """Return how many places of a prompt the word of a person takes, from the header of a file that could be loaded."""
    parts = json.loads(load_metadata(path).get("parts", "[]"))
    return max([1, *(part["config"].get("vectors", 1) for part in parts)])


def find_adapter(path: str) -> Path:
    """Return the adapter file meant by a file or by the folder of a `personalize` run."""
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.is_dir():
        several = "; several are written as a list, [a,b]" if "," in path else ""
        raise UserError(f"no adapter at {path}; `hyperdb personalize` makes one{several}")
    for name in ADAPTERS:
        if (given / name).is_file():
            return given / name
    raise UserError(f"{path} holds neither {' nor '.join(ADAPTERS)}; give the folder of a `personalize` run")
