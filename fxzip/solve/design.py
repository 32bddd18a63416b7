"""Contractions as linear regression: design rows and target rows of one ATen op, at sampled positions.

Every op here computes y[row] = W x[row] (+ bias) for rows (batch item, position). `design_of` gives the Design
of a node; an op without one keeps its merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..measure.programs import rows_at
from .affine import packet
from .slots import argument


@dataclass(frozen=True)
class Rows:
    """x: design rows [r, g, p]; y: gathers the same rows [r, g, o] of any tensor in the op's output layout; of: how
    many there were to draw from."""

    x: Tensor
    y: Callable[[Tensor], Tensor]
    of: int


@dataclass(frozen=True)
class Design:
    """data, weight, bias: positions of these operands among the op's arguments.

    rows(arguments by name, count, generator) samples design rows; matrix(operand) -> [g, o, p] and
    operand(matrix, like) -> the operand are inverse to each other, in the layout of the op's weight argument.
    seen(arguments, nodes where they are values): which of the p columns ever meet anything but padding, int64; None:
    all. The rest has no say in the outputs, and keeps the weights it had.
    """

    data: str
    weight: str
    bias: str | None
    rows: Callable[[Mapping[str, Any], int, torch.Generator], Rows]
    matrix: Callable[[Tensor, int], Tensor]
    operand: Callable[[Tensor, Sequence[int]], Tensor]
    seen: Callable[[Mapping[str, Any]], Tensor | None] = lambda given: None


def pick(rows: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Indices of `count` of `rows` rows at random; all of them, in order, if there are no more. int64 [r]"""
    if rows <= count:
        return torch.arange(rows, device=device)
    return torch.randint(rows, (count,), generator=generator).to(device)


def _matmul_rows(data: Tensor, count: int, generator: torch.Generator) -> Rows:
    """Rows of a matrix product: every axis of the data but the last is a sample."""
    flat = data.reshape(-1, data.shape[-1])
    index = pick(len(flat), count, generator, data.device)
    take = lambda t: rows_at(t, index, t.dim() - 1).unsqueeze(1)  # noqa: E731
    return Rows(take(flat), take, len(flat))


def _transposed(operand: Tensor, groups: int) -> Tensor:
    return operand.T.unsqueeze(0)  # [p, o] -> [1, o, p]


