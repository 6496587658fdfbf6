"""`hyperdb merge`: two people of Custom Diffusion in one adapter, each under a word of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyperdb import config
from hyperdb.adapters import CustomConfig, LoRAConfig
from hyperdb.adapters.inject import Injection
from hyperdb.data.people import load_people
from hyperdb.data.pictures import Pictures
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.targets import base_hash
from hyperdb.faces.image import read_image
from hyperdb.formats.native import Part, Personalization
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.trainable import trainable


@pytest.fixture(scope="module")
def base(tiny_base):
    return DiffusionConfig(path=str(tiny_base), size=32, dtype="fp32", device="cpu").load()


@pytest.fixture
def make(base, tmp_path):
    """Return a function that writes a person of random numbers under a word."""

    def person(word: str, settings, seed: int = 0):
        from hyperdb.adapters.layout import Layout

        base.config = replace(base.config, rare_token=word)
        bound, adapter = trainable(base, settings)
        g = torch.Generator().manual_seed(seed)
        start = adapter.init(1, Injection(base.sites(adapter.layout.names)).sites)
        params = {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in start.items()}
        targets, noun = base.targets(), base.config.class_word
        made = Personalization(
            Layout.of(targets), None, base=base_hash(targets), rare_token=word, class_word=noun,
            parts=[Part(bound, adapter.layout, params)],
        )  # fmt: skip
        return made.save(tmp_path / f"{word}{seed}.safetensors")

    return person


def merged(tiny_base, tmp_path, *files, more=()):
    words = [*more, f"diffusion.path={tiny_base}", "diffusion.size=32", "diffusion.dtype=fp32", "diffusion.device=cpu"]
    return config.run("merge", [f"adapter=[{','.join(map(str, files))}]", f"out={tmp_path / 'both'}", *words])


def test_each_word_has_its_own_keys_and_values_and_captions_keep_theirs(make, base, tiny_base, tmp_path, capsys):
    files = make("sks", CustomConfig()), make("zwx", CustomConfig(), seed=1)
    both = Personalization.load(merged(tiny_base, tmp_path, *files) / "adapter.safetensors")
    assert "'sks face', 'zwx face'" in capsys.readouterr().out
    assert read_image(tmp_path / "both" / "pictures.png").shape[0] == 3 * 36 + 4  # three lines of eight, framed
    assert [part.kind for part in both.parts] == ["custom", "token"]
    layer = next(name for name in both.parts[0].layout.names if name.endswith("to_k"))
    module = base.targets()[layer]

    def keys(prompt: str, person: Personalization | None = None) -> torch.Tensor:
        ids = base.tokenize([prompt])
        handle = person.apply(base) if person is not None else None
        found = module(base.text_encoder(ids)[0])[0]
        if handle is not None:
            handle.remove()
        return found[1 : (ids[0] == base.tokenizer.eos_token_id).nonzero()[0] + 1]  # the end is the person's, too

    with torch.no_grad():
        for file in files:
            own = Personalization.load(file)
            prompt = f"a {own.rare_token} {own.class_word}"
            plain, alone, together = (keys(prompt, person)[1:] for person in (None, own, both))
            torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-3)
            assert (alone - plain).abs().max() > 1e-2
        caption = "a pencil sketch of a"
        assert (keys(caption, both) - keys(caption)).norm() < 0.5 * (keys(caption, own) - keys(caption)).norm()


@pytest.mark.parametrize(
    ("word", "settings", "message"),
    [
        ("sks", CustomConfig(), "has the rare token 'sks', as another"),
        ("zwx", CustomConfig(vectors=2), "a word of 2 vectors"),
        ("zwx", LoRAConfig(), "not one adapter of kind custom alone"),
        ("zwx", CustomConfig(row=2), "zwx1.* trained the vector of token 2, which 'zwx' is not"),
    ],
)
def test_people_who_do_not_fit_together_are_refused(make, tiny_base, tmp_path, word, settings, message):
    first = make("sks", CustomConfig())
    with pytest.raises(UserError, match=message):
        merged(tiny_base, tmp_path, first, make(word, settings, seed=1))
    with pytest.raises(UserError, match="two adapters or more"):
        merged(tiny_base, tmp_path, first)


def test_further_captions_stay_as_they_are(make, base, tiny_base, rendered, tmp_path, monkeypatch):
    """Of a text file, or of people, whose pictures are not read."""
    files = make("sks", CustomConfig()), make("zwx", CustomConfig(), seed=1)
    captions = sorted(set(load_people(rendered, split=None).captions))
    (tmp_path / "more.txt").write_text("a face in a forest\n\na face on the beach\n")
    monkeypatch.setattr(Pictures, "part", lambda *_: pytest.fail("a picture was read"))
    moved = {}
    for name, source in (("none", None), ("text", tmp_path / "more.txt"), ("people", rendered)):
        more = ["prior.prompts=['a face']", f"captions={'null' if source is None else source}"]
        out = merged(tiny_base, tmp_path / name, *files, more=more)
        both = Personalization.load(out / "adapter.safetensors")
        layer = next(name for name in both.parts[0].layout.names if name.endswith("to_k"))
        for caption in ("a face in a forest", *captions):
            ids = base.tokenize([caption])
            with torch.no_grad():
                context = base.text_encoder(ids)[0][0, : int((ids[0] == base.tokenizer.eos_token_id).nonzero()[0])]
            moved[name, caption] = (context @ both.parts[0].params[layer][0].T).norm().item()
    assert moved["text", "a face in a forest"] < 0.1 * moved["none", "a face in a forest"]
    then, now = (sum(moved[name, caption] for caption in captions) for name in ("none", "people"))
    assert now < 0.5 * then
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.txt: no captions there"):
        merged(tiny_base, tmp_path / "empty", *files, more=[f"captions={tmp_path / 'empty.txt'}"])
