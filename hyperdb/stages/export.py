"""Write an adapter as a file that other tools load: kohya (ComfyUI, Forge, A1111), diffusers, PEFT, or our own.

What is of low rank is folded into one LoRA. A DoRA is written as one for diffusers and PEFT, a word vector as an
embedding, and what has no form that other tools read is refused.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.runtime.errors import UserError, first_line
from hyperdb.runtime.paths import FilePath

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor

    from hyperdb.formats.native import Part, Personalization

FORMATS = ("kohya", "diffusers", "peft", "native", "textual_inversion", "a1111")
PICTURES = "pictures.png"  # of `hyperdb personalize`, beside the adapter
PEFT_FILES = ("model.safetensors", "config.json")
DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


@dataclass
class Config:
    """What is written, and in which format.

    `format` decides who can read the file. `kohya` is the one that ComfyUI, Forge and A1111 read, and diffusers too.
    `diffusers` is for `pipe.load_lora_weights`, and `peft` for `PeftModel.from_pretrained`, with one folder for the
    UNet and one for the text encoder. `textual_inversion` writes a word vector for `pipe.load_textual_inversion`.
    `a1111` writes a hypernetwork of A1111, as safetensors.
    `native` is hyperdb's own format, to keep the adapter in fewer bytes. `docs/formats.md` says which adapters each
    can hold.

    The change is multiplied by `strength` before it is written, so that a tool which loads it at full weight gets that
    strength.

    With `push_to_hub=org/name` what was written goes into that repository of the Hugging Face hub, with a model card
    and the pictures that `hyperdb personalize` drew of the person, without the photo. A repository that is there
    already keeps a card and pictures of something else, and is refused if it is public without `private=false`. The
    token is the one of `hf auth login` or of HF_TOKEN. With `upload=false` only what would be sent is said.
    """

    adapter: FilePath = "???"  # a file of `hyperdb personalize`, or its folder
    format: str = "kohya"  # kohya, diffusers, peft, textual_inversion, a1111 or native
    strength: float = 1.0  # 1 is the person as trained, 0 the base
    dtype: str = "fp16"  # fp32 or fp16; with format=native also int8
    name: str = "default"  # of the file, without .safetensors, and the title in the model card
    out: FilePath = "runs/export/default"  # folder that is written
    push_to_hub: str | None = None  # repository to upload to, org/name; null: none
    private: bool = True  # the repository, if it is new: a face is nobody else's to publish
    upload: bool = True  # false: only say what would be uploaded

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"format={self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.dtype == "int8" and self.format != "native":
            raise UserError(f"dtype=int8: other tools read no such {self.format} file; use format=native, or fp16")
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            raise UserError(f"name={self.name!r}: expected a name, not a path; the folder is out=FOLDER")
        if not Path(self.name).name.strip(". ") or self.name.endswith("/"):
            raise UserError(f"name={self.name!r}: expected the name of a file, without .safetensors")
        if not math.isfinite(self.strength):
            raise UserError(f"strength={self.strength}: expected a finite number")
        if self.push_to_hub is not None:
            _check_repository(self.push_to_hub)


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    expected = UserError(f"push_to_hub={name!r}: expected a repository of the hub, org/name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise expected from error
    if "/" not in name:
        raise expected


def run(config: Config) -> Path:
    """Write `out/NAME.safetensors` (peft: `out/unet`, `out/text_encoder`) and a model card; return `out`."""
    import torch

    from hyperdb.adapters.base import LowRank, scale
    from hyperdb.adapters.layout import SD15
    from hyperdb.faces.image import read_text
    from hyperdb.formats import a1111, embedding, lora
    from hyperdb.formats.native import Personalization, find_adapter
    from hyperdb.runtime.files import hash_files, save_text
    from hyperdb.runtime.output import claim, is_free
    from hyperdb.runtime.recipe import recipe

    if config.push_to_hub is not None and config.upload:
        _require_token()
    file = find_adapter(config.adapter)
    person = Personalization.load(file)
    made_from = {**recipe(config), "name": config.name, "adapter": hash_files([file])}
    names = [f"{part}/adapter_{what}" for part in ("unet", "text_encoder") for what in PEFT_FILES]
    names = names if config.format == "peft" else [f"{glob.escape(config.name)}.safetensors"]
    # several adapters may stand in one folder, as tools keep them: the second card is called after its own
    card = "README.md" if is_free(config.out, "README.md", made_from) else f"{config.name}.md"
    names.append(glob.escape(card))
    out, dtype = claim(config.out, names, made_from), getattr(torch, DTYPES[config.dtype])
    words = f"{person.rare_token} {person.class_word}"
    if config.format == "textual_inversion":
        words = f"{embedding.word(config.name)} {person.class_word}"
    written = out if config.format == "peft" else out / f"{config.name}.safetensors"
    if config.format == "native":
        _scaled(person, config.strength).save(written, dtype)
    else:
        metadata = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": config.name,
            "modelspec.trigger_phrase": words,
            "hyperdb.source": hash_files([file]),
            "hyperdb.base": person.base,
            "hyperdb.strength": str(config.strength),
        }
        if person.layout.digest == SD15:
            metadata |= {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
            if what := {"textual_inversion": "textual-inversion", "a1111": None}.get(config.format, "lora"):
                metadata["modelspec.architecture"] = f"stable-diffusion-v1/{what}"
        elif any(layer.name.endswith("attn2.to_k") and layer.in_ == 1024 for layer in person.layout.layers):
            # A1111 lists a file beside Stable Diffusion 2 by these
            metadata |= {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
        if config.format == "textual_inversion":
            embedding.write(written, config.name, _vector(person, config.strength), metadata, dtype)
        elif config.format == "a1111":
            a1111.write(written, _only(person, "a1111", config.strength), metadata, dtype)
        elif (turned := _turned(person, config.strength)) is not None:
            factors = {name: LowRank(*change.tensors[:2]) for name, change in turned.items()}
            magnitudes = {name: change.tensors[2][0] for name, change in turned.items()}
            lora.write(written, factors, config.format, metadata, dtype, magnitudes)
        else:
            lora.write(written, scale(person.factors(), config.strength), config.format, metadata, dtype)
    save_text(out / card, _card(config, person, words))
    print(f"{config.format} adapter in {written}; the words that call the person: {words!r}")
    if config.push_to_hub is not None:
        files = {path.relative_to(out).as_posix(): path for name in names[:-1] for path in sorted(out.glob(name))}
        pictures = file.parent / PICTURES
        ours = pictures.is_file() and read_text(pictures).get("software") == "hyperdb"
        _push(config, files, pictures if ours else None, lambda shown: _card(config, person, words, shown))
    return out


def _require_token() -> None:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or set upload=false")
    if get_token() is None:
        raise UserError("push_to_hub: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")


def _push(config: Config, files: dict[str, Path], pictures: Path | None, card: Callable[[str | None], str]) -> None:
    """Upload files, by their names in the repository, pictures and the card in one commit, or say which they are.

    `card` makes the card that shows pictures of a name. Where the repository has a card of something else, this one and
    its pictures are called after the adapter. Raises `UserError` for a public repository that should be private.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    from hyperdb.runtime.version import __version__

    to = config.push_to_hub or ""

    def contents(there: Collection[str] = ()) -> dict[str, str | bytes]:
        known, own = "README.md" in there, f"{config.name}.md"
        other = known and (own in there or not any(name in there for name in files))
        sheet = None if pictures is None else f"{config.name}.png" if other else PICTURES
        found: dict[str, str | bytes] = {own if other else "README.md": card(sheet).encode()}
        found |= {name: str(path) for name, path in files.items()}
        return found if sheet is None else {**found, sheet: str(pictures)}

    if not config.upload:
        print(f"would be uploaded to {to}, which would be {'private' if config.private else 'public'} if it is new:")
        for name, what in contents().items():
            print(f"  {name}, {len(what) if isinstance(what, bytes) else Path(what).stat().st_size:,} bytes")
        return
    api = HfApi(library_name="hyperdb", library_version=__version__)
    try:
        api.create_repo(to, private=config.private, exist_ok=True)
        there = api.model_info(to)
        if config.private and not there.private:
            raise UserError(
                f"push_to_hub={to} is there and public, and nothing was uploaded: name another repository, or allow "
                f"it with private=false; the files stay in {config.out}"
            )
        names = {file.rfilename for file in there.siblings or ()}
        operations = [CommitOperationAdd(name, what) for name, what in contents(names).items()]
        done = api.create_commit(to, operations, commit_message=f"{config.name}, written by hyperdb {__version__}")
    except UserError:
        raise
    except (OSError, ValueError, httpx.HTTPError) as error:
        why = first_line(error)
        raise UserError(f"push_to_hub={to} was not uploaded ({why}); the files stay in {config.out}") from error
    print(f"uploaded: {done.commit_url}")


