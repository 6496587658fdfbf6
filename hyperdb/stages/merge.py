"""Put several people of Custom Diffusion into one adapter, without training (Kumari et al. 2023, arXiv 2212.04488).

    hyperdb personalize adapter=custom_diffusion image=ada.jpg name=ada
    hyperdb personalize adapter=custom_diffusion image=bob.jpg name=bob diffusion.rare_token=q
    hyperdb merge adapter=[runs/personalize/ada,runs/personalize/bob] name=both

Each person keeps the word that it was trained with; `q` is one token of the embedded base, and in none of its captions.
The keys and values of the attention to the text become those that each person's own adapter makes of the person's
words and of the end of their prompt, and stay what the base makes of other captions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.tuning.prior import PriorConfig
from hyperdb.words import chosen, typed

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.adapters.base import Changes
    from hyperdb.diffusion.base import Base
    from hyperdb.formats.native import Part, Personalization

WRITES = ("adapter.safetensors", "pictures.png")
PICTURES = 8  # that are drawn of each person, and of all of them together
LIMIT = 2000  # captions: their features are in memory at once
PASS = 64  # prompts that the text encoder reads at once


@dataclass(kw_only=True)
class Config:
    """Which people are merged, on which base, and which captions stay as they are.

    The captions are `prior.prompts`, the class prompts that a training with class pictures keeps too, and those of
    `captions`: a text file with one a line, or people, whose captions are read and no pictures. The paper takes 1,000
    captions of LAION. What no caption says is not kept, so that more of them are better.

    The more alike the people's words are, the further the weights have to move, and the command says how far. Words
    begin at the class word and move little at the usual rate; the paper begins each at another rare word, which
    `adapter.start=ROW` of `hyperdb personalize` does.
    """

    adapter: list[FilePath] = "???"  # type: ignore[assignment]
    """files of `hyperdb personalize adapter=custom_diffusion`, or their folders, each with a rare token of its own"""
    diffusion: DiffusionConfig
    prior: PriorConfig
    captions: FilePath | None = None  # further ones, of which the first LIMIT count
    preview: bool = True  # draw everybody alone and together at the end, by ordinary guidance
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/merge/default"  # folder that is written


def _parts(people: list[Personalization]) -> list[Part]:
    """Return each person's only part. Raises `UserError` for people who do not fit together."""
    found: dict[int, Part] = {}
    for person in people:
        kinds = [part.kind for part in person.parts]
        if kinds != ["custom"] or person.tokens is not None or person.relaxed:
            raise UserError(f"{person.source} is not one adapter of kind custom alone: it cannot be merged")
        (part,) = person.parts
        if (count := part.config.vectors) != 1:  # type: ignore[attr-defined]
            raise UserError(f"{person.source} has a word of {count} vectors: only words of one can be merged")
        people[0].parts[0].layout.require(part.layout, person.source)
        if (row := part.config.row) in found:  # type: ignore[attr-defined]
            raise UserError(
                f"{person.source} has the rare token {person.rare_token!r}, as another of these people: personalise "
                "one of them again with diffusion.rare_token=WORD, a word that is one token and that no prompt needs"
            )
        found[row] = part
    return list(found.values())


def encoded(base: Base, prompts: list[str], word: Changes | None = None) -> tuple[Tensor, Tensor]:
    """Return the token ids `[B, L]` of prompts and what the text encoder makes of them, `[B, L, C]`, float32."""
    import torch

    from hyperdb.adapters.inject import Injection

    injection = Injection(base.sites(word or ()))
    ids = base.tokenize(prompts)
    try:
        with torch.no_grad(), base.autocast(), injection.using(word or {}):
            return ids, torch.cat([base.text_encoder(some)[0].float() for some in ids.split(PASS)])
    finally:
        injection.remove()


def _texts(config: Config) -> list[str]:
    """Return the captions that stay as they are, each once. Raises `UserError` for a place without any."""
    from hyperdb.data.people import load_people
    from hyperdb.runtime.files import load_text

    found: list[str] = []
    if config.captions is not None and resolve(config.captions).suffix == ".txt":
        found = [line.strip() for line in load_text(resolve(config.captions)).splitlines() if line.strip()]
    elif config.captions is not None:
        found = load_people(config.captions, split=None).captions
    if config.captions is not None and not found:
        raise UserError(f"captions={config.captions}: no captions there; name a text file with one a line, or people")
    return list(dict.fromkeys([*config.prior.prompts, *found]))[:LIMIT]


def _captions(base: Base, prompts: list[str]) -> Tensor:
    """Return the features `[c, C]` of all tokens of captions, up to the first that ends one."""
    ids, features = encoded(base, prompts)
    ended = (ids == base.tokenizer.eos_token_id).long().cumsum(1)
    return features[(ended - (ids == base.tokenizer.eos_token_id).long()) == 0]


