"""The photos of one person -> a folder with the adapter, what it looks like, and a report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.adapters import kind_of
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import expand, resolve
from hyperdb.runtime.track import Track
from hyperdb.tuning.personalizer import Personalizer, crop_face, to_images
from hyperdb.words import chosen, entries, typed

if TYPE_CHECKING:
    import numpy as np

    from hyperdb.formats.native import Personalization
    from hyperdb.tuning.memory import Sketch
    from hyperdb.tuning.personalizer import PersonalizerConfig

WRITES = (
    *("lidb.safetensors", "adapter.safetensors", "preview.png", "pictures.png", "report.json"),
    "prior.safetensors",
)


def photos(image: str) -> list[str]:
    """Split `[a.jpg,b.jpg]` into its photos; a file that is called so is itself."""
    if Path(image).exists():
        return [image]
    try:
        listed = entries(image)
    except UserError as error:
        raise UserError(f"image={error}: expected a photo, or photos of one person as [a.jpg,b.jpg]") from error
    if listed is not None and not listed:
        raise UserError("image=[]: expected a photo, or photos of one person as [a.jpg,b.jpg]")
    return [expand(one.text) for one in listed] if listed is not None else [image]


def _preview(
    model: Personalizer, crops: np.ndarray, predicted: Personalization, finished: Personalization, out: Path
) -> dict[str, float]:
    """Draw photo, base, prediction, fine-tuned and styles on a sheet, `preview.png`, and return the face cosines.

    These are with the photos. `pictures.png` is the sheet without the photo, which is nobody's to send around.
    """
    from tqdm import tqdm

    from hyperdb.adapters.inject import settled
    from hyperdb.faces.image import grid, save_png
    from hyperdb.metrics.face import SFace
    from hyperdb.metrics.likeness import face_cosine, galleries
    from hyperdb.tuning.draw import draw

    base, seeds = model.base, [0, 1, 2]
    shown = to_images(crops)
    photo = shown[0]
    before = "prediction" if model.start is None else "start"
    instance = [base.config.instance_prompt] * len(seeds)
    changes = finished.changes()
    changes = settled(changes, base.sites(changes))  # drawn with twice
    # else nothing lies under what was trained
    begun = predicted.changes() if model.hypernet is not None or model.start is not None else {}
    with tqdm(total=3 + bool(begun), desc="pictures", dynamic_ncols=True) as bar:
        rows = {
            "base": draw(base, None, 1, [base.config.class_prompt] * len(seeds), seeds, progress=bar.update)[0],
            "fine-tuned": draw(base, changes, 1, instance, seeds, progress=bar.update)[0],
        }
        if begun:
            rows[before] = draw(base, begun, 1, instance, seeds, progress=bar.update)[0]
        styles = model.config.preview_styles
        styled = draw(base, changes, 1, styles, [0] * len(styles), progress=bar.update)[0]
    feature = SFace()
    gallery = galleries(feature, shown[None])
    cosines = {name: round(face_cosine(feature, x[None], gallery).mean().item(), 4) for name, x in rows.items()}
    shown_before = [before] if begun else []
    pictures = [photo, *rows["base"][:1], *(rows[name][0] for name in shown_before), *rows["fine-tuned"], *styled]
    labels = ["photo", "base", *shown_before, *["fine-tuned"] * 3, *styles]
    scale = max(1, 192 // photo.shape[-1])
    pixels = [p.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy() for p in pictures]
    for name, first, synthetic in (("preview.png", 0, "all but the first picture"), ("pictures.png", 1, "yes")):
        text = {"software": "hyperdb", "synthetic": synthetic, "base": base.digest}
        save_png(out / name, grid(pixels[first:], 6, labels=labels[first:]), text)
    return {name: value if value == value else 0.0 for name, value in cosines.items()}


def _made_from(config: PersonalizerConfig) -> dict[str, Any]:
    """Return the settings that decide the result. The adapter's kind is among them; where there is none it is LiDB."""
    from hyperdb.runtime.recipe import recipe

    found = recipe(config)
    if (kind := kind_of(config.adapter)) != "lidb":  # records from before there were other kinds have none
        found["adapter"]["kind"] = kind
    return found


