"""The frozen base: any Stable Diffusion 1.x folder in diffusers' format. Knows no adapters.

The configuration lives here and imports no torch; `load` reads the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.diffusion.guidance import Guidance, without_subject
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath

if TYPE_CHECKING:
    from hyperdb.diffusion.base import Base

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # the paper's base, on the hub
PLACEHOLDER = "[V]"  # stands for the rare token in every prompt


@dataclass
class DiffusionConfig:
    """A base model, and how it is asked for pictures.

    `path` is a folder in diffusers' format, a hub id, `package:NAME` for one that ships with hyperdb, or one
    `.safetensors` checkpoint as other tools use them. A checkpoint has no configuration and no tokenizer. They are
    taken from `config`, a folder or hub id, where null means those of Stable Diffusion 1.5.

    `[V]` in a prompt stands for `rare_token`. The person is "a [V] face", where `class_word` is the noun. Photos are
    cropped as FFHQ crops faces, with a frame `crop` times as large, and resized to `size`.

    `guidance` is classifier-free guidance towards the prompt. A number for `subject_guidance` parts it in two (hybrid
    guidance, `hyperdb.diffusion.guidance`): `guidance` then leads the base alone towards the prompt, and
    `subject_guidance` leads from anybody to the person. null guides the personalised network towards both at once.

    On a CPU with 16 x 16 latents `attention=eager` trains 3 times faster than `sdpa`, whose fused backward pass is slow
    in bf16. With `checkpointing` the UNet's activations are not kept for the backward pass but computed again.

    `quantise` keeps the weights of the linear layers of UNet and text encoder in `int8` or `nf4` (QLoRA): less memory,
    for a little less likeness to the base as it is. Adapters are trained on top. It needs torchao.
    """

    path: FilePath = "package:embedded/base"
    config: FilePath | None = None
    variant: str | None = None  # of the hub's files, such as fp16
    revision: str | None = None  # of the hub's repository
    rare_token: str = "sks"
    class_word: str = "face"
    size: int = 64  # side of the images in pixels
    crop: float = 0.8  # 1 is the FFHQ crop
    dtype: str = "bf16"  # fp32, bf16 or fp16
    steps: int = 20  # of the sampler
    guidance: float = 3.0
    subject_guidance: float | None = None
    attention: str = "sdpa"  # sdpa or eager
    checkpointing: bool = False
    quantise: str | None = None  # int8 or nf4; null: as they are
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise UserError(f"diffusion.dtype={self.dtype!r}: expected fp32, bf16 or fp16")
        if self.attention not in ("sdpa", "eager"):
            raise UserError(f"diffusion.attention={self.attention!r}: expected sdpa or eager")
        if self.quantise not in (None, "int8", "nf4"):
            raise UserError(f"diffusion.quantise={self.quantise!r}: expected int8, nf4 or null")
        if self.size < 32 or self.size % 8:
            raise UserError(f"diffusion.size={self.size}: expected a multiple of 8, at least 32")
        if not self.rare_token.strip() or PLACEHOLDER in self.rare_token:
            raise UserError(f"diffusion.rare_token={self.rare_token!r}: expected a word of the base's vocabulary")
        if not 0.3 <= self.crop <= 2:
            raise UserError(f"diffusion.crop={self.crop}: expected 0.3 to 2 (1 is the FFHQ crop)")
        if self.steps < 1:
            raise UserError(f"diffusion.steps={self.steps}: expected at least 1")
        self.guide()  # which checks both numbers

    def prompt(self, text: str) -> str:
        """Return `text` with `[V]` replaced by the rare token."""
        return text.replace(PLACEHOLDER, self.rare_token)

    @property
    def instance_prompt(self) -> str:
        """The prompt of every training sample (paper section 4): "a [V] face"."""
        return f"a {self.rare_token} {self.class_word}"

    @property
    def class_prompt(self) -> str:
        """The instance prompt without the rare token."""
        return f"a {self.class_word}"

    def guide(self, personal: bool = True) -> Guidance:
        """Return the guidance of pictures; without an adapter on the base it is the ordinary one."""
        return Guidance(self.guidance, self.subject_guidance if personal else None)

    def plain_prompt(self, text: str) -> str:
        """Return `text` without the person, `[V]` or the rare token: what the base is asked for in hybrid guidance."""
        return without_subject(text, (PLACEHOLDER, self.rare_token), self.class_word)

    def load(self) -> Base:
        """Read the model to train a person on. Raises `UserError` naming what is missing and what to do."""
        from hyperdb.diffusion.base import Base

        base = Base.load(self)
        base.require_rare_token()
        return base


def check_logit_normal(value: list[float] | None) -> None:
    """Raise `UserError` unless `value` is None or the mean and deviation (above 0) of a noise level's logit."""
    if value is not None and (len(value) != 2 or value[1] <= 0):
        raise UserError(f"logit_normal={value}: expected [mean, standard deviation above 0] or null")


def check_subject(name: str, prompts: list[str]) -> None:
    """Raise `UserError` naming the setting `name` unless each of `prompts` says where the person stands."""
    if odd := [text for text in prompts if PLACEHOLDER not in text]:
        raise UserError(f"{name}={odd[0]!r}: write {PLACEHOLDER} where the person is meant")
