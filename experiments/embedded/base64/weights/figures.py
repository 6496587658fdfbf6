"""Draw curves.png from results.json: what a shift of each attribute changes, and who is still seen (see README.md)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from hyperdb.runtime.files import load_json

HERE = Path(__file__).parent


def main() -> None:
    """Plot the attribute's change, the other attributes' and the face cosine against the shift."""
    found = load_json(HERE / "results.json")["attributes"]
    panels = (
        ("attribute", "change of the attribute, standard deviations"),
        ("others", "mean change of the others"),
        ("face_cosine_to_unedited", "face cosine with the unshifted person"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.8))
    for panel, (key, label) in zip(axes, panels, strict=True):
        for word, attribute in found.items():
            points = attribute["curve"]
            panel.plot([p["shift"] for p in points], [p[key] for p in points], marker="o", label=word)
        panel.set(xlabel="shift, standard deviations", ylabel=label)
    axes[0].axline((0, 0), slope=1, linestyle=":", color="grey", label="as asked")
    axes[0].set_ylim(-2.5, 2.5)
    axes[0].legend()
    figure.savefig(HERE / "curves.png", dpi=110, bbox_inches="tight")
    print(HERE / "curves.png")


if __name__ == "__main__":
    main()
