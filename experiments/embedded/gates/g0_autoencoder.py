"""G0: does the autoencoder keep a face recognisable?

    hyperdb render_heads split=validation identities=200 views=9 photo_views=2 out=data/heads_gates
    python experiments/embedded/gates/g0_autoencoder.py [base folder, its people, result.json, vae folder]

Asks of the reconstructions of held-out photo renders: same/different AUC within .012 of the renders' own, mean cosine
with the render >= .92. A VAE's folder takes the place of the base's own. (Until the base of 128 px, .985 and .80 were
asked; g0.json of the base of 64 px says so.)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from hyperdb import config
from hyperdb.data.people import load_people
from hyperdb.diffusion.digest import digest_vae
from hyperdb.metrics.face import SFace
from hyperdb.metrics.score import auc
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance


def pairs(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Compare first views `[I, C]` with second views `[I, C]`: cosines of the same and of different people, and AUC."""
    cosine = (a @ b.mT).nan_to_num(0.0)
    same, different = cosine.diagonal(), cosine[~torch.eye(len(a), dtype=torch.bool)]
    return {"same": same.mean().item(), "different": different.mean().item(), "auc": auc(same, different)}


def main(
    folder: str = "", data: str = "data/heads_gates", out: str = "g0.json", vae: str = ""
) -> None:
    """Reconstruct, embed, compare, write."""
    other = [f"diffusion.path={folder}"] if folder else []
    base = config.load("personalize", ["image=none", *other]).diffusion.load()
    if vae:
        base.vae = AutoencoderKL.from_pretrained(vae).requires_grad_(False)
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
        "vae": digest_vae(base.vae),
    }
    lost = result["renders"]["auc"] - result["reconstructions"]["auc"]
    result["passed"] = {"cosine": result["cosine_with_render"] >= 0.92, "auc": lost <= 0.012}
    save_json(Path(__file__).parent / out, {**result, **provenance()})
    print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
