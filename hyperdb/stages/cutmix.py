"""Train one adapter on two people, to draw them side by side (Cut-Mix-Unmix: SVDiff, Han et al. 2023, section 3.3).

    hyperdb cutmix images=[ada.jpg,bob.jpg] name=both
    hyperdb cutmix images=[ada.jpg,bob.jpg] others=[eva.jpg,dan.jpg] compare=true name=both

`[V]` and `second` are the words of the two. A share `mix` of what is trained on are pictures of both, put side by side,
under `prompt`; so it is of the class pictures. There the attention to each person's word is held to that person's half,
with the weight `unmix`. Afterwards pictures of the two are drawn, and `report.json` says how many of their halves show
the right person.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.adapters import AdapterConfig, TokenConfig, kind_of
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.runtime.track import Track, check_tracker, tracked
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.prior import PriorConfig
from hyperdb.words import chosen, typed

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.base import Changes
    from hyperdb.diffusion.base import Base

WRITES = ("adapter.safetensors", "pictures.png", "pictures_mixed.png", "prior.safetensors", "report.json")


@dataclass(kw_only=True)
class Config:
    """Which two people, what is trained for them, and what is drawn to see it.

    `adapter` may be any but those of a single word's vector (`textual_inversion`, `custom_diffusion`): the people are
    told apart by words that the base has already. `finetune.steps` iterations are made for each person.

    In `prompt` the one on the left is `[V1]` and the one on the right `[V2]`, before the class word. It is used in
    both orders. The share of mixed pictures is the paper's. The weight of the regulariser is not tuned: at 20 its
    gradient is a quarter to all as long as that of the denoising, at the start on the embedded base.

    Half of the pictures are drawn in either order. A half of a picture is recognised among the two people and `others`,
    by SFace and one photo of each: of `judged`, which the adapter has not seen, or the given ones. The photos
    themselves, put side by side through the autoencoder, are judged too: better no picture can be. With `compare`
    another adapter is trained without the regulariser, in the same time again, and measured too.
    """

    images: list[FilePath] = "???"  # type: ignore[assignment]
    """photos of the two people"""
    others: list[FilePath] = field(default_factory=list)  # photos of other people, one each
    judged: list[FilePath] = field(default_factory=list)  # other photos of those people, in the same order
    align: bool = True  # find the faces and crop them as FFHQ does; false: the pictures are such crops already
    second: str = "q"  # word of the second person, one token of the base; the first one's is diffusion.rare_token
    prompt: str  # of both people
    mix: float = 0.6  # share of the rows that show both
    unmix: float = 20.0  # weight of the regulariser on the attention; 0 is without
    compare: bool = False  # train without the regulariser too
    num_images: int = 16  # that are drawn and measured
    diffusion: DiffusionConfig
    adapter: AdapterConfig
    finetune: FitConfig
    prior: PriorConfig
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    name: str = "default"
    out: FilePath = "runs/cutmix/default"

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        if not 0 <= self.mix < 1:
            raise UserError(f"mix={self.mix}: expected a share from 0 to below 1")
        if self.unmix < 0 or (self.compare and not self.unmix):
            raise UserError(f"unmix={self.unmix}: expected a weight, at least 0, and above 0 with compare=true")
        if not 2 <= self.num_images <= 1000:
            raise UserError(f"num_images={self.num_images}: expected 2 to 1000")
        of_one = {"face_weight": "0", "masked_prior": "0", "flips": "false", "instance_prompt": "null"}
        if odd := [f"finetune.{name}={off}" for name, off in of_one.items() if getattr(self.finetune, name)]:
            raise UserError(f"{', '.join(x.partition('=')[0] for x in odd)}: is for one person; set {' '.join(odd)}")
        if isinstance(self.adapter, TokenConfig):
            raise UserError(
                "the adapter trains one word, of one person; train each person alone with "
                "`hyperdb personalize adapter=custom_diffusion` and put them together with `hyperdb merge`"
            )


def _photos(config: Config) -> tuple[Tensor, Tensor]:
    """Return the crops of the two people, and one by which each of N is recognised, `[N, 3, H, W]` uint8."""
    import numpy as np

    from hyperdb.faces.align import face_crop
    from hyperdb.faces.image import read_image
    from hyperdb.tuning.personalizer import to_images

    crops, how, people = [], config.diffusion, len(config.images) + len(config.others)
    if config.judged and len(config.judged) != people:
        raise UserError(f"judged={config.judged}: expected a photo of each of the {people} people of images and others")
    for path in (*config.images, *config.others, *config.judged):
        crop, notice = face_crop(read_image(path), how.size, how.crop, None, path, config.align)
        if notice:
            print(notice)
        crops.append(crop)
    everybody = to_images(np.stack(crops))
    return everybody[:2], everybody[-people:]


def _words(config: Config, base: Base) -> tuple[str, str]:
    """Return the words of the two people. Raises `UserError` for a second one that is no other token of the base."""
    ids = base.tokenizer(config.second, add_special_tokens=False).input_ids
    first = config.diffusion.rare_token
    if len(ids) != 1 or ids == base.tokenizer(first, add_special_tokens=False).input_ids:
        raise UserError(f"second={config.second!r}: expected one token of the base, another than {first!r}")
    return first, config.second


@tracked
def run(config: Config, track: Track) -> Path:
    """Write `out/adapter.safetensors`, pictures of the two people, and `report.json`; return `out`."""
    import torch
    from tqdm import tqdm

    from hyperdb.adapters.base import moved
    from hyperdb.adapters.layout import Layout
    from hyperdb.diffusion.targets import base_hash
    from hyperdb.faces.image import grid, save_png
    from hyperdb.formats.native import Part, Personalization
    from hyperdb.metrics.face import SFace
    from hyperdb.metrics.halves import SIDES, mean, shown
    from hyperdb.metrics.likeness import galleries
    from hyperdb.runtime.files import load_json, save_json
    from hyperdb.runtime.optim import Schedule
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.tuning.cutmix import of_nobody, of_two, scenes, side_by_side, with_pairs
    from hyperdb.tuning.draw import draw
    from hyperdb.tuning.fit import fit
    from hyperdb.tuning.prior import load_prior
    from hyperdb.tuning.trainable import trainable

    if len(config.images) != 2:
        raise UserError(f"images={config.images}: name the photos of two people as [A,B]")
    of_nobody(config.prompt, "", config.diffusion.class_word)  # which checks the prompt
    crops, everybody = _photos(config)
    base = config.diffusion.load()
    words = _words(config, base)
    settings, adapter = trainable(base, config.adapter)
    moments, shows = scenes(base, crops, words, config.prompt, config.mix, config.unmix)
    seen = torch.cat([crops, everybody]) if config.judged else everybody
    photos = hashlib.sha256(seen.numpy().tobytes()).hexdigest()
    made_from = {**recipe(config), "base": base.digest, "photos": photos}
    made_from["adapter"]["kind"] = kind_of(config.adapter)
    out = claim(config.out, WRITES, made_from)
    prior = None
    if config.finetune.prior_weight > 0:
        prior = load_prior(base, config.prior, out / "prior.safetensors")
        prior = with_pairs(base, prior, config.prior, config.prompt, config.mix)
    tuning = replace(config.finetune, steps=2 * config.finetune.steps)
    schedule = Schedule(tuning.steps, tuning.warmup, tuning.decay)

    # --- train, draw, look at the halves; without the regulariser the same again
    feature, orders = SFace(), (words, words[::-1])
    prompts = [of_two(config.prompt, *orders[k % 2]) for k in range(config.num_images)]
    gallery = galleries(feature, everybody[:, None])
    for path, known in zip(config.judged or config.images, gallery[:2], strict=False):
        if not known.isfinite().all():
            print(f"no face is recognised in {path}: its half of the pictures counts as missed")

    def measured(pictures: Tensor) -> dict[str, Any]:
        turned = [1, 0, *range(2, len(gallery))]
        return mean([shown(feature, pictures[::2], gallery), shown(feature, pictures[1::2], gallery[turned])])

    pairs = torch.cat([side_by_side(crops[:1], crops[1:]), side_by_side(crops[1:], crops[:1])])
    told = {"words": list(words), "prompts": prompts[:2], "people": len(everybody), "pictures": len(prompts)}
    told |= {"base": base.digest, "ceiling": measured(base.decode(base.moments(pairs)[:, 0]))}
    report = load_json(out / "report.json") if (out / "report.json").is_file() else {}
    results: dict[str, Any] = report["results"] if report.get("ceiling") == told["ceiling"] else {}  # before a stop
    runs = {"unmix" if config.unmix else "mixed": config.unmix} | ({"mixed": 0.0} if config.compare else {})
    for number, (name, unmix) in enumerate(runs.items()):
        sheet, adapter_file = out / ("pictures_mixed.png" if number else "pictures.png"), out / "adapter.safetensors"
        if name in results and sheet.is_file() and (number or adapter_file.is_file()):
            continue
        began = time.perf_counter()
        with tqdm(total=tuning.steps, desc=name, unit="step", dynamic_ncols=True) as bar:

            def progress(step: int, loss: float, bar: Any = bar, name: str = name, number: int = number) -> None:
                bar.update()
                bar.set_postfix_str(f"loss {loss:.4f}")
                rate = tuning.rate * schedule(step - 1)
                track.log(number * tuning.steps + step, {f"{name}/loss": loss, f"{name}/rate": rate})

            params = fit(base, adapter, moments, tuning, None, prior, progress, scenes=replace(shows, unmix=unmix))
        seconds = round(time.perf_counter() - began, 1)
        changes: Changes = moved(adapter.changes(params))
        # ordinary guidance: hybrid guidance would take one of the two words for the person, and leave the other
        pictures = draw(base, changes, 1, prompts, list(range(len(prompts))), hybrid=False)[0]
        text = {"software": "hyperdb", "synthetic": "yes", "base": base.digest, "prompt": " | ".join(prompts[:2])}
        save_png(sheet, grid(list(pictures.permute(0, 2, 3, 1).numpy()), 8), text)
        if not number:
            kept = [Part(settings, adapter.layout, {k: v.cpu() for k, v in params.items()})]
            Personalization(
                Layout.of(base.targets()), None, base=base_hash(base.targets()), rare_token=words[0],
                class_word=base.config.class_word, parts=kept,
            ).save(adapter_file)  # fmt: skip
        results[name] = {**measured(pictures), "seconds": seconds}
        save_json(out / "report.json", {**told, "results": results, "provenance": provenance()})
        done = (number + 1) * tuning.steps
        track.log(done, {f"{name}/rank1_{side}": results[name][side]["rank1"] for side in SIDES})
        track.picture(done, sheet.stem, sheet)
        rates = ", ".join(f"{side} {results[name][side]['rank1']:.2f}" for side in SIDES)
        print(f"{name}: the right person among {len(everybody)} in a share of the halves of {rates}")
    print(f"adapter in {out / 'adapter.safetensors'}, pictures in {out / 'pictures.png'}")
    both = of_two(config.prompt, "[V]", config.second)
    ordinary = chosen("diffusion", replace(config.diffusion, subject_guidance=None))
    print(f"next: hyperdb generate {typed('adapter', config.out)} prompt='{both}'{ordinary}")
    return out
