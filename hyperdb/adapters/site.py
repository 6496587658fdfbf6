"""A place of the network that can be changed: one weight or one bias of one module."""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from hyperdb.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

BIAS = ".bias"  # ends the name of a site that is a bias; every other site is called after its module


class Site:
    """One parameter of one frozen module, and what the module does with it.

    `kind` is linear, conv, embedding, norm (the scale of a normalisation) or bias, and `shape` that of the parameter. A
    whole text encoder is one too, of kind text, and its parameter is the embedding of its words.
    Rows of a batch come with their identities told apart, `[R, I, S, ...]`: R blocks (of classifier-free guidance), I
    identities, S rows each; `...` is what the module takes. Raises `UserError` for a module of another kind.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.kind = "bias" if name.endswith(BIAS) else _kind(module)
        if not self.kind or not _kind(module) or self.parameter is None:
            raise UserError(f"{name} is a {type(module).__name__} that cannot be changed")
        self.shape = tuple(self.parameter.shape)

    @property
    def parameter(self) -> Any:
        """The frozen parameter itself, as the module holds it."""
        if self.kind == "text":
            return self.module.get_input_embeddings().weight  # type: ignore[operator]
        return getattr(self.module, "bias" if self.kind == "bias" else "weight")

    @property
    def home(self) -> tuple[Any, Any]:
        """Device and dtype of the frozen parameter, the dtype that it had if it is stored in fewer bits."""
        return self.parameter.device, self.parameter.dtype

    def weight(self) -> Tensor:
        """Return the frozen parameter in float32 or wider; one that is stored in fewer bits is dequantised."""
        import torch

        found = self.parameter.detach()
        if self._in_fewer_bits():
            # nf4's `dequantize` is another function
            found = found.get_original_weight() if hasattr(found, "get_original_weight") else found.dequantize()
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _in_fewer_bits(self) -> bool:
        return type(self.parameter.data).__module__.startswith("torchao.")

    def require_whole(self) -> None:
        """Raise `UserError` for a parameter that is stored in fewer bits than it was trained in.

        Its singular vectors are not the weight's: numbers along them would mean something else on the base as it is.
        """
        if self._in_fewer_bits():
            raise UserError(
                "this adapter's numbers are along the singular vectors of the base's weights, which a base in fewer "
                "bits does not have: leave out diffusion.quantise"
            )

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of the weight, see `decomposed`, in float32.

        It is computed once for a weight as it is, and kept in the memory of the CPU as long as that: every fit and
        every drawing of an adapter on singular values begins with it, and a whole UNet's takes minutes.
        """
        import torch

        weight = self.weight()
        if type(weight) is not torch.Tensor:  # one that has no numbers, where memory is counted
            return decomposed(weight)
        kind = float(weight.cpu().double().sum()), self.parameter.dtype
        known = _kept().get(self.parameter)
        if known is None or known[0] != kind:
            known = _kept()[self.parameter] = (kind, [x.cpu() for x in decomposed(weight)])
        u, s, vt = (x.to(weight.device) for x in known[1])
        return u, s, vt

    def call(self, x: Tensor) -> Tensor:
        """Return what the module makes of rows `[R, I, S, ...]`, as if nobody had changed it."""
        y: Tensor = self.module.forward(x.flatten(0, 2))
        return y.unflatten(0, x.shape[:3])

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the module would make of rows `[R, I, S, ...]` with this parameter alone, one an identity.

        `weight` is `[I, *shape]`; another parameter of the module counts as zero. The result is linear in `weight`, and
        that of a bias can be expanded to the module's output.
        """
        weight = weight.to(self.parameter) if self.kind == "embedding" else weight.to(x)
        if self.kind == "linear":
            return linear(x, weight)
        if self.kind == "conv":
            return conv(x, weight, self.module)  # type: ignore[arg-type]
        if self.kind == "embedding":
            import torch
            from torch.nn import functional as F

            if len(weight) == 1:
                return F.embedding(x, weight.squeeze(0))
            first = torch.arange(len(weight), device=x.device) * self.shape[0]  #     [I]
            return F.embedding(x + first.view(-1, *[1] * (x.ndim - 2)), weight.flatten(0, 1))
        if self.kind == "norm":
            return _normalised(x, self.module) * self._spread(x, weight)
        return self._spread(x, weight)

    def _spread(self, x: Tensor, vector: Tensor) -> Tensor:
        """Return a vector an identity, `[I, m]`, in the shape in which it is added to the module's output."""
        from torch import nn

        channels_last = isinstance(self.module, nn.Linear | nn.LayerNorm)
        inner = [1] * (x.ndim - 4)
        size = [vector.shape[1]]
        return vector.view(len(vector), 1, *(inner + size if channels_last else size + inner))


@cache
def _kept() -> Any:
    """Return {parameter: what its weight was, its decomposition}, of parameters that are still there."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a weight `[m, ...]` as a matrix `[m, n]` into U `[m, k]`, s `[k]` and V^T `[k, n]`.

    A convolution's n is channels x height x width; a vector is one row.
    """
    import torch

    matrix = weight.flatten(1) if weight.ndim > 1 else weight[None]
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _kind(module: nn.Module) -> str:
    from torch import nn

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv" if module.groups == 1 and module.padding_mode == "zeros" else ""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "norm"
    return "text" if hasattr(module, "get_input_embeddings") else ""


def _normalised(x: Tensor, module: nn.Module) -> Tensor:
    from torch import nn
    from torch.nn import functional as F

    if isinstance(module, nn.GroupNorm):
        rows = F.group_norm(x.flatten(0, 2), module.num_groups, eps=module.eps)
        return rows.unflatten(0, x.shape[:3])
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def linear(x: Tensor, *factors: Tensor) -> Tensor:
    """Multiply rows `x [R, I, S, ..., n]` by matrices, one after the other, each `[I, m, n]`: of its own identity."""
    if len(factors[0]) == 1:
        for factor in factors:
            x = x @ factor.squeeze(0).mT
        return x
    rows = x.flatten(2, -2)  #                                                        [R, I, S * ..., n]
    for factor in factors:
        rows = rows @ factor.mT
    return rows.unflatten(2, x.shape[2:-1])


def conv(x: Tensor, weight: Tensor, like: nn.Conv2d, up: Tensor | None = None) -> Tensor:
    """Convolve rows `x [R, I, S, c, H, W]` by `weight [I, r, c, h, w]`, each by that of its own identity.

    Stride, padding and dilation are those of `like`. With `up [I, m, r]` every pixel is multiplied by it afterwards.
    """
    import torch

    how: dict[str, Any] = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}
    shape, identities = x.shape[:3], len(weight)
    if identities == 1:
        y = torch.conv2d(x.flatten(0, 2), weight.squeeze(0), **how)
        y = y if up is None else torch.conv2d(y, up.squeeze(0)[..., None, None])
        return y.unflatten(0, shape)
    rows = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  #                           [R * S, I * c, H, W]
    y = torch.conv2d(rows, weight.flatten(0, 1), **how, groups=identities)
    if up is not None:
        y = torch.conv2d(y, up.flatten(0, 1)[..., None, None], groups=identities)  #  [R * S, I * m, H', W']
    return y.unflatten(1, (identities, -1)).unflatten(0, (shape[0], shape[2])).transpose(1, 2)
