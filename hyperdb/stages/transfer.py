"""Move an adapter to another version of its base, without training (LoRA-X, Farhadzadeh et al. 2025).

    hyperdb transfer adapter=runs/personalize/me to=FOLDER name=me

Each layer's change is projected on the leading singular vectors of the new base's weight and becomes low-rank factors.
A word's vectors go on as they are, where the bases have the same words.
Layers whose singular vectors differ too much between the bases are left out and named. To the very base that an adapter
was made for, this makes a LoRA of whatever can be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.words import chosen, typed

if TYPE_CHECKING:
    from hyperdb.adapters.base import Change, LowRank
    from hyperdb.adapters.site import Site
    from hyperdb.diffusion.base import Base
    from hyperdb.formats.native import Part, Personalization

WRITES = ("adapter.safetensors", "transfer.json", "transfer.md")
LARGEST = 4096  # rank or subspace


@dataclass(kw_only=True)
class Config:
    """What is moved from which base to which.

    `diffusion` is the base that the adapter was made for, and `to` the new one: a folder, a hub id or a checkpoint, as
    `diffusion.path`. `subspace` is the number of leading singular vectors of a weight of the new base that a change may
    lie in; a layer that has no more keeps all. null is as many as the narrowest of the paper's layers has: 320 on
    Stable Diffusion 1.5, the reference's. On the base that the adapter was made for null is all of them.

    A layer's similarity is the part of the old base's leading singular vectors that lies in the new base's, the smaller
    of inputs and outputs. It is taken over the first `subspace` of them, but over the first half at most: as a whole
    the vectors of any two square weights span the same space. Of unrelated weights it is about one half.
    """

    adapter: FilePath = "???"  # a file of `hyperdb personalize`, or its folder
    to: FilePath = "???"
    to_variant: str | None = None  # of the new base's files, such as fp16
    to_revision: str | None = None  # of the new base's repository
    subspace: int | None = None
    least: float = 0.8  # similarity of the layers that are moved; 0 moves all
    rank: int | None = None  # of the result at most; the least of what goes beyond is left out. null: all of it
    diffusion: DiffusionConfig
    name: str = "default"
    out: FilePath = "runs/transfer/default"

    def __post_init__(self) -> None:
        for name in ("subspace", "rank"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= LARGEST:
                raise UserError(f"{name}={value}: expected 1 to {LARGEST}")
        if not 0 <= self.least <= 1:
            raise UserError(f"least={self.least}: expected a similarity, 0 to 1")


def _pair(change: Change, site: Site) -> LowRank:
    """Return a change as low-rank factors, exactly. Raises `UserError` for one that cannot be merged."""
    import torch

    from hyperdb.adapters.base import LowRank
    from hyperdb.adapters.site import decomposed

    if isinstance(change, LowRank):
        return change
    found = [(u, s[:, None] * vt) for u, s, vt in map(decomposed, change.dense(site.weight()))]
    up, down = (torch.stack(side) for side in zip(*found, strict=True))
    return LowRank(down.unflatten(2, site.shape[1:]), up)


def move(
    change: Change, site: Site, onto: Site | None, subspace: int, config: Config
) -> tuple[LowRank | None, dict[str, Any]]:
    """Return a layer's change on the new base, None if it is left out, and what is told of the layer.

    `onto` is the new base's layer of that name, None where it has none.
    """
    import torch

    from hyperdb.adapters.lorax import alike, energy, projected, truncated

    change.check(site)
    if site.kind not in ("linear", "conv"):
        return None, {"skipped": f"{site.kind}, no matrix"}
    if onto is None:
        return None, {"skipped": "not in the new base"}
    if onto.shape != site.shape:
        return None, {"skipped": f"{list(onto.shape)} in the new base, {list(site.shape)} in the old"}
    (old_u, _, old_vt), (u, s, vt) = site.svd, onto.svd
    first, kept = max(1, min(subspace, len(s) // 2)), min(subspace, len(s))
    found: dict[str, Any] = {
        "outputs": round(alike(old_u[:, :first], u[:, :first]), 4),
        "inputs": round(alike(old_vt[:first].mT, vt[:first].mT), 4),
    }
    if min(found.values()) < config.least:
        return None, found | {"skipped": "other singular vectors"}
    pair = _pair(change, site)
    if config.subspace is None and torch.equal(site.weight(), onto.weight()):  # nothing lies beyond its own base
        moved = pair if config.rank is None else truncated(pair, config.rank)
    else:
        moved = projected(pair, u[:, :kept], vt[:kept], config.rank)
    whole = energy(pair)
    return moved, found | {"kept": round(energy(moved) / whole, 4) if whole else 1.0}


def words_of(person: Personalization, base: Base, new: Base) -> list[Part]:
    """Return a person's word vectors for the new base; none where it reads other words, or of another width."""
    from hyperdb.adapters import TokenConfig
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site
    from hyperdb.formats.native import Part

    found = []
    for part in person.parts if base.tokenizer.get_vocab() == new.tokenizer.get_vocab() else ():
        if isinstance(part.config, TokenConfig):
            place, *_ = part.layout.layers
            sites = new.sites([place.name])
            if place.name in sites and Site(place.name, sites[place.name]).shape == tuple(place.shape):
                settings = TokenConfig(part.config.row, part.config.start, part.config.vectors)
                found.append(Part(settings, Layout((place,)), {"vector": part.params["vector"]}))
    return found


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["layer", "similarity, inputs", "similarity, outputs", "of the change kept", "not projected"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, row in rows.items():
        cells = [f"{row[key]:.3f}" if key in row else "—" for key in ("inputs", "outputs", "kept")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {row.get('skipped', row.get('word', ''))} |")
    return "\n".join(lines) + "\n"


def run(config: Config) -> Path:
    """Write `out/adapter.safetensors`, `transfer.md` and `transfer.json`, a row a layer; return `out`."""
    from tqdm import tqdm

    from hyperdb.adapters import LiDBConfig
    from hyperdb.adapters.base import moved
    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.site import Site
    from hyperdb.adapters.svdiff import narrowest
    from hyperdb.diffusion.base import Base
    from hyperdb.diffusion.targets import base_hash
    from hyperdb.formats.native import Personalization, find_adapter
    from hyperdb.runtime.files import hash_files, save_json, save_text
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe

    file = find_adapter(config.adapter)
    person = Personalization.load(file)
    if person.has_contexts:
        raise UserError(
            f"{file} is of P+, whose vectors no weight can stand for; let its base steer the new one: "
            f"hyperdb train_xadapter {typed('to', config.to)}"
        )
    base = Base.load(config.diffusion)
    targets = base.targets()
    Layout.of(targets).require(person.layout, str(file))
    if person.base not in ("", here := base_hash(targets)):
        raise UserError(
            f"{file} was made for base {person.base}, and {config.diffusion.path} is {here}; name its own with "
            "diffusion=NAME or diffusion.path=FOLDER"
        )
    to = replace(config.diffusion, path=config.to, variant=config.to_variant, revision=config.to_revision)
    new = Base.load(to)
    made_from = {**recipe(config), "adapter": hash_files([file]), "base": base.digest, "to": new.digest}
    out = claim(config.out, WRITES, made_from)

    # --- project, layer by layer
    changes = moved(person.changes(), base.device)
    old_sites, new_sites = base.sites(changes), new.sites(changes)
    subspace = config.subspace or (LARGEST if new.digest == base.digest else narrowest(person.layout))
    factors, rows = {}, {}
    for name, change in tqdm(changes.items(), desc="layers", unit="layer", dynamic_ncols=True):
        onto = Site(name, new_sites[name]) if name in new_sites else None
        pair, rows[name] = move(change, Site(name, old_sites[name]), onto, subspace, config)
        if pair is not None:
            factors[name] = pair
    carried = words_of(person, base, new)
    for part in carried:
        rows[part.layout.names[0]] = {"word": "as it is"}
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    if not factors and len(rows) > len(carried):
        name, why = next(iter(skipped.items()))
        raise UserError(
            f"nothing of {file} can be moved to {config.to}: the first of its {len(rows)} layers is {name} ({why}, "
            f"similarity {min(rows[name].get('inputs', 0), rows[name].get('outputs', 0)):.2f}, least={config.least:g})"
        )

    # --- write, beside the table
    layout, empty = Layout.of(new.targets()), LiDBConfig()
    tokens = empty.build(layout).init(1)["tokens"][0]
    words = (base_hash(new.targets()), person.rare_token, person.class_word)
    saved = Personalization(layout, tokens if factors else None, empty, *words, factors, parts=carried)
    saved.save(out / "adapter.safetensors")
    told = {"base": base.digest, "to": new.digest, "subspace": subspace, "layers": rows, "skipped": skipped}
    save_json(out / "transfer.json", told | {"provenance": provenance()})
    save_text(out / "transfer.md", _table(rows))
    print(f"{len(factors)} of {len(rows)} layers moved{', and the word as it is' if carried else ''}")
    if factors:
        least = min(min(rows[name]["inputs"], rows[name]["outputs"]) for name in factors)
        kept = sum(rows[name]["kept"] for name in factors) / len(factors)
        print(f"similarity {least:.2f} and more, {kept:.0%} of a change kept")
    for why in dict.fromkeys(skipped.values()):
        names = [name for name in skipped if skipped[name] == why]
        print(f"left out ({why}): {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    print(f"every layer's figures: {out / 'transfer.md'}")
    print(f"next: hyperdb generate {typed('adapter', config.out)}{chosen('diffusion', new.config)}")
    return out
