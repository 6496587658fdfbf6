"""A base and its hypernetwork, loaded once: photos of a face in, an adapter out (paper sections 4.2 and 4.3)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hyperdb.adapters import AdapterConfig, LiDBConfig, LoRAConfig, TokenConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.prior import Prior, PriorConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hyperdb.adapters.base import Adapter, Changes
    from hyperdb.adapters.layout import Layout
    from hyperdb.diffusion.base import Base
    from hyperdb.formats.native import Personalization
    from hyperdb.hypernet.e4t import E4TEncoder
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.tuning.fit import Begin

    Picture = str | Path | np.ndarray
    Network = TypeVar("Network", bound=Hypernet)


@dataclass(kw_only=True)
class PersonalizerConfig:
    """How a person is personalised: the settings that every stage which does so has.

    `adapter` says what is learned of the person. LiDB is the paper's: the hypernetwork predicts it from the photo, and
    the fast fine-tuning trains low-rank factors, `relaxed`, on top of the prediction. No hypernetwork predicts any
    other adapter, so it is trained on the photo from nothing; E4T begins where its `adapter.encoder` says. In each case
    `finetune` says how the training goes, and `prior` which class pictures it keeps as the base draws them.

    `hypernet` is the folder of a trained hypernetwork. `default` means the one that belongs to the base, and null means
    none. Without a hypernetwork the training begins at nothing, or at the adapter that `start` names.
    """

    image: FilePath = "???"  # the photo, in any common format
    name: str = "default"
    out: FilePath = "runs/personalize/default"
    hypernet: FilePath | None = "default"
    default_hypernet: FilePath | None  # folder that `hypernet=default` means; null: the base has no hypernetwork
    start: FilePath | None = None  # file or folder of an adapter that takes the place of the prediction
    face: int | None = None  # which face of the photo, 1 is the largest; null: the largest, with a notice of others
    align: bool = True  # find the face and crop it as FFHQ does; false: the picture is such a crop already
    preview: bool = True  # draw the person in `preview_styles`, as a check by eye
    preview_styles: list[str] = field(
        default_factory=lambda: [
            "a pencil sketch of a [V] face",
            "a cartoon of a [V] face",
            "an oil painting of a [V] face",
            "a clay sculpture of a [V] face",
            "a bronze statue of a [V] face",
            "a watercolour painting of a [V] face",
        ]
    )
    diffusion: DiffusionConfig
    adapter: AdapterConfig
    relaxed: LoRAConfig = field(default_factory=LoRAConfig)
    finetune: FitConfig
    prior: PriorConfig
    seed: int = 0
    dry_run: bool = False  # load nothing: say which networks would be loaded, where, and in how much memory

    def __post_init__(self) -> None:
        if self.start is not None:
            if self.hypernet not in (None, "default"):
                raise UserError(
                    f"start={self.start} takes the place of the prediction of hypernet={self.hypernet}; leave out one"
                )
            self.hypernet = None
            if isinstance(self.adapter, TokenConfig):
                raise UserError(
                    f"start={self.start}: an adapter that trains the word's vector begins at the class word, not at "
                    "another adapter; leave out start, or choose one that changes layers alone, as adapter=lora"
                )
        if not isinstance(self.adapter, LiDBConfig):
            if self.hypernet not in (None, "default"):
                raise UserError(f"hypernet={self.hypernet} predicts LiDB, which this adapter is not; set hypernet=null")
            self.hypernet = None


def hypernet_folder(hypernet: str | None, default: str | None, base: str) -> Path | None:
    """Return the folder of the hypernetwork asked for, None for none; `default` is that of the base called `base`.

    Raises `UserError` if there is no such.
    """
    name = default if hypernet == "default" else hypernet
    if name is None and hypernet is not None:
        raise UserError(
            f"no hypernetwork is known for the base {base}: train one with "
            "`hyperdb train_hypernet` and set hypernet=FOLDER, or run the fast fine-tuning alone with hypernet=null"
        )
    folder = resolve(name) if name is not None else None
    if folder is not None and not (folder / "hypernet.safetensors").is_file():
        raise UserError(f"no hypernetwork at {folder}; set hypernet=FOLDER or hypernet=null")
    return folder


def _for_base(model: Network, what: str, base: Base, layout: Layout) -> Network:
    layout.require(model.lidb.layout, what)
    trained_on = model.metadata.get("base")
    if trained_on and trained_on != base.digest:
        warnings.warn(
            f"{what} was trained on base {trained_on}, this is {base.digest}: expect less likeness", stacklevel=4
        )
    model.lidb.to(base.device)  # whose mask and bases are not the network's
    return model.to(base.device)


def load_hypernet(folder: Path, base: Base, layout: Layout) -> Hypernet:
    """Read a hypernetwork for a base; one that was trained on another is warned of."""
    from hyperdb.hypernet.model import Hypernet

    return _for_base(Hypernet.load(folder / "hypernet.safetensors"), f"the hypernetwork {folder}", base, layout)


def load_encoder(file: str, base: Base, layout: Layout) -> E4TEncoder:
    """Read an encoder of E4T for a base; one that was trained on another is warned of."""
    from hyperdb.hypernet.e4t import E4TEncoder

    return _for_base(E4TEncoder.load(resolve(file)), f"the encoder {file}", base, layout)


class Personalizer:
    """A base and its hypernetwork, loaded once: `personalize(image)` as often as you like."""

    def __init__(self, config: PersonalizerConfig) -> None:
        from hyperdb.adapters.layout import Layout
        from hyperdb.diffusion.base import Base
        from hyperdb.diffusion.targets import base_hash
        from hyperdb.formats.native import Personalization, find_adapter
        from hyperdb.tuning.trainable import trainable

        self.start = Personalization.load(find_adapter(config.start)) if config.start is not None else None
        if self.start is not None:
            words = {key: getattr(self.start, key) for key in ("rare_token", "class_word")}
            config = replace(config, diffusion=replace(config.diffusion, **words))
        self.config = config
        self.folder = folder = hypernet_folder(config.hypernet, config.default_hypernet, config.diffusion.path)
        # the start's words for a person, of an imported LoRA say, may be any
        self.base: Base = config.diffusion.load() if self.start is None else Base.load(config.diffusion)
        self.layout = Layout.of(self.base.targets())
        self.base_hash = base_hash(self.base.targets())
        self.hypernet = load_hypernet(folder, self.base, self.layout) if folder is not None else None
        empty = config.adapter if isinstance(config.adapter, LiDBConfig) else LiDBConfig()
        self.lidb = empty.build(self.layout)
        if self.hypernet is not None:
            self.hypernet.require(self.lidb, str(folder))
            self.lidb = self.hypernet.lidb
        if self.start is not None:
            self.layout.require(self.start.layout, self.start.source)
            if self.start.base not in ("", self.base_hash):
                warnings.warn(
                    f"{self.start.source} was made for base {self.start.base}, this is {self.base_hash}: expect less "
                    "likeness", stacklevel=2,
                )  # fmt: skip
            self.lidb = self.start.config.build(self.layout)
        self.lidb.to(self.base.device)
        # what the fine-tuning trains, its settings and itself: LiDB's relaxed factors, or another adapter
        self.learned: AdapterConfig
        self.trainable: Adapter
        if isinstance(config.adapter, LiDBConfig):
            self.learned, self.trainable = config.relaxed, config.relaxed.build(self.layout)
        else:
            self.learned, self.trainable = trainable(self.base, config.adapter)
        self._encoders: dict[str, E4TEncoder] = {}  # by the settings that name them
        if config.adapter.begins() is not None:  # what is wrong with its file is said before the photo
            self.encoder(config.adapter)

    @cached_property
    def prior(self) -> Prior | None:
        """What the fast fine-tuning keeps as it is; made on first use, as it may be drawn and written to `out`."""
        from hyperdb.tuning.prior import load_prior

        config = self.config
        if config.finetune.prior_weight <= 0:
            return None
        known = self.folder or (resolve(config.default_hypernet) if config.default_hypernet else None)
        shipped = known / "prior.safetensors" if known is not None else None
        return load_prior(self.base, config.prior, Path(config.out) / "prior.safetensors", shipped)

    def crop(self, image: str | Path | np.ndarray) -> np.ndarray:
        """Read, detect, align and crop one face: `[size, size, 3]` uint8. Raises `UserError` naming the file."""
        return crop_face(image, self.config)

    def predict(self, crops: np.ndarray) -> Tensor | None:
        """Return tokens `[1, N, D]`, the mean over one person's crops `[V, size, size, 3]` or of the only one.

        Without a hypernetwork those of the start, or the empty template; None for an adapter that has no such numbers.
        """
        import torch

        if self.start is not None:
            return None if self.start.tokens is None else self.start.tokens[None].to(self.base.device)
        if not isinstance(self.config.adapter, LiDBConfig):
            return None
        if self.hypernet is None:
            return self.lidb.init(1)["tokens"]
        with torch.no_grad(), self.base.autocast():
            return self.hypernet(to_images(crops)).mean(0, keepdim=True)

    def encoder(self, settings: AdapterConfig) -> E4TEncoder:
        """Return E4T's encoder, of the file that settings name, for the places that they change; it is read once.

        Raises `UserError` for one that was trained near another word than the one that the settings begin at.
        """
        from hyperdb.tuning.trainable import trainable

        if (asked := repr(settings)) not in self._encoders:
            file, (learned, adapter) = str(settings.begins()), trainable(self.base, settings)
            read = load_encoder(file, self.base, adapter.layout)
            found, begun = (getattr(which, "start", None) for which in (read.lidb.config, learned))
            if begun is not None and found != begun:
                raise UserError(
                    f"{file} predicts words near token {found}, and this training begins at token {begun}: leave out "
                    "adapter.start and diffusion.class_word, or train an encoder with them"
                )
            self._encoders[asked] = read
        return self._encoders[asked]

    def begin(self, settings: AdapterConfig | None, photos: Tensor) -> Begin | None:
        """Return where an adapter of these settings begins by E4T's encoder, if they name one.

        `photos` are `[I, V, 3, H, W]` uint8. A person's word is the mean over theirs.
        """
        import torch

        from hyperdb.tuning.fit import Begin

        if settings is None or settings.begins() is None:
            return None
        with torch.no_grad(), self.base.autocast():
            begun = self.encoder(settings).begin(photos.flatten(0, 1))
        vector = begun.pop("vector").unflatten(0, photos.shape[:2]).mean(1)
        shared = {name: value.expand(len(photos), -1) for name, value in begun.items()}
        return Begin({"vector": vector, **shared}, {})

    def tuning(self, photos: int) -> FitConfig:
        """Return the fine-tuning of so many photos: in the iterations of one, two are less like the person.

        `seed` is added to that of the fine-tuning: another one is another stream of noise.
        """
        config = self.config.finetune
        return replace(config, steps=config.steps * photos, seed=config.seed + self.config.seed)

    def finetune(self, crops: np.ndarray, tokens: Tensor | None, progress: Any = None) -> dict[str, Tensor]:
        """Train what is `trainable`, on top of the prediction if any (paper section 4.3), on crops as in `predict`.

        Takes the iterations of `tuning`. With a start it is the whole of that which lies under what is trained.
        """
        from hyperdb.adapters.base import moved
        from hyperdb.tuning.fit import fit

        images = to_images(crops)
        config = self.tuning(len(images))
        moments = self.base.moments(config.sides(images))[None]  #                    [1, V, 2, c, h, w]
        begun: Changes = {}
        if self.start is not None:
            begun = self.start.changes()
        elif tokens is not None:
            begun = self.lidb.factors({"tokens": tokens})
        frozen = moved(begun, self.base.device)
        begin = self.begin(self.config.adapter, images[None])
        return fit(self.base, self.trainable, moments, config, frozen, self.prior, progress, begin)

    def wrap(self, tokens: Tensor | None, params: dict[str, Tensor] | None = None) -> Personalization:
        """Make the file's object of tokens and what the fine-tuning trained, beside what the start has."""
        from hyperdb.adapters.base import concatenate, moved
        from hyperdb.formats.native import Part, Personalization

        words, start = self.config.diffusion, self.start
        relaxed, parts = ([start.relaxed], list(start.parts)) if start is not None else ([], [])
        if params is not None and isinstance(self.config.adapter, LiDBConfig):
            relaxed.append(moved(self.trainable.changes(params), "cpu"))
        elif params is not None:
            parts.append(Part(self.learned, self.trainable.layout, params))
        return Personalization(
            self.layout, None if tokens is None else tokens[0].cpu(), self.lidb.config, self.base_hash,
            words.rare_token, words.class_word, concatenate(*filter(None, relaxed)),
            "" if start is None else start.fingerprint, parts,
        )  # fmt: skip

    def personalize(self, image: Picture | list[Picture], finetune: bool = True) -> Personalization:
        """Return the adapter of one photo, or of several of one person: prediction, then the fast fine-tuning.

        `finetune=False` stops at the prediction. On a CPU it takes no more threads than cores are free.
        """
        import numpy as np

        from hyperdb.runtime.threads import Watch, spared

        watch = Watch()
        crops = np.stack([self.crop(one) for one in (image if isinstance(image, list | tuple) else [image])])
        with spared(watch, self.base.device):
            tokens = self.predict(crops)
            return self.wrap(tokens, self.finetune(crops, tokens) if finetune else None)

    def pipeline(self) -> Any:
        """Return the base as diffusers' `StableDiffusionPipeline`, with hybrid guidance on top, float32.

        UNet and text encoder are its own copies: an adapter applied to it touches no other pipeline, and no later
        `personalize`.
        """
        import copy

        from diffusers import DDIMScheduler

        from hyperdb.formats.pipeline import HybridPipeline

        base = self.base
        text_encoder, unet = (copy.deepcopy(part).float() for part in (base.text_encoder, base.unet))
        return HybridPipeline(
            base.vae, text_encoder, base.tokenizer, unet, DDIMScheduler.from_config(base.schedule.config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def to_images(crops: np.ndarray) -> Tensor:
    """Return one crop `[size, size, 3]` or several `[V, size, size, 3]` as images `[V, 3, size, size]`."""
    import torch

    return torch.from_numpy(crops.reshape(-1, *crops.shape[-3:])).permute(0, 3, 1, 2)


def crop_face(image: str | Path | np.ndarray, config: PersonalizerConfig) -> np.ndarray:
    """Return the aligned face of a picture, `[size, size, 3]` uint8; notices go to standard output."""
    from hyperdb.faces.align import face_crop
    from hyperdb.faces.image import as_image, read_image

    if isinstance(image, str | Path):
        name, rgb = str(image), read_image(image)
    else:
        name, rgb = "the picture", as_image(image)
    crop, notice = face_crop(rgb, config.diffusion.size, config.diffusion.crop, config.face, name, config.align)
    if notice:
        print(notice)
    return crop
