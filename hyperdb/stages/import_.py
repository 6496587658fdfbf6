"""Read a LoRA or a hypernetwork of another tool as an adapter of ours; docs/imports.md says which.

    hyperdb import path=ada.safetensors name=ada

The layers that a LoRA adapts beyond the paper's are kept too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyperdb.adapters import LiDBConfig
from hyperdb.diffusion import PLACEHOLDER, DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.words import chosen, typed

WRITES = ("adapter.safetensors",)


@dataclass(kw_only=True)
class Config:
    """`path`: a safetensors file, or a folder of diffusers or PEFT; `words`: its trigger phrase."""

    path: FilePath = "???"
    words: str | None = None  # that call the person; null: those that the file states, else diffusion's own
    diffusion: DiffusionConfig
    name: str = "default"
    out: FilePath = "runs/import/default"

    def __post_init__(self) -> None:
        if self.words is not None and (not self.words.strip() or PLACEHOLDER in self.words):
            raise UserError(f"words={self.words!r}: expected the words of the file, such as 'ohwx man'")


def split_words(phrase: str, class_word: str) -> tuple[str, str]:
    """Return what `[V]` stands for and the word after it: "ohwx man" is "ohwx" and "man", "ohwx" before `class_word`.

    The words are text as it stands in captions; how many tokens they are does not matter.
    """
    *rare, last = phrase.split()
    return (" ".join(rare), last) if rare else (last, class_word)


def run(config: Config) -> Path:
    """Write `out/adapter.safetensors` and return `out`: a LoRA is its relaxed factors, a hypernetwork its only part."""
    from hyperdb.adapters.base import rank_of
    from hyperdb.adapters.layout import Layout
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.targets import base_hash, find_sites
    from hyperdb.formats import a1111, lora
    from hyperdb.formats.native import Personalization
    from hyperdb.runtime.files import hash_files, load_metadata
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.recipe import recipe

    source = Path(config.path).expanduser()
    # what is wrong with the file is said before the base is loaded
    given = None if a1111.is_hypernetwork(source) else lora.read(source)
    settings = config.diffusion
    base = Base.load(settings)
    layout = Layout.of(base.targets())
    empty, relaxed, parts, tokens = LiDBConfig(), {}, [], None
    if given is None:
        parts = [a1111.read(source, base.places("kv"), settings.path)]
    else:
        relaxed = given.factors(find_sites(base.unet, base.text_encoder), settings.path)
        tokens = empty.build(layout).init(1)["tokens"][0]
    metadata = load_metadata(source) if given is None else given.metadata
    stated = metadata.get("modelspec.trigger_phrase", "")
    usable = len(stated) <= 200 and PLACEHOLDER not in stated and " ".join(stated.split()).isprintable()
    phrase = config.words or (stated if usable else "")
    rare, noun = (
        split_words(phrase, settings.class_word) if phrase.strip() else (settings.rare_token, settings.class_word)
    )
    made_for = metadata.get("hyperdb.base") or base_hash(base.targets())
    person = Personalization(layout, tokens, empty, made_for, rare, noun, relaxed, parts=parts)
    content = hash_files(source if source.is_dir() else [source])
    out = claim(config.out, WRITES, {**recipe(config), "path": content, "base": base.digest})
    path = person.save(out / "adapter.safetensors")
    beyond = len(relaxed.keys() - set(layout.names))
    besides = f" and {beyond} other layers" if beyond else ""
    what = f"rank {rank_of(relaxed)}" if relaxed else "a hypernetwork of A1111"
    adapted = len(relaxed) - beyond + sum(len(part.layout) for part in parts)
    print(f"{what}, {adapted} of {len(layout)} layers{besides}: {path}")
    if not phrase.strip():
        print("the file states no trigger phrase: write its words in the prompt, or import it again with words='...'")
    prompt = f"prompt='a photo of a [V] {person.class_word}'"
    print(f"next: hyperdb generate {typed('adapter', config.out)} {prompt}{chosen('diffusion', settings)}")
    return out
