"""Hybrid guidance in plain diffusers: a `StableDiffusionPipeline` whose pictures are those of our own sampler.

    pipe = HybridPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.personalize(Personalization.load("adapter.safetensors"))
    pipe("a pencil sketch of a [V] face", guidance_scale=7.5, subject_guidance=7.5).images[0].save("sketch.png")

Everything else is the pipeline's own: schedulers, `num_images_per_prompt`, latents, callbacks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from hyperdb.adapters.inject import Injection
from hyperdb.diffusion import PLACEHOLDER
from hyperdb.diffusion.guidance import Guidance, without_subject
from hyperdb.formats.native import Personalization
from hyperdb.runtime.errors import UserError


class HybridPipeline(StableDiffusionPipeline):
    """A pipeline that guides towards the prompt and towards the person apart (`hyperdb.diffusion.guidance`)."""

    _person: Personalization | None = None
    _subject: float | None = None  # of the call in progress
    _hyperdb_injection: Injection

    def personalize(self, person: Personalization, strength: float = 1.0) -> Injection:
        """Put a person on in place of any other; `remove()` on what is returned takes it off.

        From now on `[V]` in prompts stands for the rare token.
        """
        self._person = person
        return person.apply(self, strength)

    @torch.no_grad()
    def __call__(self, *args: Any, subject_guidance: float | None = None, **more: Any) -> Any:
        """Draw as the pipeline does; with `subject_guidance`, `guidance_scale` guides towards the prompt alone."""
        if subject_guidance is None:
            return super().__call__(*args, **more)
        if self._person is None:
            raise UserError("subject_guidance needs a person: call personalize(...) of this pipeline first")
        self._subject = subject_guidance
        hooks = [
            self.unet.register_forward_pre_hook(self._blocks, with_kwargs=True),
            self.unet.register_forward_hook(self._combine),
        ]
        try:
            return super().__call__(*args, **more)
        finally:
            self._subject, self._hyperdb_injection.plain = None, 0
            for hook in hooks:
                hook.remove()

    def encode_prompt(
        self, prompt: Any, device: Any, num_images_per_prompt: Any, do_classifier_free_guidance: bool,
        negative_prompt: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        """Encode as the pipeline does; in hybrid guidance also what the base alone is asked for."""
        prompt, negative = self._words(prompt), self._words(negative_prompt)
        if self._subject is None or self._person is None:
            apart = prompt is not None and do_classifier_free_guidance and more.get("negative_prompt_embeds") is None
            if not apart or self._person is None or not self._person.has_contexts:
                return super().encode_prompt(
                    prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative, **more
                )
            # else the negative prompt would be filled up to as many words as all contexts have together
            words = negative or ""
            if isinstance(words, str) and not isinstance(prompt, str):
                words = [words] * len(prompt)
            p, n = (
                super(HybridPipeline, self).encode_prompt(text, device, num_images_per_prompt, False, **more)[0]
                for text in (prompt, words)
            )
            return p, n
        if prompt is None or more.get("negative_prompt_embeds") is not None:
            raise UserError("subject_guidance needs the prompts as text, not as embeddings")
        names, noun = (PLACEHOLDER, self._person.rare_token), self._person.class_word
        texts = [prompt] if isinstance(prompt, str) else prompt
        anybody = [without_subject(text, names, noun) for text in texts]
        plain = anybody[0] if isinstance(prompt, str) else anybody  # of one type with the negative prompt
        with self._hyperdb_injection.using({}):
            b, u = super().encode_prompt(plain, device, num_images_per_prompt, True, negative, **more)
        p, _ = super().encode_prompt(prompt, device, num_images_per_prompt, False, **more)
        self._guide = Guidance(self.guidance_scale, self._subject)
        # several contexts of an adapter stand one after another; who has none of it reads one as often
        u, b = (x.repeat(1, p.shape[1] // x.shape[1], 1) for x in (u, b))
        self._context = torch.cat([{"u": u, "b": b, "p": p}[block] for block in self._guide.blocks])
        return p, u if do_classifier_free_guidance else None

    def _words(self, prompt: Any) -> Any:
        """Put the rare token in the place of `[V]`."""
        if self._person is None or prompt is None:
            return prompt
        if isinstance(prompt, str):
            return prompt.replace(PLACEHOLDER, self._person.rare_token)
        return [text.replace(PLACEHOLDER, self._person.rare_token) for text in prompt]

    def _blocks(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give the UNet the rows of hybrid guidance instead of the pipeline's one or two blocks of the same latents."""
        if kwargs.get("added_cond_kwargs"):
            raise UserError("subject_guidance does not go together with an IP-Adapter")
        blocks = len(self._guide.blocks)
        self._rows, latents = len(args[0]), args[0][: len(self._context) // blocks]
        self._hyperdb_injection.plain = self._guide.plain
        return (latents.repeat(blocks, 1, 1, 1), *args[1:]), {**kwargs, "encoder_hidden_states": self._context}

    def _combine(self, unet: Any, args: Any, out: tuple[Tensor]) -> tuple[Tensor]:
        """Return the guided prediction in every block that the pipeline takes: guided again, it stays what it is."""
        self._hyperdb_injection.plain = 0
        guided = self._guide.combine(out[0])
        return (guided.repeat(self._rows // len(guided), 1, 1, 1),)