def passes(config: PersonalizerConfig, sketch: Sketch) -> None:
    """Measure prediction, fine-tuning and preview of one photo."""
    sketch.personalize(config, people=1)
    if config.preview:
        with sketch.measure("drawing"):
            sketch.draw(max(len(config.preview_styles), 3))


def personalize(
    config: PersonalizerConfig,
    model: Personalizer | None = None,
    report_to: Callable[[str, int, int, float | None], object] | None = None,
    track: Track | None = None,
) -> Path:
    """Write `lidb.safetensors`, `adapter.safetensors`, `preview.png`, `pictures.png` and `report.json` to `out`.

    Without a hypernetwork, with a start or with an adapter other than LiDB, there is no prediction to keep as
    `lidb.safetensors`. Who has a `model`
    of these settings in memory gives it. `report_to` is told the phase that begins ("photo", "prediction") and each
    iteration of the "fine-tuning": the phase, iterations done, of how many, the loss or None. `track` is told losses
    and rates, and the face cosine and the pictures of the preview.
    """
    import numpy as np
    from tqdm import tqdm

    from hyperdb.formats.native import find_adapter
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.optim import Schedule
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.threads import Watch, spared

    watch = Watch()
    clock, seconds = time.perf_counter(), {}
    tell, track = report_to or (lambda phase, done, of, loss: None), track or Track()

    def lap(phase: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[phase] = round(now - clock, 3)
        clock = now

    start = None if config.start is None else find_adapter(config.start)  # before the photo is searched
    tell("photo", 0, 1, None)
    crops = np.stack([crop_face(one, config) for one in photos(config.image)])
    lap("crop")
    model = model or Personalizer(config)
    weights = None if model.folder is None else hash_files([model.folder / "hypernet.safetensors"])
    begun = None if start is None else hash_files([start])
    contents = {"base": model.base.digest, "hypernet": weights, "start": begun}
    encoder = config.adapter.begins()
    contents["encoder"] = None if encoder is None else hash_files([resolve(encoder)])
    contents["photos"] = hashlib.sha256(crops.tobytes()).hexdigest()
    out = claim(config.out, WRITES, {**_made_from(config), **contents})
    lap("load")
    with spared(watch, model.base.device):
        tell("prediction", 0, 1, None)
        tokens = model.predict(crops)
        lap("predict")
        tuning = model.tuning(len(crops))
        schedule = Schedule(tuning.steps, tuning.warmup, tuning.decay)
        with tqdm(total=tuning.steps, desc="fast fine-tuning", dynamic_ncols=True) as bar:
            tell("fine-tuning", 0, bar.total, None)

            def progress(step: int, loss: float) -> None:
                bar.update(1)
                bar.set_postfix_str(f"loss {loss:.4f}")
                tell("fine-tuning", step, bar.total, loss)
                track.log(step, {"loss": loss, "rate": tuning.rate * schedule(step - 1)})

            params = model.finetune(crops, tokens, progress)
        lap("finetune")
        predicted, finished = model.wrap(tokens), model.wrap(tokens, params)
        written = [finished.save(out / "adapter.safetensors")]
        if model.hypernet is not None and model.start is None and tokens is not None:
            written.insert(0, predicted.save_lidb(out / "lidb.safetensors"))
        report: dict[str, Any] = {"image": config.image, "hypernet": config.hypernet, "start": config.start}
        report |= {} if encoder is None else {"encoder": encoder}
        report |= {"base": model.base.digest, "bytes": {path.name: path.stat().st_size for path in written}}
        lap("save")
        if config.preview:
            report["face_cosine_to_photo"] = cosines = _preview(model, crops, predicted, finished, out)
            track.log(tuning.steps, {f"face_cosine/{name}": value for name, value in cosines.items()})
            track.picture(tuning.steps, "pictures", out / "pictures.png")
            lap("preview")
    save_json(out / "report.json", {**report, "seconds": seconds, **provenance()})
    total = sum(seconds.values())
    print(f"{out / 'adapter.safetensors'} in {total:.1f} s (prediction {seconds['predict']:.2f} s, "
          f"fine-tuning {seconds['finetune']:.1f} s)")  # fmt: skip
    if config.preview:
        print(f"pictures: {out / 'preview.png'}")
    base = chosen("diffusion", config.diffusion)
    print(f"next: hyperdb generate {typed('adapter', out)} prompt='a pencil sketch of a [V] face'{base}")
    return out