def _words(base: Base, person: Personalization, word: Changes, row: int) -> Tensor:
    """Return the features `[s, C]` of a person's words in the instance prompt: rare token, class word and prompt's end.

    The end has read both words, and stands for the whole prompt in every place after it.
    Raises `UserError` for a person whose vector is not the rare token's.
    """
    ids, features = encoded(base, [f"a {person.rare_token} {person.class_word}"], word)
    if not (ids[0] == row).any():
        raise UserError(
            f"{person.source} trained the vector of token {row}, which {person.rare_token!r} is not: personalise again "
            "without adapter.row"
        )
    first = int((ids[0] == row).nonzero()[0])
    noun = base.tokenizer(person.class_word, add_special_tokens=False).input_ids
    return features[0, first : first + 2 + len(noun)]


def run(config: Config) -> Path:
    """Write `out/adapter.safetensors`, in which every person's rare token calls that person; return `out`.

    `out/pictures.png` are pictures of each of them by this adapter and, in the last line, of all of them together.
    """
    import torch

    from hyperdb.adapters import CustomConfig, TokenConfig
    from hyperdb.adapters.base import moved
    from hyperdb.adapters.custom import merge
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.targets import base_hash
    from hyperdb.faces.image import grid, save_png
    from hyperdb.formats.native import Part, Personalization, find_adapter
    from hyperdb.runtime.files import hash_files
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.recipe import recipe
    from hyperdb.tuning.draw import draw

    if len(config.adapter) < 2:
        raise UserError(f"adapter={config.adapter}: name two adapters or more as [A,B]")
    files, texts = [find_adapter(path) for path in config.adapter], _texts(config)
    people = [Personalization.load(file) for file in files]
    parts = _parts(people)
    base = Base.load(config.diffusion)
    targets = base.targets()
    for person in people:
        Layout.of(targets).require(person.layout, person.source)
        if person.base not in ("", here := base_hash(targets)):
            raise UserError(
                f"{person.source} was made for base {person.base}, and {config.diffusion.path} is {here}; name its own "
                "with diffusion=NAME or diffusion.path=FOLDER"
            )

    # --- what each word is, and what is made of it
    embedding, *layers = parts[0].layout.names
    changes = [moved(part.changes(), base.device) for part in parts]
    words = [
        _words(base, person, {embedding: change[embedding]}, part.config.row)  # type: ignore[attr-defined]
        for person, part, change in zip(people, parts, changes, strict=True)
    ]
    captions = _captions(base, texts)
    params = {"vector": parts[0].params["vector"]}
    modules = base.sites(layers)
    moves = torch.zeros(1 + len(people), dtype=torch.float64)  # squared: of the merged layers, and of each person's
    for name in layers:
        weight = Site(name, modules[name]).weight()
        own = [change[name].dense(weight)[0] for change in changes]
        values = [c @ (weight + one).T for c, one in zip(words, own, strict=True)]
        found = merge(weight, captions, torch.cat(words), torch.cat(values)) - weight
        moves += torch.stack([x.cpu().double().square().sum() for x in (found, *own)])
        params[name] = found[None].cpu()

    # --- the first person's adapter with the merged layers, beside the other people's words
    first = people[0]
    assert isinstance(parts[0].config, CustomConfig)
    everybody = [Part(CustomConfig(**asdict(parts[0].config)), parts[0].layout, params)]
    for part in parts[1:]:
        assert isinstance(part.config, CustomConfig)
        settings = TokenConfig(part.config.row, part.config.start)
        everybody.append(Part(settings, Layout(part.layout.layers[:1]), {"vector": part.params["vector"]}))
    contents: dict[str, Any] = {"adapter": [hash_files([file]) for file in files], "base": base.digest}
    contents["captions"] = texts if config.captions is not None else None
    out = claim(config.out, WRITES, {**recipe(config), **contents})
    merged = Personalization(
        first.layout, None, base=first.base, rare_token=first.rare_token, class_word=first.class_word, parts=everybody
    )
    merged.save(out / "adapter.safetensors")
    calls = [f"{person.rare_token} {person.class_word}" for person in people]
    print(f"adapter in {out / 'adapter.safetensors'}; the words that call the people: {', '.join(map(repr, calls))}")
    together_moved, *alone = moves.sqrt().tolist()
    print(f"the layers move {together_moved / max(max(alone), 1e-12):.2g} times as far as the furthest person's own")
    known = len(base.tokenizer("and", add_special_tokens=False).input_ids) == 1
    prompt = f"a photo of a {(' and a ' if known else ', a ').join(calls)}"
    if config.preview:
        prompts = [*(f"a photo of a {call}" for call in calls), prompt]
        every, seeds = [one for one in prompts for _ in range(PICTURES)], list(range(PICTURES)) * len(prompts)
        print(f"drawing {PICTURES} pictures each of {', '.join(map(repr, prompts))}", flush=True)
        drawn = draw(base, moved(merged.changes(), base.device), 1, every, seeds, hybrid=False)[0]
        text = {"software": "hyperdb", "synthetic": "yes", "base": base.digest, "prompt": prompt}
        sheet = grid(list(drawn.permute(0, 2, 3, 1).numpy()), PICTURES, rows=[*calls, "together"])
        print(f"in {save_png(out / 'pictures.png', sheet, text)}")
    ordinary = chosen("diffusion", replace(config.diffusion, subject_guidance=None))
    print(f"next: hyperdb generate {typed('adapter', config.out)} prompt='{prompt}'{ordinary}")
    return out
