"""Faster kernels for operators of lowered graphs: the same but for the order of sums and the sign of zeros."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..products import addmm, linear, product

aten = torch.ops.aten


def kernel(node: fx.Node, target: Any = None) -> Callable[..., Any]:
    """What computes a node of a lowered graph, or `target` (an OpOverload, or `operator.getitem`) in its place."""
    target = target or node.target
    if target is aten.max_pool2d_with_indices.default and all(_first(user) for user in node.users):
        return _max_pool
    return _KERNELS.get(target, target)


def _first(user: fx.Node) -> bool:
    """Whether a node takes the first of several results."""
    return user.target is operator.getitem and user.args[1:] == (0,)


def _softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`aten._safe_softmax` looks for rows that are -inf throughout, which takes three times as long as the softmax.
    Where no row comes out as NaN, there are none; a row is NaN throughout, or nowhere."""
    if type(x) is Tensor and x.is_cpu and not kwargs and x.dim() and x.numel():
        found = torch.softmax(x, *args)
        if bool(found.select(args[0], 0).sum().isfinite()):
            return found
    return aten._safe_softmax.default(x, *args, **kwargs)


def _max_pool(x: Tensor, size: list[int], stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False):
    """`aten.max_pool2d_with_indices`, where nobody asks for these: by oneDNN, which takes an eighth of the time."""
    plain = type(x) is Tensor and x.is_cpu and x.dtype is torch.float32 and x.dim() == 4 and x.is_contiguous()
    known = plain and not x.requires_grad and dilation in (1, [1, 1]) and bool(torch.backends.mkldnn.enabled)
    if known and torch.backends.mkldnn.is_available() and bool(x.sum().isfinite()):  # NaN comes through torch's own
        some = x.split(max(len(x) // 8, 1))  # what oneDNN reads is a copy
        return torch.cat([aten.mkldnn_max_pool2d(p.to_mkldnn(), size, stride, padding, dilation, ceil).to_dense()
                          for p in some]), None  # fmt: skip
    return aten.max_pool2d_with_indices.default(x, size, stride, padding, dilation, ceil)


_KERNELS: dict[Any, Any] = {
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.mm.default: product,
    aten.bmm.default: product,
    aten._safe_softmax.default: _softmax,
}
