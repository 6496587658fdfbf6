"""Training checkpoints in one safetensors file: parameters, average, optimiser state and step; no pickle.

Randomness needs no state: every draw of step k comes from (seed, k).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_tensors, reading, save_tensors
from hyperdb.runtime.optim import EMA
from hyperdb.runtime.recipe import differences


def save(
    path: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    config: dict[str, Any],
    fixed: Sequence[torch.Tensor] = (),
) -> None:
    """Write the whole state of a training after `step` finished steps, atomically, with tensors that stay `fixed`."""
    tensors = {f"fixed.{i}": value for i, value in enumerate(fixed)}
    for i, (param, average) in enumerate(zip(ema.params, ema.average, strict=True)):
        tensors[f"param.{i}"] = param
        tensors[f"average.{i}"] = average
        for name, value in optimizer.state[param].items():
            tensors[f"state.{i}.{name}"] = torch.as_tensor(value)
    text = json.dumps(config, sort_keys=True, default=str)
    save_tensors(path, tensors, {"step": str(step), "config": text})


def _beside(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return an optimiser's tensor on the device of its parameter, and in the order of its numbers in memory.

    A fused step takes them one after the other: beside a convolution that is `channels_last` it would mix them up.
    """
    if value.shape != param.shape:
        return value.to(param.device)
    return torch.empty_like(param, dtype=value.dtype).copy_(value)


def load(
    path: Path,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    config: dict[str, Any],
    fixed: Sequence[torch.Tensor] = (),
) -> int:
    """Restore a training in place; return how many steps are done (0 if there is no checkpoint).

    Raises `UserError` when the checkpoint was written under a `config` (`hyperdb.runtime.recipe`) of other values.
    """
    if not path.is_file():
        return 0
    tensors, metadata = load_tensors(path)
    kinds: dict[str, Sequence[torch.Tensor]] = {"param": ema.params, "average": ema.average, "fixed": fixed}
    here = {f"{kind}.{i}": value for kind, values in kinds.items() for i, value in enumerate(values)}
    if not {"config", "step"} <= metadata.keys() or not here.keys() <= tensors.keys():
        raise UserError(f"{path} is not a checkpoint of this training; delete it or use another name")
    with reading(path):
        made_under, step = dict(json.loads(metadata["config"])), int(metadata["step"])
    if changed := differences(made_under, config):
        raise UserError(
            f"{path} was made with other values of {', '.join(changed)}; "
            "use the same configuration, another name, or delete that folder"
        )
    with torch.no_grad():
        for name, value in here.items():
            if value.shape != tensors[name].shape:
                raise UserError(f"{path} holds other shapes than this model; delete it or use another name")
            value.copy_(tensors[name])
        for i, param in enumerate(ema.params):
            prefix = f"state.{i}."
            state = {n.removeprefix(prefix): _beside(param, v) for n, v in tensors.items() if n.startswith(prefix)}
            if state:
                optimizer.state[param] = state
    return step
