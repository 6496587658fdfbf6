"""Draw pictures of a personalised face, or of the base alone.

    hyperdb generate adapter=runs/personalize/ada prompt='a pencil sketch of a [V] face' num_images=8

Writes `00000.png` ..., `grid.png` (the first 64) and `manifest.json` into `out`. Picture i is a function of
seed + i, whatever the batch. Every PNG says what made it, so running the command again draws only what is
missing. Nothing else is replaced: where other pictures are, the numbers begin after them, and grid and manifest
are called after the first one's (`grid-00008.png`).
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import PLACEHOLDER, DiffusionConfig
from hyperdb.diffusion.guidance import Guidance
from hyperdb.runtime.errors import NonFiniteError, UserError
from hyperdb.runtime.paths import FilePath

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hyperdb.adapters.inject import Injection
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.xadapter import XAdapter
    from hyperdb.tuning.memory import Sketch

# A smaller vocabulary was made word by word, so a word it must spell was in no caption. CLIP's 49,408 tokens
# spell many a word that it knows well.
SMALL_VOCABULARY = 10_000
IN_GRID = 64
FAR = 3.0  # a strength beyond which faces fall apart
KEPT = "finished pictures are kept"


@dataclass(kw_only=True)
class Config:
    """What to draw, and of whom.

    `[V]` in a prompt stands for the person; without `adapter` it is a rare word that means nobody. Picture i is made
    from the noise of `seed` + i, so that it does not depend on `batch` or on how many pictures are drawn.

    Two guidances can be set apart. `guidance` is the usual classifier-free guidance towards the prompt.
    `subject_guidance` is from anybody towards this person (hybrid guidance, `hyperdb.diffusion.guidance`). Where a
    setting is null, the base's own value in `diffusion` is used.

    With `xadapter`, of `hyperdb train_xadapter`, the adapter is one of another base, `old`, which steers the one in
    `diffusion`. Then two UNets and text encoders are in memory and run at every step.
    """

    diffusion: DiffusionConfig
    adapter: FilePath | None = None  # file or folder that `hyperdb personalize` wrote; null: draw with the base alone
    xadapter: FilePath | None = None  # file or folder of `hyperdb train_xadapter`; null: the adapter is the base's own
    old: FilePath | None = None  # the old base of `xadapter`; null: where it was when that was trained
    old_variant: str | None = None  # of the files of `old`, such as fp16
    prompt: str = "a photo of a [V] face"
    negative_prompt: str = ""  # what guidance leads away from, in place of the empty prompt
    num_images: int = 8
    strength: float = 1.0  # factor on the adapter's change: 0 is the base, 1 the person as trained
    steps: int | None = None  # of the sampler; null: diffusion.steps
    guidance: float | None = None  # 1 is without guidance; null: diffusion.guidance
    subject_guidance: float | None = None  # null: diffusion.subject_guidance
    scheduler: str = "ddim"  # ddim, dpm, euler, pndm or unipc
    seed: int = 0
    batch: int = 8  # pictures drawn in one pass: more need more memory and look the same
    name: str = "default"
    out: FilePath = "runs/generate/default"
    dry_run: bool = False  # load nothing: say which networks would be loaded, where, and in how much memory

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= 10_000:
            raise UserError(f"num_images={self.num_images}: expected 1 to 10000")
        if not -(2**63) <= self.seed <= 2**64 - self.num_images:
            raise UserError(
                f"seed={self.seed} num_images={self.num_images}: picture i has seed + i, which must lie in -2**63 to "
                "2**64 - 1"
            )
        if self.batch < 1:
            raise UserError(f"batch={self.batch}: expected at least 1")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise UserError(f"steps={self.steps}: expected 1 to 1000, or null for the base's own")
        if self.xadapter is None and self.old is not None:
            raise UserError(f"old={self.old} is the base of an xadapter, and none is given: set xadapter=FOLDER")
        if self.xadapter is not None and self.dry_run:
            raise UserError("dry_run counts one base, and xadapter runs two; leave out one of them")
        for name in ("strength", "guidance", "subject_guidance"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name}={value}: expected a finite number")
        for name in ("prompt", "negative_prompt"):
            if re.search(r"[\x00\ud800-\udfff]", getattr(self, name)):  # the shell's bytes if not UTF-8
                raise UserError(f"{name} has characters that are not text; type it again")


# --- the person --------------------------------------------------------------------------------------


def _load(config: Config, base: Base | None) -> tuple[Base, Path | None, list[Injection | XAdapter]]:
    """Read adapter and, unless it is given, base, the cheap and likely errors first, and put the adapter on.

    Returns also what has to be taken off the base again.
    """
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.sample import SCHEDULERS
    from hyperdb.diffusion.xadapter import find, header

    if config.scheduler not in SCHEDULERS:
        raise UserError(f"scheduler={config.scheduler!r}: expected one of {', '.join(sorted(SCHEDULERS))}")
    if config.xadapter is not None:
        header(find(config.xadapter))  # which checks them, before a base is loaded
    if config.adapter is None:
        base = base or Base.load(config.diffusion)
        steering = _steering(config, base)
        return base, None, [steering] if steering is not None else []

    from hyperdb.formats.native import Personalization, find_adapter

    file = find_adapter(config.adapter)
    person = Personalization.load(file)
    settings = config.diffusion
    if person.rare_token != settings.rare_token:
        warnings.warn(
            f"{PLACEHOLDER} stands for {person.rare_token!r}, the adapter's own, not for "
            f"diffusion.rare_token={settings.rare_token!r}",
            stacklevel=2,
        )
    settings = replace(settings, rare_token=person.rare_token, class_word=person.class_word)
    base = base or Base.load(settings)  # the words for a person, of an imported LoRA say, may be any
    steering = _steering(config, base)
    injection = person.apply(base if steering is None else steering.old, config.strength)
    injection.plain = guide(config).plain
    return base, file, [injection, steering] if steering is not None else [injection]


def _steering(config: Config, new: Base) -> XAdapter | None:
    """Return the old base of `config.xadapter` on the new one; None for none."""
    if config.xadapter is None:
        return None
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.xadapter import Mapper, XAdapter, find, header

    file = find(config.xadapter)
    told = header(file)
    path, variant, revision = told["old_path"], told.get("old_variant") or None, told.get("old_revision") or None
    if config.old is not None:
        path, variant, revision = config.old, config.old_variant, None
    old = Base.load(replace(new.config, path=path, variant=variant, revision=revision))
    return XAdapter(old, new, Mapper.load(file, old, new))


def guide(config: Config) -> Guidance:
    """Return the guidance asked for; hybrid needs a person."""
    own = config.diffusion.guide(config.adapter is not None)
    text = own.text if config.guidance is None else config.guidance
    subject = own.subject if config.adapter is None or config.subject_guidance is None else config.subject_guidance
    return Guidance(text, subject)


# --- the words ---------------------------------------------------------------------------------------


def notices(config: Config, base: Base) -> list[str]:
    """Say what of the request has no or little effect."""
    from hyperdb.formats.native import find_adapter, places

    found, guidance = [], guide(config)
    vectors = 1 if config.adapter is None else places(find_adapter(config.adapter))
    for name in ("prompt", "negative_prompt"):
        prompt = getattr(config, name)
        if cut := base.unseen(prompt, vectors):
            limit = base.tokenizer.model_max_length
            of = f", of which {PLACEHOLDER} takes {vectors}" if vectors > 1 and base.says_person(prompt) else ""
            found.append(f"{name} is longer than {limit} tokens{of}; the base does not see: {cut}")
        others = prompt.replace(PLACEHOLDER, "")  # the adapter taught it the words for the person
        unknown = base.unknown_words(others) if len(base.tokenizer) < SMALL_VOCABULARY else []
        if unknown:
            words = ", ".join(unknown)
            found.append(f"{name} has words that this base was never taught and cannot draw: {words}")
    if config.negative_prompt and guidance.text == 1:
        found.append("negative_prompt has no effect at guidance=1")
    if config.adapter is not None and abs(config.strength) > FAR:
        found.append(f"strength={config.strength:g} is far from 1, the adapter as trained: expect no picture of a face")
    if config.adapter is None and config.strength != 1:
        found.append(f"strength={config.strength} has no effect without adapter")
    if config.adapter is None and config.subject_guidance is not None:
        found.append(f"subject_guidance={config.subject_guidance} has no effect without adapter")
    if config.adapter is not None and PLACEHOLDER not in config.prompt and not base.says_person(config.prompt):
        found.append(
            f"prompt has neither {PLACEHOLDER}, the word for the person, nor {base.config.rare_token!r}: "
            "expect less likeness"
        )
    return found


# --- the pictures ------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _recipe(config: Config, base: Base, adapter: Path | None, steps: int, guidance: Guidance) -> dict[str, Any]:
    """Return all that decides the pixels, but the seed."""
    from hyperdb.diffusion.xadapter import find
    from hyperdb.runtime.version import __version__

    return {
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        "rare_token": base.config.rare_token,
        "base": base.config.path,
        "base_digest": base.digest,
        "adapter_digest": None if adapter is None else _digest(adapter),
        "strength": config.strength,
        "scheduler": config.scheduler,
        "steps": steps,
        "guidance": guidance.text,
        "subject_guidance": guidance.subject,
        "size": base.config.size,
        "dtype": base.config.dtype,
        **({} if base.config.quantise is None else {"quantise": base.config.quantise}),
        **({} if config.xadapter is None else {"xadapter_digest": _digest(find(config.xadapter))}),
        "software": f"hyperdb {__version__}",
        "synthetic": True,
    }


def _text(recipe: dict[str, Any], **more: Any) -> dict[str, str]:
    """Write a recipe as PNG text, in which a missing value is "none" and True is "true"."""
    merged = {**recipe, **more}
    return {k: "none" if v is None else "true" if v is True else str(v) for k, v in merged.items()}


def _is_made(path: Path, text: dict[str, str]) -> bool:
    """Whether a whole picture of this very recipe is there."""
    from hyperdb.faces.image import read_image, read_text

    if not path.is_file() or read_text(path) != text:
        return False
    try:
        read_image(path)
    except UserError:  # cut short by a full disk, say: draw it again
        return False
    return True


def _numbers(out: Path) -> dict[int, Path]:
    """Return the pictures of a folder that are called by a number."""
    return {int(path.stem): path for path in out.glob("*.png") if re.fullmatch(r"\d{5,}", path.stem)}


def _about(out: Path, first: int) -> tuple[Path, Path]:
    """Return where grid and manifest of the pictures from number `first` on stand."""
    which = f"-{first:05d}" if first else ""
    return out / f"grid{which}.png", out / f"manifest{which}.json"


def first_number(out: Path, recipe: dict[str, Any], texts: list[dict[str, str]]) -> int:
    """Return the number that the first picture gets: all from there on are free, or this run's own.

    `texts` are what the pictures say. Nothing that says something else is ever replaced.
    """
    from hyperdb.faces.image import read_text
    from hyperdb.runtime.files import load_json
    from hyperdb.runtime.recipe import plain

    said = {number: read_text(path) for number, path in _numbers(out).items()}

    def is_mine(first: int) -> bool:
        picture, manifest = _about(out, first)
        if picture.exists() and read_text(picture) != texts[0]:
            return False
        try:
            listed = load_json(manifest) if manifest.exists() else recipe
        except UserError:
            return False
        return isinstance(listed, dict) and plain(recipe).items() <= listed.items()

    index = {frozenset(text.items()): i for i, text in enumerate(texts)}
    known = {number: index.get(frozenset(text.items())) for number, text in said.items()}
    begun = {number - i for number, i in known.items() if i is not None and number > i}
    for first in (0, *sorted(begun)):
        if is_mine(first) and all(known.get(first + i, i) == i for i in range(len(texts))):
            return first
    beyond = max(said, default=-1) + 1
    while not is_mine(beyond):
        beyond += 1
    return beyond


def _draw(config: Config, base: Base, seeds: list[int], steps: int, guidance: Guidance) -> NDArray[np.uint8]:
    """Return pictures [B, H, W, 3], one a seed."""
    from hyperdb.diffusion.sample import sample, start_noise

    try:
        latents = sample(
            base,
            [config.prompt] * len(seeds),
            start_noise(base, seeds),
            steps,
            guidance.text,
            config.negative_prompt,
            config.scheduler,
            subject_guidance=guidance.subject,
        )
        pictures = base.decode(latents)
    except NonFiniteError as error:
        if config.adapter is None:
            raise
        raise NonFiniteError(f"adapter={config.adapter} strength={config.strength}: {error}") from error
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()  #              [B, 3, H, W] -> [B, H, W, 3]


def passes(config: Config, sketch: Sketch) -> None:
    """Measure the drawing of one batch."""
    with sketch.measure("drawing"):
        sketch.draw(min(config.batch, config.num_images))


def run(config: Config, base: Base | None = None, progress: Callable[[int, int], object] | None = None) -> Path:
    """Draw what is missing and return the folder.

    Who has a `base` in memory, of the adapter's words for a person, gives it, gets it back as it was, and asks for the
    `notices` himself. `progress` is told how many steps of the sampler are done, and of how many.
    """
    from tqdm import tqdm

    from hyperdb.faces.image import grid, read_image, save_png
    from hyperdb.runtime.files import save_json
    from hyperdb.runtime.output import check
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.threads import Watch, spared

    watch, out, given = Watch(), check(config.out), base is not None
    base, adapter, applied = _load(config, base)
    try:
        steps = base.config.steps if config.steps is None else config.steps
        guidance = guide(config)
        for notice in () if given else notices(config, base):
            warnings.warn(notice, stacklevel=2)

        # --- draw
        recipe = _recipe(config, base, adapter, steps, guidance)
        seeds = [config.seed + i for i in range(config.num_images)]
        texts = [_text(recipe, seed=seed) for seed in seeds]
        first = first_number(out, recipe, texts)
        paths = [out / f"{first + i:05d}.png" for i in range(config.num_images)]
        grid_path, manifest_path = _about(out, first)
        missing = [i for i, path in enumerate(paths) if not _is_made(path, texts[i])]
        batches = [missing[i : i + config.batch] for i in range(0, len(missing), config.batch)]
        with tqdm(total=len(batches) * steps, desc="generate", unit="step", delay=2, dynamic_ncols=True) as bar:

            def count(*_: object) -> None:
                bar.update()
                if progress is not None:
                    progress(bar.n, bar.total)

            counter = base.unet.register_forward_hook(count)
            try:
                with spared(watch, base.device):
                    for batch in batches:
                        pictures = _draw(config, base, [seeds[i] for i in batch], steps, guidance)
                        manifest_path.unlink(missing_ok=True)  # it would speak of other pictures
                        for i, picture in zip(batch, pictures, strict=True):
                            save_png(paths[i], picture, texts[i])
            finally:
                counter.remove()
    finally:
        for one in applied:
            one.remove()

    # --- look at it, list it
    shown = [read_image(path) for path in paths[:IN_GRID]]
    columns = min(8, math.ceil(math.sqrt(len(shown))))
    save_png(grid_path, grid(shown, columns), _text(recipe, seed=config.seed))
    files = [{"file": path.name, "seed": seed} for path, seed in zip(paths, seeds, strict=True)]
    save_json(
        manifest_path,
        {
            **recipe,
            "adapter": None if adapter is None else str(adapter),
            "pictures": files,
            "provenance": provenance(),
        },
    )
    others = len(_numbers(out)) - len(paths)
    kept = f" ({len(paths) - len(missing)} were there)" if len(missing) < len(paths) else ""
    print(f"{len(paths)} pictures in {out}{kept}; side by side in {grid_path}")
    if others:
        print(f"{out} also holds {others} other pictures; {manifest_path.name} lists this run's")
    return out
