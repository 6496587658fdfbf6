"""What a command would load, where, and how much memory it would take: `dry_run=true`.

Nothing is loaded or computed. Of data that is on this disk the pictures are counted, and none is decoded; it stays
there, and a batch of it is in memory. The networks are built from their configurations as shapes. A stage names its
passes beside its `run`, in `passes`. Each is run once on shapes, and the most bytes alive at once are counted. A
graphics card's kernels keep about what the CPU's keep, which are the ones counted; what a library reserves beyond that
is not (benchmarks/memory.py compares).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperdb.adapters import LiDBConfig
from hyperdb.adapters.inject import Injection
from hyperdb.adapters.layout import Layout
from hyperdb.data.people import load_people
from hyperdb.data.sources import is_here
from hyperdb.diffusion.base import DTYPES, Base, pick_device
from hyperdb.diffusion.quantise import fewer, stored
from hyperdb.hypernet import e4t
from hyperdb.hypernet.model import Hypernet, header
from hyperdb.runtime import precision
from hyperdb.runtime.files import load_metadata
from hyperdb.runtime.lazy import PART
from hyperdb.runtime.paths import resolve
from hyperdb.tuning.personalizer import hypernet_folder
from hyperdb.tuning.trainable import layout_of

if TYPE_CHECKING:
    from hyperdb.adapters import AdapterConfig
    from hyperdb.adapters.base import Changes, Factors
    from hyperdb.adapters.lidb import LiDB
    from hyperdb.hypernet import HypernetConfig
    from hyperdb.tuning.personalizer import PersonalizerConfig

GIGABYTE = 2**30
LIBRARIES = 0.8 * GIGABYTE  # a process that has imported everything; a CUDA context is about as large
KNOWN = 2048  # bytes in memory of what is known of a picture: labels, caption, prompt, tokens
QUANTISED = ("UNet", "text encoder")
TRAINED = 3 * 4  # bytes kept beside a trained number from step to step: two moments, average; float32


class Peak(TorchDispatchMode):
    """Count the bytes of the tensors that come alive within the block; the most at once are `bytes`."""

    def __init__(self, *present: nn.Module) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known: Any = weakref.WeakKeyDictionary()
        for module in present:
            for tensor in (*module.parameters(), *module.buffers()):
                self._known[tensor.untyped_storage()] = 0

    def _free(self, size: int) -> None:
        self._now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = self._known[storage] = storage.nbytes()
                weakref.finalize(storage, self._free, size)
                self._now += size
                self.bytes = max(self.bytes, self._now)
        return out


@dataclass
class Module:
    """A network in memory; `extra` is what its training keeps beside the weights, in bytes."""

    name: str
    parameters: int
    bytes: int
    extra: int = 0


@dataclass
class Data:
    """People that are read: how many, the bytes in memory, and those of the latents that the cache holds of them.

    Without `pictures` they are not on this disk and could not be counted.
    """

    place: str
    pictures: int = 0
    people: int = 0
    bytes: int = 0
    latents: int = 0


@dataclass
class Need:
    """Memory in bytes: what stays, and what each pass takes on top while it runs."""

    device: str
    dtype: str
    modules: list[Module]
    passes: dict[str, int]
    data: list[Data] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The most there is at once, libraries included."""
        stays = sum(m.bytes + m.extra for m in self.modules) + sum(d.bytes for d in self.data)
        return round(LIBRARIES + stays + max(self.passes.values(), default=0))


