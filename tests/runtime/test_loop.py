"""A training that is asked to stop saves first, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hyperdb.runtime.errors import NonFiniteError
from hyperdb.runtime.files import load_metadata
from hyperdb.runtime.journal import read
from hyperdb.runtime.loop import train
from hyperdb.runtime.optim import EMA, Schedule, adamw
from hyperdb.runtime.seed import generator
from hyperdb.runtime.stop import Terminated


def _where():
    return ", noise level 7 of 1000"


def _train(out, *signals, at=2, agreed=bool, bad=lambda loss: loss):
    """Train for six steps, in one of which signals come; return the weights, and the steps after which `saved` ran.

    In that step the loss is what `bad` makes of it.
    """
    torch.manual_seed(0)
    model, saved = torch.nn.Linear(4, 2), []

    def backward(step):
        for number in signals if step == at else ():
            os.kill(os.getpid(), number)
        loss = model(torch.randn(8, 4, generator=generator(0, step))).square().mean()
        loss = bad(loss) if step == at else loss
        loss.backward()
        return {"loss": loss}

    out.mkdir(exist_ok=True)
    optimizer, ema = adamw(model.parameters(), 1e-2), EMA(model.parameters(), 0.9)
    train("test", out, {}, Schedule(6), optimizer, ema, backward, None, 4, saved.append, agreed=agreed, where=_where)
    return [p.detach().clone() for p in model.parameters()], saved


def _step(out):
    return int(load_metadata(out / "checkpoint.safetensors")["step"])


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_a_training_after_its_step(tmp_path, capfd, number, error):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt) as ended:
        _train(tmp_path / "parts", number)
    assert ended.type is error
    assert _step(tmp_path / "parts") == 3
    assert "stopping at the end of this step" in capfd.readouterr().err
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    whole, saved = _train(tmp_path / "whole")
    assert saved == [4, 6]
    parts, saved = _train(tmp_path / "parts")
    assert saved == [4, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    steps = [[record["step"] for record in read(tmp_path / name / "journal.jsonl")] for name in ("whole", "parts")]
    assert steps[0] == steps[1] == [6]


def test_a_second_interruption_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, signal.SIGTERM, signal.SIGINT)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_in_its_last_step_a_training_is_done(tmp_path):
    assert _train(tmp_path, signal.SIGTERM, at=5)[1] == [4, 6]


def test_a_signal_to_another_process_ends_this_one_too(tmp_path):
    asked = iter([False, True])
    with pytest.raises(Terminated):
        _train(tmp_path, agreed=lambda mine: mine or next(asked))
    assert _step(tmp_path) == 2


BAD = [
    (lambda loss: loss * float("nan"), "loss is nan"),
    (lambda loss: loss + float("inf"), "loss is inf"),
    (lambda loss: loss + 0 * loss.mul(0).sqrt(), "gradient's length is nan"),  # the loss is a number
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_what_is_no_number_is_never_kept(tmp_path, bad, said):
    """The last step is bad: the checkpoint is that of the step before, though none was due there."""
    whole, _ = _train(tmp_path / "whole")
    with pytest.raises(NonFiniteError, match=rf"^test, noise level 7 of 1000: the {said} at step 6; lower"):
        _train(tmp_path / "parts", at=5, bad=bad)
    assert _step(tmp_path / "parts") == 5
    assert all(record["step"] <= 5 for record in read(tmp_path / "parts" / "journal.jsonl"))
    parts, _ = _train(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
