"""Text reaches Hydra as it is written; one grammar for every list that is written as a word."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdb.config import load
from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.errors import UserError
from hyperdb.words import chosen, entries, quoted


@dataclass
class Named:
    name: str = "ada"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="\\${}'\"ab ,[:=") | st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_both_grammars(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if text == "???":  # OmegaConf's mark of a missing value cannot be escaped
        return
    word = quoted(Named, f"name={text}")
    value = OverridesParser.create().parse_override(word).value()
    node = OmegaConf.create({"name": value, "out": "runs/${name}"})
    assert OmegaConf.to_container(node, resolve=True) == {"name": text, "out": f"runs/{text}"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("[a,b]", ["a", "b"]),
        ("[ a , b ]", ["a", "b"]),
        ("[]", []),
        ("[ ]", []),
        ("['']", [""]),
        ("[a cartoon of a [V] face,an oil painting of a [V] face]",
         ["a cartoon of a [V] face", "an oil painting of a [V] face"]),
        ("['a [V] face, on the beach', b]", ["a [V] face, on the beach", "b"]),
        ('["it\'s a, b",c]', ["it's a, b", "c"]),
        ("[a,my run (1)]", ["a", "my run (1)"]),
        ("[photo (Ada, 2020).jpg,b.jpg]", ["photo (Ada, 2020).jpg", "b.jpg"]),
        ("[Bob's run,b]", ["Bob's run", "b"]),
        ("['tis a face,b]", ["'tis a face", "b"]),
        ("['the dog's, here', b]", ["the dog's, here", "b"]),
        (r"['it\'s, so', b]", ["it's, so", "b"]),
        (r"['C:\\',C:\x]", ["C:\\", "C:\\x"]),
        ("[a :( face,b]", ["a :( face", "b"]),
        ("[a [b,c]", ["a [b", "c"]),
        ("[V]", ["V"]),
        ("[[a,b],[c]]", ["[a,b]", "[c]"]),
        ("[日本, très]", ["日本", "très"]),
    ],
)  # fmt: skip
def test_lists(word, expected):
    assert [one.text for one in entries(word)] == expected


@pytest.mark.parametrize("word", ["", "a,b", "[V] face of [V]", "[a", "a]", "[", "[2020] photos", "[a],[b]"])
def test_other_text_is_no_list(word):
    assert entries(word) is None


@pytest.mark.parametrize("word", ["[a,]", "[,a]", "[a,,b]", "[,]"])
def test_an_empty_entry_is_refused(word):
    with pytest.raises(UserError, match="empty entry"):
        entries(word)


def test_what_is_printed_to_be_typed_gives_the_same_settings_again():
    for words in (
        [],
        ["diffusion=sd15"],
        ["diffusion=sd15", "diffusion.path=/models/my model", "diffusion.variant=fp16"],
        ["diffusion.subject_guidance=null", "diffusion.device=cpu"],
    ):
        settings = load("generate", words).diffusion
        told = shlex.split(chosen("diffusion", settings))
        assert sorted(told) == sorted(words)
        assert load("generate", told).diffusion == settings
    assert chosen("diffusion", DiffusionConfig(path="x")).startswith(" diffusion.path=x")
