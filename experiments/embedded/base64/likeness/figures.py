"""Draw the figures of the likeness from what `hyperdb evaluate` left in `runs/evaluate` (see README.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.pyplot as plt

from hyperdb.data.people import load_people
from hyperdb.faces.image import grid, save_png
from hyperdb.runtime.files import load_json, load_tensors
from hyperdb.runtime.journal import read

HERE, RUNS = Path(__file__).parent, Path("runs/evaluate")
TRAINING = HERE.parent / "training"
PEOPLE = 8


def gallery() -> None:
    """People in columns; in rows the photo, then for every way one picture of the photo prompt and some styles."""
    results = load_json(RUNS / "likeness" / "results.json")
    people = load_people("data/heads_likeness", results["people"], "test")
    shown = results["images_a_person"]
    columns = {"photo": 0, **{style: shown + i for i, style in enumerate(results["styled"][:4])}}
    pixels, labels = [people.images[r[0]] for r in people.photos[:PEOPLE]], ["reference"]
    for row in results["rows"]:
        images = load_tensors(RUNS / "likeness" / "rows" / f"{row}.safetensors")[0]["images"]
        for name, k in columns.items():
            pixels += list(images[:PEOPLE, k])
            labels.append(f"{row}, {name}")
    save_png(HERE / "gallery.png", grid([x.permute(1, 2, 0).numpy() for x in pixels], PEOPLE, rows=labels))


def iterations() -> None:
    """Face cosine against the iterations of the fine-tuning, with 95 % intervals over people, and against copying."""
    results = load_json(RUNS / "likeness" / "results.json")
    whole, found = results["rows"], [results, *(load_json(path) for path in RUNS.glob("after_*/results.json"))]
    found.sort(key=lambda r: r["rows"]["hyper_40"]["steps"])
    start = {"hyper_40": "hyper_only", "no_hyper_40": "floor"}
    figure, (axes, plane) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for row, label in (("hyper_40", "from the prediction"), ("no_hyper_40", "without the hypernetwork")):
        steps = [0] + [r["rows"]["hyper_40"]["steps"] for r in found]
        points = [whole[start[row]], *(r["rows"][row] for r in found)]
        values = [point["cosine"] for point in points]
        axes.plot(steps, [v["mean"] for v in values], marker="o", label=label)
        axes.fill_between(steps, [v["lo"] for v in values], [v["hi"] for v in values], alpha=0.2)
        copied = [(p["copy_pose"]["mean"] + p["copy_background"]["mean"]) / 2 for p in points]
        plane.plot(copied, [v["mean"] for v in values], marker="o")
        for x, v, n in zip(copied, values, steps, strict=True):
            plane.annotate(str(n), (x, v["mean"]), textcoords="offset points", xytext=(4, -10))
    ceiling = whole["ceiling"]["cosine"]["mean"]
    axes.axhline(ceiling, linestyle=":", color="grey", label="renders through the autoencoder")
    axes.set(xlabel="iterations", ylabel="face cosine with other photos")
    axes.legend()
    plane.set(xlabel="copying of the photo's pose and backdrop (at each number of iterations)")
    figure.savefig(HERE / "iterations.png", dpi=120, bbox_inches="tight")


def training() -> None:
    """The hypernetwork's validation over its segments: the own prediction and another person's."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    begin = 0
    for path in sorted(TRAINING.glob("hypernet_segment*_journal.jsonl")):
        records = [r for r in read(path) if "validation/diffusion_own" in r]
        for axes, name in zip(panels, ("diffusion", "face_cosine"), strict=True):
            for who, color in (("own", "tab:blue"), ("shuffled", "tab:orange")):
                steps = [begin + r["step"] for r in records]
                axes.plot(steps, [r[f"validation/{name}_{who}"] for r in records], color=color, marker=".")
            axes.set(xlabel="steps (a break: another segment)", ylabel=name.replace("_", " "))
        begin += records[-1]["step"] if records else 0
    panels[0].legend(["own prediction", "another person's"])
    figure.savefig(HERE / "training.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    training()
    gallery()
    iterations()
    shutil.copy(RUNS / "likeness" / "results.json", HERE / "results.json")
    for path in (RUNS / "other_photo" / "results.json", *RUNS.glob("after_*/results.json")):
        shutil.copy(path, HERE / f"{path.parent.name}.json")
    print(f"figures and results in {HERE}")
