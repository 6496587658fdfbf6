"""Is each person still the person after `hyperdb merge` has put two of Custom Diffusion into one adapter?

    hyperdb render_heads split=validation identities=24 views=30 photo_views=9 out=data/heads_choice
    python experiments/embedded/merge/merge.py [--pairs 6] [--captions data/heads_choice] [finetune.steps=500 ...]

Pairs of validation people, one photo each: the first of a pair under the base's rare token, the second under --second.
Each is drawn by the own adapter and by the merged one, under the own word, with the same noise, and told from all
people of the study. The words are settings of `hyperdb personalize adapter=custom_diffusion`; --captions are those of
`hyperdb merge`, further ones that stay as they are. The runs are in --out, so that the same command goes on where it
was stopped. Writes results.json and merge.webp, the first pair, beside this.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hyperdb import config
from hyperdb.adapters.base import moved
from hyperdb.data.people import load_people
from hyperdb.diffusion.base import Base
from hyperdb.faces.image import read_image, save_png
from hyperdb.formats.native import Personalization
from hyperdb.metrics.face import SFace
from hyperdb.metrics.figures import Standard, differences, summary
from hyperdb.report.gallery import save_webp
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.tuning.draw import draw

IMAGES = 8  # pictures of each person
LABELS = {"own": "by the own adapter", "merged": "by the merged adapter", "base": "base without adapter"}


def main(arguments: list[str]) -> None:
    """Train every pair, merge, draw, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--second", default="q", help="the word of the second of a pair, one token of the base")
    parser.add_argument("--captions", help="people, or a text file with one caption a line")
    parser.add_argument("--data", default="data/heads_choice")
    parser.add_argument("--out", type=Path, default=Path("runs/merge_study"))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    count = 2 * given.pairs
    settings = config.load("personalize", ["adapter=custom_diffusion", "image=none", *given.words])
    people = load_people(given.data, count, "validation", settings.diffusion.size)
    order = torch.stack([rows[:5] for rows in people.given_first(given.data, 1, 5)])
    shown, views = people.images[order[:, :1]], people.images[order[:, 1:]]  #           [I, 1, 3, H, W], [I, 4, ...]
    tokens = [settings.diffusion.rare_token, given.second]
    shared = [word for word in given.words if word.partition("=")[0].partition(".")[0] in ("diffusion", "prior")]

    # --- train, merge
    asked_before, asked_now = given.out / "asked.json", {"words": given.words, "data": people.digest, "tokens": tokens}
    if asked_before.is_file() and load_json(asked_before) != asked_now:
        raise UserError(f"{given.out} has people of other settings: choose another --out")
    save_json(asked_before, asked_now)
    alone, merged = [], []
    for person in range(count):
        photo = save_png(given.out / f"photo{person}.png", shown[person, 0].permute(1, 2, 0).contiguous().numpy(), {})
        asked = ["adapter=custom_diffusion", f"image={photo}", "align=false", "preview=false", *given.words]
        asked += [f"diffusion.rare_token={tokens[person % 2]}", f"out={given.out / str(person)}"]
        alone.append(given.out / str(person))
        if not (alone[-1] / "report.json").is_file():
            config.run("personalize", asked)
        if person % 2:
            both = [f"adapter=[{alone[-2]},{alone[-1]}]", *shared]
            both += [f"captions={given.captions}"] if given.captions else []
            kind = "merged_captions" if given.captions else "merged"
            merged.append(config.run("merge", [*both, f"out={given.out / f'{kind}{person // 2}'}"]))

    # --- draw, measure
    base = Base.load(settings.diffusion)
    pictures: dict[str, list[Any]] = {"own": [], "merged": [], "base": []}
    for person in range(count):
        prompts = [f"a photo of a {tokens[person % 2]} {settings.diffusion.class_word}"] * IMAGES
        for row, folder in (("own", alone[person]), ("merged", merged[person // 2])):
            changes = moved(Personalization.load(folder / "adapter.safetensors").changes(), base.device)
            pictures[row].append(draw(base, changes, 1, prompts, list(range(IMAGES)), hybrid=False))
        pictures["base"].append(draw(base, None, 1, prompts, list(range(IMAGES))))
    drawn = {row: torch.cat(images) for row, images in pictures.items()}
    found = Standard([SFace()], None, shown, views, [], {}, []).measure(drawn)
    scores = {row: {k: v.double().numpy().round(6)[:, None] for k, v in score.items()} for row, score in found.items()}
    pairs = {name: differences(scores, {"merged": ["own"]}, name, 0) for name in ("cosine", "rank1")}
    result = {
        "rows": {row: {"label": LABELS[row], **summary(score, 0)} for row, score in scores.items()},
        "paired": pairs.pop("cosine"),
        "paired_further": pairs,
        "people": count,
        "words": given.words,
        "captions": given.captions,
        "persons": people.seed[order[:, 0]].tolist(),
        "data": people.digest,
        "base": base.digest,
        **provenance(),
        "values": {row: {name: v.T.tolist() for name, v in score.items()} for row, score in scores.items()},
    }
    file = save_json(given.results, result)
    save_webp(file.with_name("merge.webp"), read_image(merged[0] / "pictures.png"))
    for row, score in result["rows"].items():
        print(f"{row:8s} face cosine {score['cosine']['mean']:.3f}, rank-1 of {count} {score['rank1']:.2f}")
    print(f"results in {file}")


if __name__ == "__main__":
    run_script(main)