def _untransposed(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    return matrix[0].T.reshape(tuple(shape))


def _conv_rows(args: Mapping[str, Any], count: int, generator: torch.Generator) -> Rows:
    """Patches [r, g, c*k] at random (batch item, output position); groups share the positions."""
    kernel = args["weight"].shape[2:]
    stride, padding, dilation = (_spread(args[k], len(kernel)) for k in ("stride", "padding", "dilation"))
    padded = F.pad(args["input"], [p for q in reversed(padding) for p in (q, q)])
    return _patches(padded, kernel, stride, dilation, args["groups"], count, generator)


def _conv_seen(given: Mapping[str, Any]) -> Tensor | None:
    """Not all taps of a kernel are, where the data is as small as it: of 3 x 3 on a single pixel one."""
    data, weight = given["input"].meta["shape"], given["weight"].meta["shape"]
    d = len(weight) - 2
    stride, padding, dilation = (_spread(given[k], d) for k in ("stride", "padding", "dilation"))
    taps = torch.ones(1, dtype=torch.bool)
    for i in range(d):
        at = torch.arange(weight[2 + i])[:, None] * dilation[i] - padding[i]  # [k_i, outputs]
        last = data[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1
        at = at + torch.arange(0, last + 1, stride[i])
        taps = (taps[:, None] & ((at >= 0) & (at < data[2 + i])).any(1)).flatten()
    return None if bool(taps.all()) or not bool(taps.any()) else taps.repeat(weight[1]).nonzero().flatten()


def _transposed_rows(args: Mapping[str, Any], count: int, generator: torch.Generator) -> Rows:
    """A transposed convolution is a plain one, with its kernel turned round, on data with stride - 1 zeros between."""
    data, kernel = args["input"], args["weight"].shape[2:]
    d = len(kernel)
    stride, padding, dilation, extra = (
        _spread(args[k], d) for k in ("stride", "padding", "dilation", "output_padding")
    )
    spread = data.new_zeros(*data.shape[:2], *((n - 1) * s + 1 for n, s in zip(data.shape[2:], stride, strict=True)))
    spread[(..., *(slice(None, None, s) for s in stride))] = data
    edges = [dilation[i] * (kernel[i] - 1) - padding[i] for i in range(d)]  # negative: cut off
    padded = F.pad(spread, [p for i in reversed(range(d)) for p in (edges[i], edges[i] + extra[i])])
    return _patches(padded, kernel, [1] * d, dilation, args["groups"], count, generator)


def _patches(
    padded: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    g: int,
    count: int,
    generator: torch.Generator,
) -> Rows:
    """Rows of a convolution without padding."""
    d = len(kernel)
    out = [(padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(d)]
    total = padded.shape[0] * int(torch.tensor(out).prod())
    flat = pick(total, count, generator, padded.device)
    place = torch.unravel_index(flat, (padded.shape[0], *out))  # batch, then positions
    index: list[Tensor] = []
    for i in range(d):
        taps = torch.arange(kernel[i], device=padded.device) * dilation[i]
        at = place[1 + i][:, None] * stride[i] + taps  # [r, k_i]
        index.append(at.reshape(len(flat), *[kernel[i] if j == i else 1 for j in range(d)]))
    batch = place[0].reshape(-1, *[1] * d)
    patches = padded.movedim(1, -1)[(batch, *index)]  # [r, *kernel, channels]
    patches = patches.movedim(-1, 1).reshape(len(flat), g, -1)  # [r, g, c*k]

    def gather(t: Tensor) -> Tensor:
        return t.movedim(1, -1)[place].reshape(len(flat), g, -1)

    return Rows(patches, gather, total)


def _spread(value: Any, d: int) -> list[int]:
    value = [int(v) for v in value]
    return value * d if len(value) == 1 else value


def _plain(operand: Tensor, groups: int) -> Tensor:
    return operand.unsqueeze(0)  # [o, p] -> [1, o, p]


def _unplain(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    return matrix[0].reshape(tuple(shape))


def _conv_matrix(operand: Tensor, groups: int) -> Tensor:
    return operand.reshape(groups, operand.shape[0] // groups, -1)  # [g, o, c*k]


def _conv_operand(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    return matrix.reshape(tuple(shape))


def _turned(operand: Tensor, groups: int) -> Tensor:
    """[g*c, o, *k] of a transposed convolution -> [g, o, c*k] of the plain one it is."""
    kernel = operand.shape[2:]
    split = operand.reshape(groups, -1, *operand.shape[1:]).transpose(1, 2)  # [g, o, c, *k]
    return split.flip(tuple(range(3, 3 + len(kernel)))).reshape(groups, operand.shape[1], -1)


def _unturned(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    kernel = tuple(shape[2:])
    split = matrix.reshape(len(matrix), shape[1], -1, *kernel).flip(tuple(range(3, 3 + len(kernel))))
    return split.transpose(1, 2).reshape(tuple(shape))


_DESIGNS: Mapping[str, Design] = {
    "linear": Design("input", "weight", "bias", lambda a, c, g: _matmul_rows(a["input"], c, g), _plain, _unplain),
    "addmm": Design("mat1", "mat2", "self", lambda a, c, g: _matmul_rows(a["mat1"], c, g), _transposed, _untransposed),
    "mm": Design("self", "mat2", None, lambda a, c, g: _matmul_rows(a["self"], c, g), _transposed, _untransposed),
    "convolution": Design("input", "weight", "bias", _conv_rows, _conv_matrix, _conv_operand, _conv_seen),
}
_CONV_TRANSPOSED = Design("input", "weight", "bias", _transposed_rows, _turned, _unturned)


def design_of(node: fx.Node) -> Design | None:
    """How to regress this op, or None."""
    name = packet(node)
    return _CONV_TRANSPOSED if name == "convolution" and argument(node, "transposed") else _DESIGNS.get(name)
