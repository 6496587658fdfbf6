"""An old base steers a new one: nothing untrained, its features when trained, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.loss import predict
from hyperdb.diffusion.xadapter import Mapper, XAdapter, find, header, require_pair
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, save_tensors


def load(path):
    return DiffusionConfig(path=str(path), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture
def old(tiny_base):
    return load(tiny_base)


@pytest.fixture
def new(tiny_base):
    """Return a base of the same parts whose UNet was moved."""
    base, g = load(tiny_base), torch.Generator().manual_seed(0)
    for parameter in base.unet.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    base.digest = "moved"
    return base


@pytest.fixture
def rows(new):
    g = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, 2, *new.latent_shape, generator=g)
    return z, noise, torch.tensor([100, 700]), new.tokenize(["a photo of a face", "a pencil sketch of a face"])


def trained(mapper, scale=0.1):
    """Give the last layers random weights."""
    g = torch.Generator().manual_seed(2)
    for block in mapper.blocks:
        block[-1].weight.data = scale * torch.randn(block[-1].weight.shape, generator=g)
        block[-1].bias.data = scale * torch.randn(block[-1].bias.shape, generator=g)
    return mapper


@torch.no_grad()
def test_an_untrained_mapper_leaves_the_new_base_as_it_is_bit_for_bit(old, new, rows):
    plain = predict(new, *rows)
    steering = XAdapter(old, new, Mapper.between(old, new, 8))
    assert torch.equal(predict(new, *rows), plain)
    trained(steering.mapper)
    assert not torch.allclose(predict(new, *rows), plain, atol=1e-3)
    steering.remove()
    assert torch.equal(predict(new, *rows), plain)
    assert not old.unet._forward_hooks
    assert not new.unet._forward_pre_hooks


@torch.no_grad()
def test_it_adds_what_the_mapper_makes_of_the_old_decoders_features(old, new, rows):
    mapper, made = trained(Mapper.between(old, new, 8)), []
    handles = [block.register_forward_hook(lambda _m, _i, y: made.append(y)) for block in old.unet.up_blocks]
    predict(old, *rows)
    [handle.remove() for handle in handles]
    added = [net(features) for net, features in zip(mapper.blocks, made, strict=True)]
    for block, more in zip(new.unet.up_blocks, added, strict=True):
        handles.append(block.register_forward_hook(lambda _m, _i, y, more=more: y + more))
    by_hand = predict(new, *rows)
    [handle.remove() for handle in handles]
    steering = XAdapter(old, new, mapper)
    torch.testing.assert_close(predict(new, *rows), by_hand)
    with steering.saying(rows[3].flip(0)):  # other prompts to the old base alone
        assert not torch.allclose(predict(new, *rows), by_hand, atol=1e-4)
    torch.testing.assert_close(predict(new, *rows), by_hand)
    steering.remove()


def test_gradient_reaches_the_mapper_alone(old, new, rows):
    steering = XAdapter(old, new, trained(Mapper.between(old, new, 8)))
    predict(new, *rows).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in steering.mapper.parameters())
    frozen = [part for base in (old, new) for part in (base.unet, base.text_encoder)]
    assert all(p.grad is None for part in frozen for p in part.parameters())
    steering.remove()


def test_a_file_is_read_as_it_was_written(old, new, tmp_path):
    mapper = trained(Mapper.between(old, new, 8))
    path = mapper.save(tmp_path / "xadapter.safetensors", old, new)
    assert find(str(tmp_path)) == path
    assert header(path)["old_path"] == old.config.path
    again = Mapper.load(path, old, new).state_dict()
    assert all(torch.equal(again[k], v) for k, v in mapper.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(kind="other"), "is no X-Adapter; give the xadapter.safetensors"),
        (lambda t, m: m.update(version="9"), "version '9', this hyperdb reads 1"),
        (lambda t, m: m.pop("old_path"), "does not say its bases"),
        (lambda t, m: m.update(width="no"), "does not say its bases and its width"),
        (lambda t, m: m.update(width="9999"), "a width of 9999"),
        (lambda t, m: m.update(width="9"), "its numbers are not those of its settings"),
        (lambda t, m: m.update(old="0123"), "trained with the old base 0123; .* is "),
        (lambda t, m: m.update(new="0123"), "trained with the new base 0123; .* is moved"),
        (lambda t, m: t["blocks.0.4.bias"].fill_(torch.nan), "not finite"),
        (lambda t, m: t.pop("blocks.0.4.bias"), "its numbers are not those"),
    ],
)
def test_another_file_is_refused_in_one_line(old, new, tmp_path, change, message):
    path = Mapper.between(old, new, 8).save(tmp_path / "xadapter.safetensors", old, new)
    tensors, told = load_tensors(path)
    change(tensors, told)
    save_tensors(path, tensors, told, check=False)
    with pytest.raises(UserError, match=message) as raised:
        Mapper.load(path, old, new)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no X-Adapter at .*; `hyperdb train_xadapter` makes one"):
        find(str(tmp_path))


@torch.no_grad()
def test_bases_that_do_not_fit_are_refused(old, new):
    require_pair(old, new)
    new.schedule.alphas_cumprod = new.schedule.alphas_cumprod * 0.9
    with pytest.raises(UserError, match=r"cannot steer .* other noise levels"):
        require_pair(old, new)
    new.schedule = old.schedule
    new.unet.up_blocks = nn.ModuleList([*new.unet.up_blocks, nn.Identity()])
    with pytest.raises(UserError, match="other numbers of blocks"):
        require_pair(old, new)
    new.vae.encoder.conv_in.weight.mul_(2)
    with pytest.raises(UserError, match="other autoencoders"):
        Mapper.between(old, new, 8)


def test_a_mapper_is_a_function_of_its_seed(old, new):
    one, same, other = (Mapper.between(old, new, 8, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["blocks.0.2.weight"], other["blocks.0.2.weight"])


def test_the_bases_are_told_apart_by_their_settings(old, new):
    """The message names both."""
    new.config = replace(new.config, path="newer")
    new.tokenizer.model_max_length = 9
    with pytest.raises(UserError, match=f"{old.config.path} cannot steer newer: they have other vocabularies"):
        require_pair(old, new)
