"""Keep linear maps whole while lowering.

ATen takes `linear` and `matmul` apart differently by the strides of their operands, so that a batch of one
and a batch of two give different graphs. A function mode sends them through operators of our own, which
functionalize passes on as they are; the recorder writes `aten.linear` for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LIBRARY = torch.library.Library("fxzip", "FRAGMENT")  # noqa: TOR901 (lives as long as the process)
_kernel = F.linear
_LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
_LIBRARY.impl("linear", _kernel, "CompositeExplicitAutograd")

WHOLE = {torch.ops.fxzip.linear.default: torch.ops.aten.linear.default}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.fxzip.linear(input, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    """Products with a matrix or vector as `linear`; batched ones as ATen has them."""
    if input.dim() >= 2 and other.dim() == 2:
        return _linear(input, other.t())
    if input.dim() >= 2 and other.dim() == 1:
        return _linear(input, other.unsqueeze(0)).squeeze(-1)
    if input.dim() == 2 and other.dim() >= 3:
        return _linear(other.transpose(-1, -2), input).transpose(-1, -2)
    if input.dim() == 1 and other.dim() >= 2:
        return _linear(other.transpose(-1, -2), input.unsqueeze(0)).squeeze(-1)
    return torch.matmul(input, other)


def _rmatmul(input: Tensor, other: Tensor) -> Tensor:
    return _matmul(other, input)


_REPLACED = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    torch.ops.aten.linear.default: _linear,  # of exported graphs
    torch.ops.aten.matmul.default: _matmul,
}


class _Replace(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def whole_linear() -> Iterator[None]:
    """While active, `linear` and `matmul` reach the dispatcher as `fxzip::linear`.

    A function mode is off inside the functions it handles, such as `F.multi_head_attention_forward`, so the
    name that these look up is replaced as well.
    """
    original = F.linear
    F.linear = _linear
    try:
        with _Replace():
            yield
    finally:
        F.linear = original
