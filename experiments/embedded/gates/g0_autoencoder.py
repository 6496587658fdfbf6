"""G0: does the autoencoder keep a face recognisable at 64 px?

    hyperdb render_heads split=validation identities=200 views=9 photo_views=2 out=data/heads_gates
    python experiments/embedded/gates/g0_autoencoder.py [base folder, its people, size, result.json]

Asks of the reconstructions of held-out photo renders: same/different AUC >= .985, mean cosine with the render >= .80.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.metrics.face import SFace
from hyperdb.metrics.score import auc
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance


def pairs(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Compare first views `[I, C]` with second views `[I, C]`: cosines of the same and of different people, and AUC."""
    cosine = (a @ b.mT).nan_to_num(0.0)
    same, different = cosine.diagonal(), cosine[~torch.eye(len(a), dtype=torch.bool)]
    return {"same": same.mean().item(), "different": different.mean().item(), "auc": auc(same, different)}


def main(folder: str = "", data: str = "data/heads_gates", size: str = "64", out: str = "g0.json") -> None:
    """Reconstruct, embed, compare, write."""
    other = [f"diffusion.path={folder}", f"diffusion.size={size}"] if folder else []
    base = config.load("personalize", ["image=none", *other]).diffusion.load()
    people, feature = load_people(data, split="validation"), SFace()
    rows = torch.stack([r[:2] for r in people.photos])  #                           [I, 2]
    images = people.images[rows.flatten()]
    rebuilt = base.decode(base.moments(images)[:, 0])
    a, b = (feature(x).unflatten(0, rows.shape) for x in (images, rebuilt))
    own = (a * b).sum(-1).nan_to_num(0.0)
    error = (images.float() - rebuilt.float()).div(255).square().mean()
    result = {
        "people": len(rows),
        "psnr": (-10 * error.log10()).item(),
        "cosine_with_render": own.mean().item(),
        "renders": pairs(a[:, 0], a[:, 1]),
        "reconstructions": pairs(b[:, 0], b[:, 1]),
        "base": base.digest,
    }
    result["passed"] = result["cosine_with_render"] >= 0.80 and result["reconstructions"]["auc"] >= 0.985
    save_json(Path(__file__).parent / out, {**result, **provenance()})
    print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
