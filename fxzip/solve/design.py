"""Contractions as linear regression: design rows and target rows of one ATen op, at sampled positions.

Every op here computes y[row] = W x[row] (+ bias) for rows (batch item, position). `DESIGNS` maps the ATen
packet to a function of the op's actual operands; an op without one keeps its merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """x: design rows [r, g, p]; y: gathers the same rows [r, g, o] of any tensor in the op's output layout."""

    x: Tensor
    y: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Design:
    """data, weight, bias: positions of these operands among the op's arguments.

    rows(arguments by name, count, generator) samples design rows; matrix(operand) -> [g, o, p] and
    operand(matrix, like) -> the operand are inverse to each other, in the layout of the op's weight argument.
    """

    data: str
    weight: str
    bias: str | None
    rows: Callable[[Mapping[str, Any], int, torch.Generator], Rows]
    matrix: Callable[[Tensor, int], Tensor]
    operand: Callable[[Tensor, Sequence[int]], Tensor]


def _pick(rows: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    if rows <= count:
        return torch.arange(rows, device=device)
    return torch.randint(rows, (count,), generator=generator).to(device)


def _matmul_rows(data: Tensor, count: int, generator: torch.Generator) -> Rows:
    """Rows of a matrix product: every axis of the data but the last is a sample."""
    flat = data.reshape(-1, data.shape[-1])
    index = _pick(len(flat), count, generator, data.device)
    return Rows(flat[index].unsqueeze(1), lambda t: t.reshape(-1, t.shape[-1])[index].unsqueeze(1))


def _transposed(operand: Tensor, groups: int) -> Tensor:
    return operand.T.unsqueeze(0)  # [p, o] -> [1, o, p]


def _untransposed(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    return matrix[0].T.reshape(tuple(shape))


def _conv_rows(args: Mapping[str, Any], count: int, generator: torch.Generator) -> Rows:
    """Patches [r, g, c*k] at random (batch item, output position); groups share the positions."""
    data, weight, g = args["input"], args["weight"], args["groups"]
    kernel = weight.shape[2:]
    d = len(kernel)
    stride, padding, dilation = (_spread(args[k], d) for k in ("stride", "padding", "dilation"))
    out = [(data.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(d)]
    total = data.shape[0] * int(torch.tensor(out).prod())
    flat = _pick(total, count, generator, data.device)
    place = torch.unravel_index(flat, (data.shape[0], *out))  # batch, then positions
    padded = F.pad(data, [p for q in reversed(padding) for p in (q, q)])
    index: list[Tensor] = []
    for i in range(d):
        taps = torch.arange(kernel[i], device=data.device) * dilation[i]
        at = place[1 + i][:, None] * stride[i] + taps  # [r, k_i]
        index.append(at.reshape(len(flat), *[kernel[i] if j == i else 1 for j in range(d)]))
    batch = place[0].reshape(-1, *[1] * d)
    patches = padded.movedim(1, -1)[(batch, *index)]  # [r, *kernel, channels]
    patches = patches.movedim(-1, 1).reshape(len(flat), g, -1)  # [r, g, c*k]

    def gather(t: Tensor) -> Tensor:
        return t.movedim(1, -1)[place].reshape(len(flat), g, -1)

    return Rows(patches, gather)


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


DESIGNS: Mapping[str, Design] = {
    "linear": Design("input", "weight", "bias", lambda a, c, g: _matmul_rows(a["input"], c, g), _plain, _unplain),
    "addmm": Design("mat1", "mat2", "self", lambda a, c, g: _matmul_rows(a["mat1"], c, g), _transposed, _untransposed),
    "mm": Design("self", "mat2", None, lambda a, c, g: _matmul_rows(a["self"], c, g), _transposed, _untransposed),
    "convolution": Design("input", "weight", "bias", _conv_rows, _conv_matrix, _conv_operand),
}
