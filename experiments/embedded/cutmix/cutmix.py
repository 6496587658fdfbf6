"""Does each half of a picture of two people show its person, with the unmixing regulariser and without?

    hyperdb render_heads split=validation identities=24 views=30 photo_views=9 out=data/heads_choice
    python experiments/embedded/cutmix/cutmix.py [--pairs 4] [finetune.steps=300 ...]

Pairs of validation people, told from the other people of all pairs; each is trained twice by `hyperdb cutmix`, whose
settings the words are. Their runs are in --out, so that the same command goes on where it was stopped. Writes
results.json beside this file: of each pair and way what the halves show, and the means with 95 % intervals over pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.faces.image import save_png
from hyperdb.metrics.halves import SIDES
from hyperdb.metrics.score import bootstrap, paired
from hyperdb.runtime.errors import run_script
from hyperdb.runtime.files import load_json, save_json
from hyperdb.runtime.provenance import provenance

FIGURES = ("rank1", "swapped", "detected", "cosine")


def photos(data: str, people: int, size: int, folder: Path) -> tuple[list[Path], list[Path], str]:
    """Write two photos of each person, that in another pose and place second; return both files, and the digest."""
    every = load_people(data, people, "validation", size)
    files: tuple[list[Path], list[Path]] = [], []
    for person, rows in enumerate(every.given_first(data, 1, 2)):
        for k, some in enumerate(files):
            image = every.images[rows[k : k + 1]][0].permute(1, 2, 0).contiguous().numpy()
            some.append(save_png(folder / f"{person}_{k}.png", image, {}))
    return *files, every.digest


def words(name: str, files: list[Path]) -> str:
    """Return files as a setting of the command line."""
    return f"{name}=[{','.join(map(str, files))}]"


def main(arguments: list[str]) -> None:
    """Train every pair, gather, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--data", default="data/heads_choice")
    parser.add_argument("--out", type=Path, default=Path("runs/cutmix_study"))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("words", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    size = config.load("cutmix", [*given.words, "images=[a,b]"]).diffusion.size
    shown, judged, data = photos(given.data, 2 * given.pairs, size, given.out / "photos")
    found: list[dict[str, Any]] = []
    for pair in range(given.pairs):
        two = [2 * pair, 2 * pair + 1]
        rest = [person for person in range(2 * given.pairs) if person not in two]
        how = [words("images", [shown[i] for i in two]), words("others", [shown[i] for i in rest])]
        how += [words("judged", [judged[i] for i in two + rest]), "align=false", "compare=true"]
        report = load_json(config.run("cutmix", [*given.words, *how, f"out={given.out / str(pair)}"]) / "report.json")
        found.append({"ceiling": report["ceiling"], **report["results"]})
    values = {
        way: {name: np.array([[one[way][side][name] for side in SIDES] for one in found]).mean(1) for name in FIGURES}
        for way in ("unmix", "mixed", "ceiling")
    }
    result = {
        "rows": {way: {name: bootstrap(x, 0) for name, x in figures.items()} for way, figures in values.items()},
        "paired": {name: paired(values["unmix"][name], values["mixed"][name], 0) for name in FIGURES},
        "pairs": found,
        "people": 2 * given.pairs,
        "pictures": report["pictures"],
        "prompts": report["prompts"],
        "data": data,
        "words": given.words,
        "base": report["base"],
        **provenance(),
    }
    file = save_json(given.results, result)
    for way, figures in result["rows"].items():
        rank, cosine = figures["rank1"]["mean"], figures["cosine"]["mean"]
        print(f"{way:8s} the right person in {rank:.2f} of the halves, cosine {cosine:.3f}")
    print(f"results in {file}")


if __name__ == "__main__":
    run_script(main)
