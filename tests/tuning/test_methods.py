"""A method is data: what it may say, and what is refused."""

from __future__ import annotations

import pytest

from hyperdb import config, options
from hyperdb.adapters import LoRAConfig
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.fit import FitConfig
from hyperdb.tuning.methods import MethodConfig

SHARED = FitConfig(steps=40, levels=4, noise=[0.0, 0.65], rate=0.006)


def test_a_method_says_how_its_fine_tuning_differs():
    method = MethodConfig(label="{steps} steps", train="relaxed", finetune={"steps": 3, "noise": [0.1, 0.2]})
    assert method.fit(SHARED) == FitConfig(steps=3, levels=4, noise=[0.1, 0.2], rate=0.006)
    assert method.text(3) == "3 steps"
    assert MethodConfig(label="").fit(SHARED) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "me"}, "expected of own, average, another"),
        ({"refinements": 1}, "refinements=1: expected at least 1, of a method that has a start"),
        ({"start": "own", "refinements": 0}, "refinements=0: expected at least 1"),
        ({"people": 1}, "people=1: expected at least 2, or null for all"),
        ({"strength": 0.5}, "strength=0.5: expected a finite number, of a method that has an adapter"),
        ({"start": "own", "strength": float("nan")}, "strength=nan: expected a finite number"),
        ({"photos": 0}, "photos=0: expected at least 1, or null"),
        ({"train": "lora"}, "expected of relaxed, lidb"),
        ({"train": "lidb", "adapter": LoRAConfig()}, "trains one of them"),
        ({"label": "{iterations}"}, "the only word in braces is {steps}"),
        ({"label": "{"}, "the only word in braces is {steps}"),
    ],
)
def test_what_no_method_can_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MethodConfig(**{"label": "", **settings})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("methods.hyper_40.finetune.stepz=3", "methods.hyper_40: finetune: Key 'stepz' not in"),
        ("methods.hyper_40.finetune.steps=many", "methods.hyper_40: finetune: Value 'many'"),
        ("methods.hyper_40.finetune.steps=0", "methods.hyper_40: steps and levels must be at least 1"),
        ("methods.hyper_40.against=[flor]", "methods.hyper_40.against='flor': expected of floor"),
        ("methods.svdiff.adapter.rank=3", "no setting 'methods.svdiff.adapter.rank'"),
        ("methods.mine.label=x", "no setting 'methods.mine'"),
        ("rows=[mine]", "rows='mine': expected of floor"),
        ("rows=[]", "expected of floor"),
        ("adapter=svdiff", "the rows of an evaluation say what each trains"),
    ],
)
def test_words_that_are_wrong_are_named(word, message):
    with pytest.raises(UserError, match=message):
        config.load("evaluate", [word])


def test_a_word_changes_one_method():
    found = config.load("evaluate", ["methods.hyper_40.finetune.steps=7", "methods.no_hyper_40.finetune.rate=0.5"])
    assert found.fit("hyper_40").steps == 7
    assert found.fit("mean_40").steps == found.fit("no_hyper_40").steps == 40
    assert found.fit("no_hyper_40").rate == 0.5
    assert found.fit("hyper_40").rate == found.fit("mean_40").rate != 0.5


@pytest.mark.parametrize("name", [name for name in options.choices("adapter") if name != "lidb"])
def test_every_adapter_has_a_row_that_trains_it_as_personalize_does(name):
    found, alone = config.load("evaluate"), config.load("personalize", [f"adapter={name}", "image=x.png"])
    assert found.methods[name].adapter == alone.adapter
    assert found.fit(name) == alone.finetune
    assert found.methods[name].start is None


def test_the_papers_rows_have_its_iterations():
    """Table 2, and Textual Inversion's from "125 times faster"; the aggressive ones move a weight as far."""
    found = config.load("evaluate", ["diffusion=sd15"])
    fits = [found.fit(name) for name in ("dreambooth", "dreambooth_agg_1", "dreambooth_agg_2")]
    assert [fit.steps for fit in fits] == [1200, 400, 40]
    assert [fit.steps * fit.rate for fit in fits] == pytest.approx([6e-3] * 3)
    assert [(fit.prior_weight, fit.prior_rows) for fit in fits] == [(1, 1)] * 3
    assert found.fit("textual_inversion").steps == 5000
    assert found.fit("hyper_40_k1") == found.fit("hyper_40")


def test_every_method_is_a_row():
    assert options.choices("methods") == sorted(config.load("evaluate").methods)
