"""A base in fewer bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): the weights of its linear layers, by torchao.

Adapters are trained on top as on any base: `hyperdb.adapters.site.Site.weight` lends them the weight that is computed
with. SVDiff and LoRA-X cannot be: their numbers are along the singular vectors of the weights as they were. What the
base is called, its digest and its hash, is that of the weights before.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from torch import nn

from hyperdb.diffusion.targets import keep_signs
from hyperdb.runtime.errors import UserError

BLOCK, SCALES = 64, 256  # of nf4: numbers that share a scale, and scales that share one


def require(kind: str) -> None:
    """Raise `UserError` if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"diffusion.quantise={kind} needs torchao: pip install -e '.[quantise]'")


def stored(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers as they lie in memory."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):  # one that is made of others: numbers in fewer bits, and their scales
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return int(tensor.numel() * tensor.element_size())

    return sum(size(tensor.data) for tensor in (*model.parameters(), *model.buffers()))


def fewer(model: nn.Module, kind: str) -> int:
    """Return how many bytes `quantise` would take off a model, without torchao and from the shapes alone."""
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            (out, _), wide = module.weight.shape, module.weight.element_size()
            numbers = module.weight.numel()
            blocks, rest = divmod(numbers, BLOCK)
            if kind == "int8":
                found += numbers * (wide - 1) - out * (wide + 1)  # a scale a row and where its zero is
            elif not rest:
                scales = blocks + 4 * (blocks // math.gcd(blocks, SCALES))
                found += numbers * wide - numbers // 2 - scales - 4 * 17  # the 16 numbers, and a mean
    return found


def quantise(model: nn.Module, kind: str) -> None:
    """Put the weights of a model's linear layers into int8, a scale a row, or nf4, a scale for 64 numbers.

    Biases and all else stay. So does, with nf4, a weight whose numbers are no multiple of 64.
    """
    require(kind)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4

    for module in model.modules():
        if isinstance(module, nn.Linear):
            keep_signs(module)
            blocks, rest = divmod(module.weight.numel(), BLOCK)
            if kind == "int8":
                quantize_(module, Int8WeightOnlyConfig())
            elif not rest:
                weight = to_nf4(module.weight.detach(), BLOCK, math.gcd(blocks, SCALES))
                module.weight = nn.Parameter(weight, requires_grad=False)
