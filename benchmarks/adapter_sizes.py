"""What the artefact weighs in fp32, fp16 and int8, and what the rounding changes in the pictures.

    python benchmarks/adapter_sizes.py [people] [ADAPTER of another base, for its sizes]

Personalises rendered people of the test split on the embedded base, saves each adapter in every precision, and draws
the same prompts at the same seeds with what is read back. `change` is the mean absolute difference to the pictures of
fp32, in steps of 1/255; for its size beside it the same for other seeds' pictures of the same person. Writes
adapter_sizes.json beside this file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import hyperdb
from hyperdb.formats.native import Personalization, find_adapter
from hyperdb.heads import Identity, View, render
from hyperdb.metrics.face import SFace
from hyperdb.metrics.likeness import face_cosine, galleries
from hyperdb.runtime.files import save_json
from hyperdb.runtime.provenance import provenance
from hyperdb.stages.export import DTYPES
from hyperdb.tuning.draw import draw

PRECISIONS = {name: getattr(torch, kind) for name, kind in DTYPES.items()}
PROMPTS = ["a [V] face", "a [V] face", "a pencil sketch of a [V] face", "an oil painting of a [V] face"]


def files(person: Personalization, folder: Path) -> dict[str, dict[str, Path]]:
    """Write a person in every precision; return the paths."""
    found: dict[str, dict[str, Path]] = {}
    for name, dtype in PRECISIONS.items():
        lidb = person.save_lidb(folder / f"lidb-{name}.safetensors", dtype)
        whole = person.save(folder / f"adapter-{name}.safetensors", dtype)
        found[name] = {"lidb": lidb, "adapter": whole}
    return found


def main(people: int = 8, other: str | None = None) -> None:
    """Measure, print, write."""
    model, feature = hyperdb.load("embedded"), SFace()
    sums: dict[str, dict[str, list[float]]] = {n: {"change": [], "cosine_to_fp32": []} for n in PRECISIONS}
    seeds, next_seed, sizes = list(range(len(PROMPTS))), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(people):
            person = model.personalize(render(Identity(1_100_100 + i), View(), size=256))
            written = files(person, Path(folder))
            sizes["embedded"] = {n: {k: p.stat().st_size for k, p in both.items()} for n, both in written.items()}
            drawn = {}
            for name, both in written.items():
                factors = Personalization.load(both["adapter"]).factors()
                drawn[name] = draw(model.base, factors, 1, PROMPTS, seeds)
            exact = drawn["fp32"].float()
            shifted = draw(model.base, Personalization.load(written["fp32"]["adapter"]).factors(), 1, PROMPTS,
                           [s + 100 for s in seeds])  # fmt: skip
            next_seed.append((shifted.float() - exact).abs().mean().item())
            gallery = galleries(feature, drawn["fp32"])
            for name, images in drawn.items():
                sums[name]["change"].append((images.float() - exact).abs().mean().item())
                sums[name]["cosine_to_fp32"].append(face_cosine(feature, images, gallery).mean().item())
            print(f"{i + 1} of {people}", {n: round(v["change"][-1], 3) for n, v in sums.items()}, flush=True)
        if other is not None:
            written = files(Personalization.load(find_adapter(other)), Path(folder))
            sizes["other"] = {n: {k: p.stat().st_size for k, p in both.items()} for n, both in written.items()}
    result = {
        "people": people,
        "prompts": PROMPTS,
        "bytes": sizes,
        "pictures": {n: {k: round(sum(v) / len(v), 4) for k, v in found.items()} for n, found in sums.items()},
        "change_to_another_seed": round(sum(next_seed) / len(next_seed), 4),
        **provenance(),
    }
    print(save_json(Path(__file__).with_suffix(".json"), result))
    print(result["bytes"], result["pictures"], result["change_to_another_seed"], sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8, sys.argv[2] if len(sys.argv) > 2 else None)
