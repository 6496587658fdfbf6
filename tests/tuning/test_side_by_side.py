"""Two people side by side: the mixed pictures and the regulariser by hand, and the gradient that it gives."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from hyperdb.adapters import LoRAConfig, SVDiffConfig
from hyperdb.adapters.inject import Injection
from hyperdb.diffusion.loss import predict
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.cutmix import Scenes, of_nobody, scenes, side_by_side, with_pairs
from hyperdb.tuning.fit import FitConfig, fit
from hyperdb.tuning.prior import PriorConfig
from hyperdb.tuning.trainable import trainable

PROMPT = "a photo of a [V1] face, a [V2] face"


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def test_each_portrait_stands_at_the_foot_of_its_half():
    left = torch.tensor([[10, 20, 30, 40], [10, 20, 30, 40], [1, 1, 5, 5], [3, 3, 7, 7]]).byte()
    right = torch.full((4, 4), 200).byte()
    mixed = side_by_side(*(x.expand(1, 3, 4, 4) for x in (left, right)))
    by_hand = [[25, 25, 200, 200], [25, 25, 200, 200], [15, 35, 200, 200], [2, 6, 200, 200]]
    assert torch.equal(mixed, torch.tensor(by_hand).byte().expand(1, 3, 4, 4))


def test_the_prompt_of_a_pair_of_class_pictures():
    assert of_nobody(PROMPT, "a cartoon of a face", "face") == "a cartoon of a face, a face"
    beside = "a photo of a [V1] face on the left and a [V2] face on the right"
    assert of_nobody(beside, "a face", "face") == "a face on the left and a face on the right"


@pytest.mark.parametrize("odd", ["a [V1] face", "a [V2] face, a [V1] face", "a [V1] man, a [V2] man", "a face"])
def test_a_prompt_that_does_not_name_both_is_refused(odd):
    with pytest.raises(UserError, match=r"expected \[V1\] before 'face', the class word, and \[V2\] after it"):
        of_nobody(odd, "a face", "face")


def test_the_regulariser_by_hand():
    """Two rows, the second of both people: one head, 2 x 2 queries, three tokens."""
    places = torch.tensor([[-1, -1], [1, 2]])
    shows = Scenes(torch.zeros(2, 3), torch.ones(2), places, 0.5, torch.nn.Identity())
    alone = torch.full((4, 3), 0.9)  # counts nothing
    both = torch.tensor([[0.0, 0.1, 0.2], [0.0, 0.3, 0.4], [0.0, 0.5, 0.6], [0.0, 0.7, 0.8]])
    shows.maps = [(1, torch.stack([alone, both]))]
    # token 1 on the right: queries 1 and 3; token 2 on the left: queries 0 and 2; half of the rows are mixed
    expected = 0.5 * ((0.3**2 + 0.7**2) / 2 + (0.2**2 + 0.6**2) / 2) / 2
    assert shows.penalty(torch.tensor([0, 1])).item() == pytest.approx(expected)
    shows.maps.append((1, torch.zeros(2, 4, 3)))  # another layer, where nothing is wrong
    shows.maps.append((1, torch.ones(2, 1, 3)))  # a picture of one place has no halves
    assert shows.penalty(torch.tensor([0, 1])).item() == pytest.approx(expected / 2)
    shows.maps = [(1, torch.stack([alone, alone]))]
    assert shows.penalty(torch.tensor([0, 0])).item() == 0


def test_the_maps_are_those_of_the_attention_and_nothing_stays(base):
    moments, shows = scenes(base, pictures(2), ("sks", "zwx"), PROMPT, 0.6, 1.0)
    assert moments.shape[:3] == (1, 4, 2)
    assert shows.odds.tolist() == pytest.approx([0.2, 0.2, 0.3, 0.3])
    words = [[base.tokenizer.decode([shows.ids[row, place]]).strip() for place in shows.places[row]] for row in (2, 3)]
    assert words == [["sks", "zwx"], ["zwx", "sks"]]
    attentions = [m for m in base.unet.modules() if isinstance(m, Attention)]
    before = [m.processor for m in attentions]
    z, noise, t = moments[0, :, 0], torch.randn(4, *base.latent_shape), torch.full((4,), 500)
    with torch.no_grad():
        plain = predict(base, z, noise, t, shows.ids)
        with shows.watching():
            watched = predict(base, z, noise, t, shows.ids)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    assert len(shows.maps) == sum(m.is_cross_attention for m in attentions) > 0
    for heads, found in shows.maps:
        assert len(found) == 4 * heads
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))
    assert [m.processor for m in attentions] == before
    assert not any("get_attention_scores" in m.__dict__ for m in attentions)


@pytest.mark.parametrize("settings", [SVDiffConfig(), LoRAConfig()])
def test_its_gradient_reaches_the_adapter_and_lowers_it(base, settings):
    moments, shows = scenes(base, pictures(2), ("sks", "zwx"), PROMPT, 0.6, 1.0)
    _, adapter = trainable(base, settings)
    modules = base.sites(adapter.layout.names)
    views, z = torch.arange(4), moments[0, :, 0]
    noise, t = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), torch.full((4,), 500)
    injection = Injection(modules)
    params = adapter.init(1, injection.sites)
    g = torch.Generator().manual_seed(2)
    params = {k: (v + 0.01 * torch.randn(v.shape, generator=g)).requires_grad_() for k, v in params.items()}

    def penalty(params):
        with injection.using(adapter.changes(params)), shows.watching():
            predict(base, z, noise, t, shows.ids)
        return shows.penalty(views)

    found = penalty(params)
    grads = torch.autograd.grad(found, list(params.values()), allow_unused=True)
    keys = [name for name, grad in zip(params, grads, strict=True) if grad is not None and "attn2.to_k" in name]
    assert all(grads[list(params).index(name)].abs().sum() > 0 for name in keys)
    assert keys
    length = sum(grad.square().sum() for grad in grads if grad is not None).sqrt()
    stepped = {
        k: v if grad is None else v - 0.05 * grad / length for (k, v), grad in zip(params.items(), grads, strict=True)
    }
    assert penalty(stepped).item() < found.item()
    injection.remove()


def test_a_training_with_it_attends_less_to_the_wrong_half(base):
    moments, shows = scenes(base, pictures(2), ("sks", "zwx"), PROMPT, 0.9, 1.0)
    _, adapter = trainable(base, LoRAConfig(sites="cross_kv"))
    config = FitConfig(steps=12, levels=4, rate=0.02)
    z, noise = moments[0, :, 0], torch.randn(moments[0, :, 0].shape, generator=torch.Generator().manual_seed(1))
    found = {}
    for unmix in (0.0, 300.0):
        shows.unmix = unmix
        params = fit(base, adapter, moments, config, scenes=shows)
        shows.unmix = 1.0
        injection = Injection(base.sites(adapter.layout.names))
        with torch.no_grad(), injection.using(adapter.changes(params)), shows.watching():
            predict(base, z, noise, torch.full((4,), 500), shows.ids)
        found[unmix] = shows.penalty(torch.arange(4)).item()
        injection.remove()
    assert found[300.0] < 0.8 * found[0.0]


def test_pairs_of_class_pictures_stand_beside_them_under_their_prompt(base, prior):
    config = PriorConfig(prompts=["a photo of a face", "a pencil sketch of a face"], images=4)
    more = with_pairs(base, prior, config, PROMPT, 0.6)
    assert more.latents.shape[1] == 10
    assert torch.equal(more.own[:, :4], prior.own)
    texts = {base.tokenizer.decode(row, skip_special_tokens=True).strip() for row in more.ids[0, 4:]}
    assert texts <= {"a photo of a face , a face", "a pencil sketch of a face , a face"}
    z, noise, t = (x[:, 4:].flatten(0, 1) for x in (more.latents, more.noise, more.timesteps))
    velocity = base.schedule.get_velocity(z, noise, t)
    torch.testing.assert_close(more.own[:, 4:].flatten(0, 1), velocity)
    assert with_pairs(base, prior, config, PROMPT, 0.0) is prior


def test_a_prompt_that_is_too_long_is_refused(base):
    with pytest.raises(UserError, match="too long: the base does not see 'zwx'"):
        scenes(base, pictures(2), ("sks", "zwx"), PROMPT.replace("photo", " ".join(["photo"] * 15)), 0.6, 1.0)


def test_the_processor_of_a_base_does_not_matter(base):
    """Maps are seen under the fused attention too, whose processor comes back."""
    _, shows = scenes(base, pictures(2), ("sks", "zwx"), PROMPT, 0.6, 1.0)
    attention = next(m for m in base.unet.modules() if isinstance(m, Attention) and m.is_cross_attention)
    before = attention.processor
    with shows.watching():
        assert type(attention.processor) is AttnProcessor
    assert attention.processor is before