def _only(person: Personalization, kind: str, strength: float) -> Part:
    """Return the only thing that a person is made of. Raises `UserError` for more, or another strength than 1."""
    parts = [part for part in person.parts if part.kind == kind]
    if len(parts) != 1 or len(person.parts) > 1 or person.tokens is not None or person.relaxed:
        raise UserError(f"{person.source} is not one adapter of kind {kind} alone: no other tool reads that")
    if strength != 1:
        raise UserError(f"strength={strength:g} cannot be baked into an adapter of kind {kind}; set it in its use")
    return parts[0]


def _turned(person: Personalization, strength: float) -> dict[str, Any] | None:
    """Return the changes of a DoRA, None for a person without one."""
    if not any(part.kind == "dora" for part in person.parts):
        return None
    return dict(_only(person, "dora", strength).changes())


def _vector(person: Personalization, strength: float) -> Tensor:
    """Return the word vector `[C]`, or the several `[k, C]`, of a person of Textual Inversion."""
    return _only(person, "token", strength).params["vector"][0]


def _scaled(person: Personalization, strength: float) -> Personalization:
    """Return the same person with `strength` times the residual: B_train and the relaxed up factors carry it."""
    from hyperdb.adapters.base import scale

    if strength == 1:
        return person
    if person.tokens is None or person.parts:
        raise UserError(f"strength={strength:g} cannot be baked into {person.source}: `generate` has a strength too")
    A, B = person.lidb.split(person.tokens)
    return dataclasses.replace(
        person, tokens=person.lidb.join(A, strength * B), relaxed=scale(person.relaxed, strength)
    )


