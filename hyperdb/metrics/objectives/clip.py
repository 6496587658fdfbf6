"""Train a small CLIP on renders and their captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from hyperdb.heads import RARE_TOKEN, prompt
from hyperdb.metrics.clip import Clip
from hyperdb.metrics.obedience import SIDE
from hyperdb.metrics.objectives import ClipConfig
from hyperdb.metrics.objectives.objective import Objective, pixels
from hyperdb.metrics.objectives.unseen import probed, told_apart
from hyperdb.metrics.pretrained import WEIGHTS
from hyperdb.runtime.files import save_tensors, writing

if TYPE_CHECKING:
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base

HEAD = 32  # width of an attention head
SHARPEST = 100.0  # what cosines are multiplied by at most (Radford et al. 2021, section 2.5)


def contrast(seen: Tensor, said: Tensor, caption: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return how badly pictures `[B, C]` and their captions `[B, C]`, of length 1, find each other among the others.

    `caption [B]` numbers them: pictures of one caption are no wrong answers for each other.
    """
    own = torch.arange(len(caption), device=caption.device)
    repeated = (caption[:, None] == caption) & (own[:, None] != own)
    logits = (scale * seen @ said.mT).masked_fill(repeated, -torch.inf)  #             [B, B]
    return {"caption": F.cross_entropy(logits, own), "picture": F.cross_entropy(logits.mT, own)}


class ClipObjective(Objective):
    """A picture's caption among those of a step, and a caption's picture. The word that means nobody is left out."""

    def __init__(self, config: ClipConfig, people: People, seen: Tensor, base: Base) -> None:
        super().__init__(people, seen)
        plain = [" ".join(word for word in text.split() if word != RARE_TOKEN) for text in people.captions]
        self.captions = sorted(set(plain))
        number = {text: i for i, text in enumerate(self.captions)}
        self.caption = torch.tensor([number[text] for text in plain])
        self.tokenizer, length = base.tokenizer, base.tokenizer.model_max_length
        words = self.tokenizer(self.captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        self.ids = words.input_ids  #                                                  [captions, L]
        ends = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

        def layers(width: int, count: int) -> dict[str, int]:
            heads = {"num_hidden_layers": count, "num_attention_heads": width // HEAD}
            return {"hidden_size": width, "intermediate_size": 4 * width, **heads}

        self.net = CLIPModel(
            CLIPConfig(
                text_config={
                    **layers(config.text_width, config.text_layers), **ends,
                    "vocab_size": len(self.tokenizer), "max_position_embeddings": length,
                },
                vision_config={**layers(config.width, config.layers), "image_size": SIDE, "patch_size": config.patch},
                projection_dim=config.text_width,
            )
        )  # fmt: skip

    def forward(self, images: Tensor, rows: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the features of the pictures and of their captions, `[B, C]` each."""
        ids = self.ids[self.caption[rows]].to(images.device)
        seen = self.net.get_image_features(pixel_values=pixels(images)).pooler_output
        return seen, self.net.get_text_features(input_ids=ids).pooler_output

    def loss(self, found: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return a term of captions and one of pictures."""
        seen, said = (F.normalize(x.float(), dim=-1) for x in found)
        return contrast(seen, said, self.caption[rows].to(seen.device), self.net.logit_scale.exp().clamp(max=SHARPEST))

    def save(self, out: Path, metadata: dict[str, str]) -> Clip:
        """Write the folder `out/judge` as transformers has it, the weights in fp16."""
        folder, half = out / "judge", [0.5] * 3
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        with writing(folder):
            self.net.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            CLIPImageProcessor(**size, resample=2, image_mean=half, image_std=half).save_pretrained(folder)  # bilinear
        state = {name: value.half() for name, value in self.net.state_dict().items()}
        save_tensors(folder / WEIGHTS, state, {"format": "pt", **metadata})
        return Clip(str(folder), self.net.device)

    def measure(self, judge: Clip, images: Tensor, rows: Tensor) -> dict[str, dict[str, float]]:
        """Return how often the right one comes first among the distinct captions, and among the pictures.

        A picture is right for every caption like its own. Style and place are found by `heads.prompt`: the style by its
        bare prompt, the place by those of the right style. Of the pictures alone, how well they tell people apart, and
        style and place by a linear probe.
        """
        seen = judge(images)
        some, own = self.caption[rows].unique(return_inverse=True)
        scores = seen @ judge.words([self.captions[i] for i in some.tolist()]).mT  #   [N, captions]
        first = {"caption": scores.argmax(1) == own, "picture": own[scores.argmax(0)] == torch.arange(len(some))}
        styles, places = self.people.names["style"], self.people.names["place"]
        style, place = (self.people.labels[name][rows] for name in ("style", "place"))
        bare = judge.words([prompt(name) for name in styles])
        placed = judge.words([prompt(name, place=where) for name in styles for where in places])
        placed = placed.unflatten(0, (len(styles), len(places)))[style]  #             [N, places, C]
        named = {
            "style": (seen @ bare.mT).argmax(1) == style,
            "place": (placed @ seen[..., None])[..., 0].argmax(1) == place,
        }
        figures = {"recall1": first, "accuracy": named}
        shares = {figure: {k: hits.float().mean().item() for k, hits in of.items()} for figure, of in figures.items()}
        return shares | told_apart(seen, self.people, rows) | {"probe": probed(seen, self.people, rows)}
