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
    """A base model and how it is asked for pictures.

    `path` is a folder, a hub id, `package:NAME`, or one `.safetensors` checkpoint as other tools use them, of which
    `config` (a folder or hub id; null: Stable Diffusion 1.5's) gives configuration and tokenizer; `[V]` in prompts
    stands for `rare_token`; `crop` scales the FFHQ crop that photos of faces get (1 = FFHQ) and `size` is the side of
    the images in pixels. `attention` is sdpa or eager; eager trains 3 times faster on a CPU at 16 x 16 latents, where
    the fused backward in bf16 is slow. With `checkpointing` the UNet's activations are computed again in the backward
    pass instead of being kept. `guidance` is towards the prompt; with `subject_guidance` it is the base alone that is
    guided there, and this one is from anybody to the person (`hyperdb.diffusion.guidance`); null guides the
    personalised network towards both at once.
    """

    path: FilePath = "package:embedded/base"
    config: FilePath | None = None
    variant: str | None = None
    revision: str | None = None
    rare_token: str = "sks"
    class_word: str = "face"
    size: int = 64
    crop: float = 0.8
    dtype: str = "bf16"
    steps: int = 20
    guidance: float = 3.0
    subject_guidance: float | None = None
    attention: str = "sdpa"
    checkpointing: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise UserError(f"diffusion.dtype={self.dtype!r}: expected fp32, bf16 or fp16")
        if self.attention not in ("sdpa", "eager"):
            raise UserError(f"diffusion.attention={self.attention!r}: expected sdpa or eager")
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
