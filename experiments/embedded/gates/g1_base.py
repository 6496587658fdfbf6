"""G1: does the base draw faces, different ones, and what it is asked for?

    hyperdb render_heads split=validation identities=200 views=9 photo_views=2 out=data/heads_gates
    python experiments/embedded/gates/g1_base.py [base folder]

200 pictures of "a photo of a face": a face in >= 98 %, mean pairwise cosine within .05 of that of renders of different
people, the Fréchet distance of SFace features to held-out renders beside that of reconstructions; style and place
obeyed in >= 90 % by a judge of known accuracy; "a [V] face" beside "a face". Also writes g1.png.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.sample import sample, start_noise
from hyperdb.faces.image import grid, save_png
from hyperdb.heads import PLACE_PHRASES, PLACES, STYLES, prompt
from hyperdb.metrics.face import SFace
from hyperdb.metrics.feature import detection_rate
from hyperdb.metrics.obedience import Judge
from hyperdb.metrics.score import frechet
from hyperdb.runtime.files import save_json
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance

PHOTOS, EACH = 200, 16


def draw(base: Base, prompts: list[str], bar: tqdm) -> torch.Tensor:
    """Draw one picture a prompt, from seeds 0, 1, 2 ..."""
    found = []
    for k in range(0, len(prompts), 32):
        part = prompts[k : k + 32]
        found.append(base.decode(sample(base, part, start_noise(base, list(range(k, k + len(part)))))))
        bar.update(len(part))
    return torch.cat(found)


def likeness(found: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Return the share of faces found, the mean pairwise cosine, and the Fréchet distance to reference features."""
    clean = found[found.isfinite().all(1)]
    cosine = (clean @ clean.mT)[torch.ones(len(clean), len(clean)).triu(1) > 0]
    known = reference[reference.isfinite().all(1)]
    return {"detected": detection_rate(found), "pairwise": cosine.mean().item(), "frechet": frechet(clean, known)}


def main(folder: str | None = None) -> None:
    """Draw, embed, judge, write."""
    settings = config.load("personalize", ["image=none"]).diffusion
    base = (settings if folder is None else dataclasses.replace(settings, path=folder)).load()
    judge, feature = Judge.load(resolve("package:embedded/judge.safetensors")), SFace()
    people = load_people("data/heads_gates", split="validation")
    first, second = (people.images[torch.stack([r[k] for r in people.photos])] for k in (0, 1))
    reference = feature(second)
    truth = {name: people.labels[name] for name in ("style", "place")}
    judged = judge(base.decode(base.moments(people.images[:])[:, 0]))
    result: dict[str, object] = {
        "judge_accuracy": {name: (judged[name] == truth[name]).float().mean().item() for name in truth},
        "renders": likeness(feature(first), reference),
        "reconstructions": likeness(feature(base.decode(base.moments(first)[:, 0])), reference),
    }
    asked = {"photo": "a photo of a face", "class": "a face", "rare": "a [V] face"}
    with tqdm(total=3 * PHOTOS + 15 * EACH, unit="picture", dynamic_ncols=True) as bar:
        drawn = {name: draw(base, [text] * PHOTOS, bar) for name, text in asked.items()}
        styled = {style: draw(base, [prompt(style)] * EACH, bar) for style in STYLES if style != "photo"}
        placed = {p: draw(base, [f"a photo of a face, {PLACE_PHRASES[p]}"] * EACH, bar) for p in PLACES}
    for name, images in drawn.items():
        result[name] = likeness(feature(images), reference)
        result[f"{name}_is_photo"] = (judge(images)["style"] == STYLES.index("photo")).float().mean().item()
    result["styles"] = {
        style: {
            "obeyed": (judge(x)["style"] == STYLES.index(style)).float().mean().item(),
            "detected": detection_rate(feature(x)),
        }
        for style, x in styled.items()
    }
    result["places"] = {
        place: (judge(x)["place"] == PLACES.index(place)).float().mean().item() for place, x in placed.items()
    }
    obeyed = [result["photo_is_photo"], *(row["obeyed"] for row in result["styles"].values())]
    result["style_obeyed"] = sum(obeyed) / len(obeyed)
    result["place_obeyed"] = sum(result["places"].values()) / len(result["places"])
    result["passed"] = {
        "detected": result["photo"]["detected"] >= 0.98,
        "pairwise": abs(result["photo"]["pairwise"] - result["renders"]["pairwise"]) <= 0.05,
        "style": result["style_obeyed"] >= 0.9,
        "place": result["place_obeyed"] >= 0.9,
    }
    here = Path(__file__)
    save_json(here.with_name("g1.json"), {**result, "base": base.digest, **provenance()})
    rows = {"render": first, **drawn, **styled, **{p: placed[p] for p in ("beach", "space", "city")}}
    pixels = [x.permute(1, 2, 0).numpy() for images in rows.values() for x in images[:12]]
    save_png(here.with_name("g1.png"), grid(pixels, 12, rows=list(rows)))
    for name, value in result.items():
        print(name, value)


if __name__ == "__main__":
    main(*sys.argv[1:])
