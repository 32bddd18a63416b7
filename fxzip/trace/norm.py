"""Batch norm of an exported graph as a module again: it keeps statistics, in train mode as the original did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

_NAMES = ("weight", "bias", "running_mean", "running_var")


class RunningNorm(nn.Module):
    """`aten.batch_norm` over the tensors of `path`, which keep their names and identities."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, path: str, tensors: Mapping[str, Tensor], momentum: float | None, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        for name in (*_NAMES, "num_batches_tracked"):
            tensor = tensors.get(f"{path}.{name}")
            if isinstance(tensor, nn.Parameter) or tensor is None:
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, momentum or 0.0, self.eps)


def norm_of(
    node: fx.Node, name: Callable[[Any], str], tensors: Mapping[str, Tensor]
) -> tuple[str, float, float] | None:
    """(path, momentum, eps) if an `aten.batch_norm` in eval mode works on the tensors of one module that counts
    its batches; else None. name: operand -> parameter name."""
    _, *operands, training, momentum, eps = node.args[:8]
    path = name(operands[2]).rpartition(".")[0]
    expected = [f"{path}.{n}" if f"{path}.{n}" in tensors else "" for n in _NAMES]
    counts = f"{path}.num_batches_tracked" in tensors
    if not path or training or not counts or [name(o) for o in operands] != expected:
        return None
    return path, momentum, eps  # type: ignore[return-value]
