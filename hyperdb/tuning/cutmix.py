"""Two people side by side in one picture: Cut-Mix-Unmix (SVDiff, Han et al. 2023, arXiv 2303.11305, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdb.diffusion.loss import stratified_timesteps, target
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.seed import generator
from hyperdb.tuning.prior import Prior, PriorConfig

if TYPE_CHECKING:
    from hyperdb.diffusion.base import Base

PLACES = ("[V1]", "[V2]")  # of the people in the prompt of two, from the left


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Put two portraits `[B, 3, H, W]` uint8 into one picture of that size, each into its half.

    A portrait is made half as large and stands at the foot of its half. Above it is a plain backdrop, of the mean
    colour of its upper corners. The paper cuts whole pictures in two, which would leave half a face of a portrait.
    """
    halves = []
    for images in (left, right):
        small = F.avg_pool2d(images.float(), 2)  #                                     [B, 3, H / 2, W / 2]
        corners = small[:, :, :1, [0, -1]].mean(3, keepdim=True)
        above = corners.expand(-1, -1, images.shape[2] - small.shape[2], small.shape[3])
        halves.append(torch.cat([above, small], 2))  #                                 [B, 3, H, W / 2]
    return torch.cat(halves, 3).round().byte()


def of_two(prompt: str, left: str, right: str) -> str:
    """Return the prompt of two people with their words in the places `[V1]` and `[V2]`."""
    return prompt.replace(PLACES[0], left).replace(PLACES[1], right)


def of_nobody(prompt: str, class_prompt: str, noun: str) -> str:
    """Return a class prompt followed by what the prompt of two says of the second person, as of anybody.

    "a photo of a [V1] face and a [V2] face" makes of "a sketch of a face" "a sketch of a face and a face". Raises
    `UserError` for a prompt that does not name both people, the first before the second.
    """
    head, first, tail = prompt.partition(f"{PLACES[0]} {noun}")
    if not first or PLACES[1] not in tail or any(place in head for place in PLACES):
        raise UserError(
            f"prompt={prompt!r}: expected {PLACES[0]} before {noun!r}, the class word, and {PLACES[1]} after it"
        )
    return class_prompt + tail.replace(f"{PLACES[1]} ", "")


