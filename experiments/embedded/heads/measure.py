"""Score renders with a face recogniser that no one here trained (SFace).

    python experiments/embedded/heads/measure.py [people] [views]

Writes results.json beside this file: detection rate a style, same/different AUC within photos and from photos to each
style, mean cosines, renders a second of one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hyperdb.heads import SPLITS, STYLES, Identity, render, sample_view
from hyperdb.metrics.face import SFace
from hyperdb.metrics.score import auc
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance


def main(people: int = 60, views: int = 4) -> None:
    """Render, embed, compare, write."""
    feature, styles = SFace(), {}
    render(Identity(SPLITS["test"][0]), sample_view(np.random.default_rng(0)))  # fill the caches
    photos, spent = torch.empty(0), 0.0
    with tqdm(total=len(STYLES) * people, unit="person", dynamic_ncols=True) as bar:
        for style in STYLES:  # photo is the first
            pictures = []
            for k in range(people):
                identity, began = Identity(SPLITS["test"][k]), time.process_time()
                for v in range(views):
                    rng = np.random.default_rng((k, v, STYLES.index(style)))
                    pictures.append(render(identity, sample_view(rng, style, accessory="none")))
                spent += time.process_time() - began
                bar.update()
            found = feature(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
            photos = found if style == "photo" else photos
            cosine, who = photos @ found.mT, torch.arange(len(found)) // views
            same = who[:, None] == who[None]
            pair = cosine.isfinite()
            if style == "photo":  # every pair once, none with itself
                pair &= torch.ones_like(pair).triu(1)
            scores = {"same": cosine[pair & same], "different": cosine[pair & ~same]}
            styles[style] = {
                "detected": found.isfinite().all(1).float().mean().item(),
                "auc_with_photo": auc(*scores.values()),
                **{name: value.mean().item() for name, value in scores.items()},
            }
    speed = len(STYLES) * people * views / spent
    results = {"people": people, "views": views, "size": 64, "styles": styles, "renders_a_cpu_second": speed}
    save_json(Path(__file__).with_name("results.json"), {**results, **provenance()})
    for style, row in styles.items():
        print(f"{style:12s}" + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))
    print(f"{speed:.1f} renders a CPU second of one core")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