def _card(config: Config, person: Personalization, words: str, pictures: str | None = None) -> str:
    """Return a model card in the hub's form, which shows the `pictures` of that name beside it."""
    files = "the folders unet/ and text_encoder/" if config.format == "peft" else f"`{config.name}.safetensors`"
    use = {
        "peft": 'PeftModel.from_pretrained(pipe.unet, "unet")  # and the same for pipe.text_encoder',
        "textual_inversion": f'pipe.load_textual_inversion("{config.name}.safetensors")',
        "a1111": f'# docs/imports.md of hyperdb turns {config.name}.safetensors into the file that A1111 loads',
        "native": 'Personalization.load("FILE").apply(pipe)  # hyperdb.formats.native',
    }.get(config.format, f'pipe.load_lora_weights("{config.name}.safetensors")')
    others = {"textual_inversion": "textual_inversion", "a1111": "hypernetwork", "native": "adapter"}
    kind = others.get(config.format, "lora")
    return f"""---
library_name: diffusers
tags: [{kind}, text-to-image, hyperdreambooth]
instance_prompt: {words}
---

# {config.name}
{f"{chr(10)}![Pictures of the person]({pictures}){chr(10)}" if pictures else ""}
One person, personalised from one photo with hyperdb (HyperDreamBooth, arXiv 2307.06949): {files}, format
{config.format}, {config.dtype}, strength {config.strength:g} baked in. Base model: {person.base or "unknown"}.

Write `{words}` in a prompt where the person should be:

```python
{use}
pipe("a pencil sketch of a {words}")
```

Use it only with the consent of the person, and say of pictures that they are synthetic.
"""