@dataclass
class Scenes:
    """What the views of a training show, where they are not all of one person under one prompt.

    View k has the prompt of the token ids `ids [K, L]` and is drawn in a share `odds [K]` of the rows. `places [K, 2]`
    are the tokens of the person on the left and of the one on the right, -1 in views of a single person. `unmix` is the
    weight of `penalty`.
    """

    ids: Tensor
    odds: Tensor
    places: Tensor
    unmix: float
    unet: nn.Module
    maps: list[tuple[int, Tensor]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the maps of the attention to the text of every pass within a block, if they count."""
        seen: list[tuple[Attention, object]] = []
        self.maps = []

        def keep(attention: Attention) -> None:
            scores, heads = attention.get_attention_scores, attention.heads

            def kept(*inputs: Tensor) -> Tensor:
                found: Tensor = scores(*inputs)
                self.maps.append((heads, found))
                return found

            seen.append((attention, attention.processor))
            attention.get_attention_scores = kept
            attention.set_processor(AttnProcessor())  # a fused one has no map

        try:
            for module in self.unet.modules() if self.unmix else ():
                if isinstance(module, Attention) and module.is_cross_attention:
                    keep(module)
            yield
        finally:
            for attention, processor in seen:
                del attention.get_attention_scores
                attention.set_processor(processor)

    # mean over layers and heads of |M_left|^2 on the right and |M_right|^2 on the left
    def penalty(self, views: Tensor) -> Tensor:
        """Return how much the words of two people attend to each other's half, over the first rows of a pass.

        `views [S]` are those rows' views. The mean squares of the two maps in the wrong halves are added up, and
        averaged over heads, layers and rows; a view of a single person counts 0. Of an odd side the middle column is
        in no half.
        """
        views = views.to(self.places.device)
        mixed = (self.places[views, 0] >= 0).nonzero()[:, 0]
        places = self.places[views[mixed]]  #                                          [M, 2]
        found = []
        for heads, scores in self.maps:
            side = isqrt(scores.shape[1])
            half = side // 2
            if half and len(mixed):
                rows = scores.unflatten(0, (-1, heads))[mixed].float()  #              [M, heads, side^2, L]
                index = places[:, None, None].expand(*rows.shape[:3], 2)
                maps = rows.gather(3, index).unflatten(2, (side, side))  #             [M, heads, side, side, 2]
                wrong = maps[..., side - half :, 0].square() + maps[..., :half, 1].square()
                found.append(wrong.mean((1, 2, 3)).sum() / len(views))
        return self.unmix * torch.stack(found).mean() if found else self.places.new_zeros((), dtype=torch.float32)


def scenes(
    base: Base, crops: Tensor, words: tuple[str, str], prompt: str, mix: float, unmix: float
) -> tuple[Tensor, Scenes]:
    """Return the latents `[1, 4, 2, c, h, w]` of two people's photos `crops [2, 3, H, W]` uint8, and what they show.

    That is each person alone, and both side by side in either order, which a share `mix` of the rows shows. `words`
    call the two people. Raises `UserError` for a prompt in which the base does not see both words.
    """
    first, second = crops[:1], crops[1:]
    views = torch.cat([crops, side_by_side(first, second), side_by_side(second, first)])
    noun, orders = base.config.class_word, (words, words[::-1])
    ids = base.tokenize([f"a {word} {noun}" for word in words] + [of_two(prompt, *order) for order in orders])
    tokens = {word: base.tokenizer(word, add_special_tokens=False).input_ids for word in words}
    places = ids.new_full((4, 2), -1)
    for row, order in enumerate(orders, 2):
        for side, word in enumerate(order):
            where = (ids[row] == tokens[word][0]).nonzero()[:, 0]
            if not len(where):
                raise UserError(f"prompt={prompt!r} is too long: the base does not see {word!r} in it")
            places[row, side] = where[0]
    odds = torch.tensor([1 - mix, 1 - mix, mix, mix]) / 2
    return base.moments(views)[None], Scenes(ids, odds, places, unmix, base.unet)


def with_pairs(base: Base, prior: Prior, config: PriorConfig, prompt: str, mix: float) -> Prior:
    """Return a prior of which a share `mix` of the class pictures are pairs side by side, of one class prompt each.

    The base was never shown such pictures, so that a pair has its noise in the place of the base's prediction.
    """
    images, levels, kinds = prior.latents.shape[1], prior.latents.shape[0], len(config.prompts)
    count = round(images * mix / (1 - mix))
    if not count:
        return prior
    g = generator(config.seed, "pairs")
    first = torch.randint(0, images, (count,), generator=g)
    kind = first % kinds  # picture i is of prompt i % kinds
    alike = (images - kind + kinds - 1) // kinds
    second = kind + kinds * (torch.rand(count, generator=g) * alike).long()
    pictures = base.decode(prior.latents[0])
    latents = base.moments(side_by_side(pictures[first], pictures[second]))[:, 0]
    t = stratified_timesteps(count, levels, base.schedule.config.num_train_timesteps, g).mT  #  [levels, count]
    noise = torch.randn((*t.shape, *base.latent_shape), generator=g)
    z, noise, t = (x.to(base.device) for x in (latents.expand_as(noise), noise, t))
    wanted = target(base.schedule, z.flatten(0, 1), noise.flatten(0, 1), t.flatten()).view_as(noise)
    prompts = [of_nobody(prompt, config.prompts[k], base.config.class_word) for k in kind.tolist()]
    pairs = (z, noise, t, base.tokenize(prompts).expand(*t.shape, -1), wanted)
    alone = (prior.latents, prior.noise, prior.timesteps, prior.ids, prior.own)
    return Prior(*(torch.cat(both, 1) for both in zip(alone, pairs, strict=True)))