def _shaped(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the weights of a network on the meta device by the running mode's shapes, floating ones in `dtype`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=dtype), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                part._buffers[name] = torch.empty(buffer.shape, dtype=kind)
    return module


class Sketch:
    """A base and perhaps a hypernetwork as shapes, whose passes can be measured."""

    def __init__(self, config: Any, device: str) -> None:
        """Build everything for `config.diffusion` on a device called `device`. Raises `UserError` as loading would."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = device
        self.dtype = DTYPES[config.diffusion.dtype]
        self.base = Base.sketch(config.diffusion)
        self.layout = Layout.of(self.base.targets())
        rest = precision.resting(device, self.dtype)
        networks = (self.base.unet, self.base.text_encoder, self.base.vae)
        with self.mode:
            for module, dtype in zip(networks, (rest, rest, torch.float32), strict=True):
                _shaped(module, dtype)
        self.modules = dict(zip(("UNet", "text encoder", "autoencoder"), networks, strict=True))
        self.passes: dict[str, int] = {}
        self.training: dict[str, int] = {}  # bytes that training keeps beside a network's weights
        self.hypernet: Hypernet | None = None
        self.data: list[Data] = []

    def add_hypernet(self, settings: HypernetConfig, lidb: LiDB) -> Hypernet:
        """Take a hypernetwork along, without its encoder's weights; return it."""
        settings = replace(settings, encoder=replace(settings.encoder, weights=None, pretrained=False))
        lidb.to("meta").template  # noqa: B018 (made once, before everything is made on that device)
        with torch.device("meta"):
            hypernet = Hypernet(settings, lidb)
        with self.mode:
            _shaped(hypernet, torch.float32)
        self.hypernet = hypernet
        self.modules |= {"image encoder": hypernet.encoder, "hypernetwork decoder": hypernet.decoder}
        return hypernet

    def keep_training(self, *names: str) -> None:
        """Count what training keeps beside the trained weights of the networks of these names."""
        for name in names:
            trained = sum(p.numel() for p in self.modules[name].parameters() if p.requires_grad)
            self.training[name] = TRAINED * trained

    def read(self, place: str, limit: int | None, split: str | None, latents: int = 0, **choice: Any) -> None:
        """Count these people of a place (`load_people`), if it is on this disk, and so many latents of each picture."""
        if not is_here(place):
            self.data.append(Data(place))
            return
        size = self.base.config.size
        people = load_people(place, limit, split, size, **choice)
        held = len(people) * KNOWN + PART * 3 * size**2  # while they are encoded; a batch is no larger
        kept = len(people) * latents * 2 * math.prod(self.base.latent_shape) * torch.float16.itemsize
        self.data.append(Data(place, len(people), people.identities, held, kept))

    def autocast(self) -> Any:
        """Return the context of UNet, text encoder and hypernetwork: the device's rule, on the CPU's shapes."""
        if self.device == "cpu":
            return precision.autocast("cpu", self.dtype)
        exact = self.dtype is torch.float32 or precision.emulated(self.device, self.dtype)
        return torch.autocast("cpu", self.dtype, enabled=not exact)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count what is alive at most within the block as the pass called `name`."""
        with self.mode, Peak(*self.modules.values()) as peak:
            yield
        self.passes[name] = peak.bytes

    def factors(self, people: int, rank: int, trained: bool) -> Factors:
        """Return factors of this rank for so many people."""
        from hyperdb.adapters.base import LowRank

        pairs = {}
        for layer in self.layout.layers:
            down, up = torch.empty(people, rank, layer.in_), torch.empty(people, layer.out, rank)
            pairs[layer.name] = LowRank(down.requires_grad_(trained), up.requires_grad_(trained))
        return pairs

    def changes(self, settings: AdapterConfig, people: int) -> tuple[Changes, list[Tensor]]:
        """Return the changes of an adapter in training for so many people, and what AdamW keeps of its numbers."""
        adapter = settings.bound([0], [0]).build(layout_of(self.base, settings))
        params = {name: torch.empty(people, *shape).requires_grad_() for name, shape in adapter.shapes().items()}
        return adapter.changes(params), [torch.empty_like(p) for p in params.values() for _ in range(2)]

    def denoise(self, rows: int, changes: Changes | None = None, repeat: int = 1) -> None:
        """Run text encoder and UNet on so many rows; with changes that are trained, backward too."""
        base = self.base
        trained = any(x.requires_grad for change in (changes or {}).values() for x in change)
        injection = Injection(base.sites(changes or ()))
        injection.set(changes or {}, repeat=repeat)
        with torch.set_grad_enabled(trained):
            with self.autocast():
                noisy = torch.empty(rows, *base.latent_shape)
                ids = torch.zeros(rows, base.text_encoder.config.max_position_embeddings, dtype=torch.long)
                steps = torch.zeros(rows, dtype=torch.long)
                out = base.unet(noisy, steps, base.text_encoder(ids)[0]).sample.float()
            if trained:
                out.square().mean().backward()
        injection.remove()

    def encode(self) -> None:
        """Run the autoencoder's encoder on as many pictures as it takes at once."""
        size = self.base.config.size
        with torch.no_grad():
            self.base.vae.encode(torch.empty(self.base.pictures_a_pass, 3, size, size))

    def draw(self, pictures: int, changes: Changes | None = None) -> None:
        """Run the UNet on so many pictures, guided; then the autoencoder's decoder.

        With `changes` that are trained, one for each picture, backward through both, all pictures in one pass.
        """
        guide = self.base.config.guide()
        if changes is None:
            self.denoise(len(guide.blocks) * pictures, self.factors(1, 5, trained=False))
            with torch.no_grad():
                self.base.pixels(torch.empty(min(pictures, self.base.pictures_a_pass), *self.base.latent_shape))
            return
        self.denoise(len(guide.blocks) * pictures, changes, repeat=len(guide.blocks))
        latents = torch.empty(pictures, *self.base.latent_shape, requires_grad=True)
        self.base.pixels(latents).square().mean().backward()

    def predict(self, people: int, trained: bool = False) -> Tensor:
        """Run the hypernetwork on so many photos."""
        assert self.hypernet is not None
        size = self.base.config.size
        with torch.set_grad_enabled(trained), self.autocast():
            return self.hypernet(torch.empty(people, 3, size, size, dtype=torch.uint8))

    def begin(self, config: PersonalizerConfig, people: int) -> None:
        """Measure what comes before a training on the photos of so many people: their prediction and encoding."""
        folder = hypernet_folder(config.hypernet, config.default_hypernet, config.diffusion.path)
        path = folder / "hypernet.safetensors" if folder is not None else None
        if (encoder := config.adapter.begins()) is not None:  # then there is no hypernetwork
            path = e4t.require(resolve(encoder))
        if path is not None:
            self.add_hypernet(*header(path, load_metadata(path)))
            with self.measure("prediction"):
                self.predict(people)
        with self.measure("encoding photos"):
            self.encode()

    def train(self, name: str, trained: AdapterConfig | int, people: int, count: int) -> None:
        """Measure a training, as the pass called `name`: of an adapter, or of low-rank factors of so many ranks.

        Each of the people has `count` rows in a pass.
        """
        with self.measure(name):
            if isinstance(trained, int):
                self.denoise(people * count, self.factors(people, trained, trained=True))
            else:
                changes, _optimizer = self.changes(trained, people)  # alive while the pass runs
                self.denoise(people * count, changes)

    def personalize(self, config: PersonalizerConfig, people: int) -> None:
        """Measure what a `Personalizer` does to so many people at once: prediction, then the fast fine-tuning."""
        self.begin(config, people)
        lidb = config.adapter.rank + config.relaxed.rank if isinstance(config.adapter, LiDBConfig) else None
        self.train("fast fine-tuning", config.adapter if lidb is None else lidb, people, rows(config.finetune))


def rows(fit: Any) -> int:
    """Return how many rows a person has in a pass of a fit or of the hypernetwork's training."""
    return fit.levels + (fit.prior_rows if fit.prior_weight > 0 else 0)


def need(passes: Callable[[Any, Sketch], None], config: Any, device: str) -> Need:
    """Return what a stage, whose `passes` these are, would need on a device called `device` (cpu, cuda, mps)."""
    sketch = Sketch(config, device)
    passes(config, sketch)
    modules = []
    for name, module in sketch.modules.items():
        size = stored(module)
        if (kind := config.diffusion.quantise) is not None and name in QUANTISED:
            size -= fewer(module, kind)
        count = sum(p.numel() for p in module.parameters())
        modules.append(Module(name, count, size, sketch.training.get(name, 0)))
    emulated = precision.emulated(device, sketch.dtype)
    what = "CPU" if device == "cpu" else "device"
    dtype = f"fp32, this {what} has no bf16" if emulated else config.diffusion.dtype
    if config.diffusion.quantise is not None:
        dtype += f", the base's linear layers in {config.diffusion.quantise}"
    return Need(device, dtype, modules, sketch.passes, sketch.data)


def text(stage: str, found: Need) -> str:
    """Return the report's lines."""
    lines = [f"{stage} on {found.device} in {found.dtype}; nothing is loaded or written", ""]
    lines += [f"{'network':24}{'parameters':>15}{'weights':>12}{'training':>12}"]
    for m in found.modules:
        trained = f"{m.extra / GIGABYTE:9.2f} GB" if m.extra else ""
        lines += [f"{m.name:24}{m.parameters:15,}{m.bytes / GIGABYTE:9.2f} GB{trained}"]
    lines += ["", f"{'pass':24}{'on top of the weights':>27}"]
    lines += [f"{name:24}{size / GIGABYTE:24.2f} GB" for name, size in found.passes.items()]
    if found.data:
        lines += ["", f"{'data':24}{'pictures':>15}{'in memory':>12}{'latents on disk':>18}"]
    for d in found.data:
        counted = f"{d.pictures:15,}{d.bytes / GIGABYTE:9.2f} GB{d.latents / GIGABYTE:15.2f} GB, {d.people:,} people"
        lines += [f"{d.place:24}{counted if d.pictures else '  not on this disk, not counted'}"]
    heap = "; the C library's heap can take a third more" if found.device == "cpu" else ""
    return "\n".join([*lines, "", f"expected: {found.total / GIGABYTE:.1f} GB, libraries included{heap}"])


def report(stage: str, passes: Callable[[Any, Sketch], None], config: Any) -> None:
    """Print what `stage`, whose `passes` these are, would need on the device it would run on."""
    print(text(stage, need(passes, config, pick_device(config.diffusion.device).type)))
