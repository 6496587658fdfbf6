"""The one training loop: resume, learning rate, clipping, averaging, journal, checkpoints."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdb.runtime import checkpoint
from hyperdb.runtime.errors import WriteError
from hyperdb.runtime.journal import Journal
from hyperdb.runtime.optim import EMA, Schedule, set_rate
from hyperdb.runtime.stop import Terminated, waiting
from hyperdb.runtime.track import Track


def train(
    name: str,
    out: Path,
    config: dict[str, Any],
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    backward: Callable[[int], Mapping[str, Tensor]],
    after: Callable[[int, dict[str, float], Journal], object] | None = None,
    save_every: int = 250,
    saved: Callable[[int], object] | None = None,
    main: bool = True,
    agreed: Callable[[bool], bool] = bool,
    track: Track | None = None,
    where: Callable[[], str] | None = None,
    fixed: Sequence[torch.Tensor] = (),
) -> None:
    """Train `ema.params` to `schedule.steps`, from the checkpoint in `out` if there is one; then put the average in.

    `backward(step)` computes the gradients of 0-based `step` and returns the terms of its loss, whose sum goes to
    `out/journal.jsonl`. `after(done, terms, journal)` runs after every step, `saved(done)` after every checkpoint that
    is due. Of several processes only the `main` one writes, and tells a `track` the loss, its terms and the rates of
    every step. Raises `UserError` for a checkpoint of another `config`,
    `NonFiniteError` for a loss or gradient that is no number, before anything is changed by it and with a checkpoint of
    the step before; `where()` adds at which noise levels it was so. `fixed` tensors are not trained but belong to what
    is, such as the mean of its inputs: they are kept with it.

    SIGINT or SIGTERM ends it after the step, with a checkpoint: then `KeyboardInterrupt` or `Terminated` is raised.
    `agreed` returns whether any of several processes is to end, so that all do after the same step.
    """
    path = out / "checkpoint.safetensors"
    start = checkpoint.load(path, optimizer, ema, config, fixed)
    with Journal(out / "journal.jsonl" if main else None, schedule.steps, start, name) as journal, waiting() as came:
        for step in range(start, schedule.steps):
            set_rate(optimizer, schedule(step))
            optimizer.zero_grad()
            found = backward(step)
            done, length = step + 1, torch.nn.utils.clip_grad_norm_(ema.params, 1.0)
            # one wait for the device, not one a term
            *losses, gradient = torch.stack([v.detach().float() for v in (*found.values(), length)]).tolist()
            terms = dict(zip(found, losses, strict=True))
            if not math.isfinite(sum(losses) + gradient):
                if main and step > start and all(x.isfinite().all() for x in (*ema.params, *ema.average)):
                    with suppress(WriteError):  # what went wrong first is said
                        checkpoint.save(path, step, optimizer, ema, config, fixed)
                journal.guard(done, sum(losses), gradient, where() if where is not None else "")
            optimizer.step()
            ema.update(step)
            parts = {k: round(v, 5) for k, v in terms.items()} if len(terms) > 1 else {}
            journal.step(done, sum(terms.values()), **parts)
            if main and track is not None:
                rates = {f"rate/{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}
                track.log(done, {"loss": sum(terms.values()), **parts, **rates})
            if after is not None:
                after(done, terms, journal)
            stop, due = agreed(bool(came)), done % save_every == 0 or done == schedule.steps
            if main and (stop or due):
                checkpoint.save(path, done, optimizer, ema, config, fixed)
            if main and due and saved is not None:
                saved(done)
            if stop and done < schedule.steps:
                raise KeyboardInterrupt if came[:1] == [signal.SIGINT] else Terminated
    ema.copy_to_params()
