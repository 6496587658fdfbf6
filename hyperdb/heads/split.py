"""Which person belongs to which split: by seed range, written here and nowhere else."""

from __future__ import annotations

SPLITS: dict[str, range] = {
    "train": range(1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
}


def split_of(seed: int) -> str:
    """Name the split that owns an identity seed; ValueError outside every range."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"identity seed {seed} is in no split; use 0 ... 1,199,999")
