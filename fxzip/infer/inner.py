"""Axes whose features are counted per block of another axis: the inputs of a grouped convolution.

A weight [(g o), c, k, k] reads feature (h, c) of its input only in block h of its first axis, so index c of its second
axis is another feature in every block. Such an axis is indexed by (h, c), flattened: `Segment.blocks` is the number g
of blocks. What permutes the first axis moves whole blocks, with what they read; the second axis is permuted inside
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXIS = 1  # the one axis that may have blocks; they are those of axis 0


def spread(x: Tensor, blocks: int) -> Tensor:
    """[(g o), c, *] -> [(g o), (g c), *]: what a block reads in columns of its own, zeros in those of others."""
    if blocks == 1:
        return x
    split = x.unflatten(0, (blocks, -1))  # [g, o, c, *]
    out = x.new_zeros(blocks, split.shape[1], blocks, *split.shape[2:])
    each = torch.arange(blocks, device=x.device)
    out[each, :, each] = split
    return out.flatten(2, 3).flatten(0, 1)


def gathered(x: Tensor, blocks: int) -> Tensor:
    """[(g o), (g c), *] -> [(g o), c, *]: what `spread` made; entries elsewhere are dropped."""
    if blocks == 1:
        return x
    each = torch.arange(blocks, device=x.device)
    return x.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1))[each, :, each].flatten(0, 1)


def permuted_inside(x: Tensor, index: Tensor) -> Tensor:
    """`x` [(g o), c, *], axis 0 permuted already, with column c of block h now what was column index[h, c] there.

    index: int64 [(g c)], the (block, column) that every feature was at; its blocks are those that axis 0 has moved.
    """
    columns = x.shape[AXIS]
    split = x.unflatten(0, (len(index) // columns, -1))  # [g, o, c, *]
    inside = (index % columns).reshape(-1, 1, columns, *[1] * (x.dim() - 2)).expand(-1, *split.shape[1:])
    return split.gather(2, inside).flatten(0, 1)
