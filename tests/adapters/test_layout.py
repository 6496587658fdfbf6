"""The layout: text form, digest, hostile text, comparison."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hyperdb.adapters.layout import Layer, Layout
from hyperdb.runtime.errors import UserError

LAYOUT = Layout((Layer("unet.attn1.to_q", (320, 768)), Layer("text_encoder.q_proj", (64, 32))))


def test_of_keeps_order_and_sizes_on_the_meta_device() -> None:
    with torch.device("meta"):
        layout = Layout.of({"z": nn.Linear(3, 7), "a": nn.Linear(5, 2)})
    assert layout.layers == (Layer("z", (7, 3)), Layer("a", (2, 5)))
    assert layout.names == ("z", "a")
    assert len(layout) == 2


def test_of_takes_linear_layers_only() -> None:
    with pytest.raises(UserError, match="layer c is a Conv2d"):
        Layout.of({"c": nn.Conv2d(1, 1, 1)})


def test_text_round_trip_and_digest() -> None:
    text = LAYOUT.to_text()
    assert text == "unet.attn1.to_q 320 768;text_encoder.q_proj 64 32"
    assert Layout.from_text(text) == LAYOUT
    assert len(json.dumps(text)) == len(text) + 2
    assert len(LAYOUT.digest) == 16
    assert LAYOUT.digest != Layout(LAYOUT.layers[::-1]).digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a 1 2 3 4 5",
        "a 0 1",
        "a -1 1",
        "a 1 1;",
        "a 1 1;a 1 1",
        "a 1 1;;b 1 1",
        "a 01 1",
        "a 1 1000000",
        "a 1 1.5",
        "a\n 1 1",
        "a 1 1\n",
        "a 1 ١",
        'a" 1 1',
        "é 1 1",
        "x" * 201 + " 1 1",
        ";".join(f"l{i} 1 1" for i in range(10_001)),
    ],
)
def test_hostile_text_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        Layout.from_text(text)


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ab.; 019-", max_size=40))
def test_any_text_is_parsed_exactly_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        assert Layout.from_text(text).to_text() == text


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda layers: layers[::-1], "layer 0 is \\[text_encoder.q_proj 64 32\\]"),
        (lambda layers: layers[:1], "layer 1 is \\[absent\\]"),
        (lambda layers: (*layers, Layer("more", (1, 1))), "layer 2 is \\[more 1 1\\]"),
        (lambda layers: (layers[0], Layer("text_encoder.q_proj", (32, 64))), "layer 1 is .* 32 64\\]"),
    ],
)
def test_require_names_the_first_difference(change: Callable[..., tuple[Layer, ...]], names: str) -> None:
    LAYOUT.require(Layout(LAYOUT.layers), "x.safetensors")
    with pytest.raises(UserError, match=f"x.safetensors .*{names}"):
        LAYOUT.require(Layout(change(LAYOUT.layers)), "x.safetensors")
