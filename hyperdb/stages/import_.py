"""Read a LoRA of another tool (kohya, diffusers, PEFT) as an adapter of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hyperdb.adapters import LiDBConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.paths import FilePath

WRITES = ("adapter.safetensors",)


@dataclass
class Config:
    """`path`: a safetensors file, or the folder that holds PEFT's `unet` and `text_encoder`."""

    path: FilePath = "???"
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lidb: LiDBConfig = field(default_factory=LiDBConfig)  # of the empty LiDB part
    name: str = "default"
    out: FilePath = "runs/import/default"


def run(config: Config) -> Path:
    """Write `out/adapter.safetensors`, whose relaxed factors are the LoRA, and return `out`."""
    from hyperdb.adapters.base import rank_of
    from hyperdb.adapters.layout import Layout
    from hyperdb.diffusion.targets import base_hash
    from hyperdb.formats import lora
    from hyperdb.formats.native import Personalization
    from hyperdb.runtime.files import hash_files
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.recipe import recipe

    source = Path(config.path).expanduser()
    base = config.diffusion.load()
    layout = Layout.of(base.targets())
    relaxed, metadata = lora.read(source, layout)
    tokens = config.lidb.build(layout).init(1)["tokens"][0]
    words = metadata.get("modelspec.trigger_phrase", "").split()
    rare = words[0] if len(words) == 2 else config.diffusion.rare_token
    person = Personalization(
        layout, tokens, config.lidb, metadata.get("hyperdb.base") or base_hash(base.targets()), rare,
        words[1] if len(words) == 2 else config.diffusion.class_word, relaxed,
    )  # fmt: skip
    content = hash_files(source if source.is_dir() else [source])
    out = claim(config.out, WRITES, {**recipe(config), "path": content, "base": base.digest})
    path = person.save(out / "adapter.safetensors")
    adapted = sum(bool(up.any()) for _, up in relaxed.values())
    print(f"rank {rank_of(relaxed)}, {adapted} of {len(layout)} layers: {path}")
    print(f"next: hyperdb generate adapter={config.out} prompt='a photo of a [V] {person.class_word}'")
    return out
