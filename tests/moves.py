"""Random calls of operators that only move entries: what test_rule_laws.py compares the rules with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten
SIZES = (1, 2, 3, 4, 6)
NOTHING = 0  # where an operator puts what was in no operand; no label


class Draw:
    """Random choices for one call of an operator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def shape(self, least: int = 1, most: int = 4) -> list[int]:
        return [self(*SIZES) for _ in range(self.rng.integers(least, most + 1))]

    def axis(self, shape: list[int]) -> int:
        """Also counted from the end."""
        return int(self.rng.integers(-len(shape), len(shape)))

    def indices(self, size: int, count: int) -> Tensor:
        return torch.from_numpy(self.rng.integers(0, size, count))

    def factors(self, number: int) -> list[int]:
        found = [d for d in range(1, number + 1) if number % d == 0]
        first = self(*found)
        if number == 1 or self(True, False):
            return [first, number // first]
        return [first, *self.factors(number // first)]


Call = tuple[Any, list, dict]  # operator, arguments with a shape (list in `Shape`) for every tensor of labels, others


class Shape(list):
    """Stands for a labelled tensor among the arguments."""


def reshape(d: Draw) -> Call:
    shape = d.shape()
    return aten.reshape.default, [Shape(shape), d.factors(int(np.prod(shape)))], {}


def permute(d: Draw) -> Call:
    shape = d.shape()
    order = [int(a) - d(0, len(shape)) for a in d.rng.permutation(len(shape))]
    return aten.permute.default, [Shape(shape), order], {}


def transpose(d: Draw) -> Call:
    shape = d.shape()
    return aten.transpose.int, [Shape(shape), d.axis(shape), d.axis(shape)], {}


def expand(d: Draw) -> Call:
    shape = d.shape(1, 3)
    return aten.expand.default, [Shape(shape), [*d(([]), [2], [2, 3]), *(d(2, 3) if s == 1 else s for s in shape)]], {}


def repeat(d: Draw) -> Call:
    shape = d.shape(1, 3)
    return aten.repeat.default, [Shape(shape), [*d([], [2]), *(d(1, 2, 3) for _ in shape)]], {}


def split(d: Draw) -> Call:
    shape = d.shape()
    return aten.split.Tensor, [Shape(shape), d(1, 2, 4), d.axis(shape)], {}


def split_with_sizes(d: Draw) -> Call:
    shape = d.shape()
    axis = d.axis(shape)
    first = int(d.rng.integers(0, shape[axis] + 1))
    return aten.split_with_sizes.default, [Shape(shape), [first, shape[axis] - first], axis], {}


def unbind(d: Draw) -> Call:
    shape = d.shape(2)
    return aten.unbind.int, [Shape(shape), d.axis(shape)], {}


def slice_(d: Draw) -> Call:
    shape = d.shape()
    return aten.slice.Tensor, [Shape(shape), d.axis(shape), d(None, 0, 1, -2), d(None, 3, -1, 99), d(1, 2, 3)], {}


def select(d: Draw) -> Call:
    shape = d.shape(2)
    axis = d.axis(shape)
    return aten.select.int, [Shape(shape), axis, int(d.rng.integers(-shape[axis], shape[axis]))], {}


def flip(d: Draw) -> Call:
    shape = d.shape()
    axes = [int(a) - d(0, len(shape)) for a in d.rng.permutation(len(shape))[: d(1, 2)]]
    return aten.flip.default, [Shape(shape), axes], {}


def roll(d: Draw) -> Call:
    shape = d.shape()
    if d(True, False):
        return aten.roll.default, [Shape(shape), [d(1, -2, 5)]], {}
    axes = [int(a) for a in d.rng.permutation(len(shape))[: d(1, 2)]]
    return aten.roll.default, [Shape(shape), [d(1, -2, 3) for _ in axes], axes], {}


def index_select(d: Draw) -> Call:
    shape = d.shape()
    axis = d.axis(shape)
    return aten.index_select.default, [Shape(shape), axis, d.indices(shape[axis], d(1, 2, 5))], {}


def index(d: Draw) -> Call:
    """One index tensor of one or two axes, or two on any axes."""
    shape = d.shape(2)
    first, second = sorted(int(a) for a in d.rng.permutation(len(shape))[:2])
    given: list[Tensor | None] = [None] * (second + 1)
    given[first] = d.indices(shape[first], 6).reshape(d([6], [2, 3]))
    given[second] = d(None, d.indices(shape[second], 6).reshape(given[first].shape))
    return aten.index.Tensor, [Shape(shape), given], {}


def index_mask(d: Draw) -> Call:
    shape = d.shape(2)
    axis = int(d.rng.integers(0, len(shape)))
    covered = shape[axis : axis + d(1, 2)]
    mask = torch.from_numpy(d.rng.random(covered) < 0.7)
    return aten.index.Tensor, [Shape(shape), [*[None] * axis, mask]], {}


def gather(d: Draw) -> Call:
    shape = d.shape()
    axis = d.axis(shape)
    count = list(shape)
    count[axis] = d(1, 3)
    return aten.gather.default, [Shape(shape), axis, d.indices(shape[axis], int(np.prod(count))).reshape(count)], {}


def embedding(d: Draw) -> Call:
    return aten.embedding.default, [Shape([d(3, 4), d(2, 6)]), d.indices(3, 6).reshape(d([6], [2, 3]))], {}


def cat(d: Draw) -> Call:
    shape = d.shape()
    axis = d.axis(shape)
    parts = []
    for _ in range(d(1, 2, 3)):
        mine = list(shape)
        mine[axis] = d(1, 2, 4)
        parts.append(Shape(mine))
    if d(*[False] * 9, True):
        parts, axis = [Shape([0]), Shape([0])], 0
    elif d(True, False, False):
        parts.insert(0, Shape([0]))  # skipped
    return aten.cat.default, [parts, axis], {}


def stack(d: Draw) -> Call:
    shape = d.shape(1, 3)
    return aten.stack.default, [[Shape(shape) for _ in range(d(1, 2, 3))], d.axis([*shape, 1])], {}


def pad(d: Draw) -> Call:
    shape = [s + 2 for s in d.shape()]
    sides = [d(0, 1, 2, -1) for _ in range(2 * d(1, min(2, len(shape))))]
    return aten.constant_pad_nd.default, [Shape(shape), sides, NOTHING], {}


def slice_scatter(d: Draw) -> Call:
    shape = [s + 1 for s in d.shape()]
    axis, start, step = d.axis(shape), d(0, 1), d(1, 2)
    written = list(shape)
    written[axis] = len(range(shape[axis])[start:99:step])
    return aten.slice_scatter.default, [Shape(shape), Shape(written), axis, start, 99, step], {}


def select_scatter(d: Draw) -> Call:
    shape = d.shape(2)
    axis = d.axis(shape)
    written = list(shape)
    del written[axis]
    return aten.select_scatter.default, [Shape(shape), Shape(written), axis, d(0, -1)], {}


def squeeze(d: Draw) -> Call:
    return aten.squeeze.default, [Shape(d.shape())], {}


def unsqueeze(d: Draw) -> Call:
    shape = d.shape()
    return aten.unsqueeze.default, [Shape(shape), d.axis([*shape, 1])], {}


def unfold(d: Draw) -> Call:
    shape = [s + 2 for s in d.shape()]
    return aten.unfold.default, [Shape(shape), d.axis(shape), 2, d(1, 2)], {}


def triangle(d: Draw) -> Call:
    return d(aten.tril.default, aten.triu.default), [Shape(d.shape(2)), d(0, 1, -1)], {}


def pixel_shuffle(d: Draw) -> Call:
    return aten.pixel_shuffle.default, [Shape([*d([], [2]), 4 * d(1, 3), d(1, 2), d(2, 3)]), 2], {}


def pixel_unshuffle(d: Draw) -> Call:
    return aten.pixel_unshuffle.default, [Shape([*d([], [2]), d(1, 3), 2 * d(1, 2), 2 * d(2, 3)]), 2], {}


def channel_shuffle(d: Draw) -> Call:
    groups = d(1, 2, 3)
    return aten.channel_shuffle.default, [Shape([d(1, 2), groups * d(1, 2, 3), d(1, 2), 2]), groups], {}


def copy(d: Draw) -> Call:
    shape = d.shape()
    source = [d(1, s) for s in shape[int(d.rng.integers(0, len(shape))) :]]
    return aten.copy.default, [Shape(shape), Shape(source)], {}


def im2col(d: Draw) -> Call:
    shape = [*d([], [1], [2]), d(1, 3), d(3, 4), d(3, 4)]
    return aten.im2col.default, [Shape(shape), [d(1, 2), d(1, 2)], [d(1, 2), 1], [d(0, 1), 0], [1, d(1, 2)]], {}


def col2im(d: Draw) -> Call:
    """Patches side by side: each entry has one place."""
    kernel, patches = [d(1, 2), d(1, 3)], [d(1, 2), d(2, 3)]
    columns = [*d([], [1], [2]), d(1, 3) * kernel[0] * kernel[1], patches[0] * patches[1]]
    size = [k * n for k, n in zip(kernel, patches, strict=True)]
    return aten.col2im.default, [Shape(columns), size, kernel, [1, 1], [0, 0], kernel], {}


def replicate(d: Draw) -> Call:
    """Entries at the edges once more, or those beside them."""
    shape = [*d([], [2]), d(1, 3), d(3, 4), d(3, 4)]
    return d(aten.replication_pad2d.default, aten.reflection_pad2d.default), [Shape(shape), [d(0, 1), 2, 1, 0]], {}


def nearest(d: Draw) -> Call:
    return aten.upsample_nearest1d.default, [Shape([2, d(1, 3), d(2, 3)]), [d(2, 4, 6)]], {}


MOVES: list[Callable[[Draw], Call]] = [
    reshape, permute, transpose, expand, repeat, split, split_with_sizes, unbind, slice_, select, flip, roll,
    index_select, index, index_mask, gather, embedding, cat, stack, pad, slice_scatter, select_scatter, squeeze,
    unsqueeze, unfold, triangle, pixel_shuffle, pixel_unshuffle, channel_shuffle, copy, im2col, col2im, replicate,
    nearest,
]  # fmt: skip
FREE = [  # nothing here gives an order to features
    reshape, permute, transpose, expand, repeat, split, split_with_sizes, unbind, slice_, select, flip, roll,
    index_select, pad, squeeze, unsqueeze, pixel_shuffle, pixel_unshuffle, channel_shuffle, copy,
]  # fmt: skip
