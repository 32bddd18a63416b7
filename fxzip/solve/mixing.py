"""Parents' values in merged coordinates: t = sum_i M_i h_i along the feature axes of a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from ..infer import Layout
from ..match import Matching
from ..products import exact, product
from ..rewrite.axes import AxisMap, apply, axis_map

NARROW = 192  # features


@dataclass(frozen=True)
class Mixer:
    """Maps the N parents' values of one node to merged coordinates. maps: of the features on `axes`, one per model."""

    axes: tuple[int, ...]
    maps: tuple[AxisMap, ...]

    def __call__(self, parents: Sequence[Tensor]) -> Tensor:
        """parents: N tensors of one shape -> their merge."""
        return reduce(torch.add, (_along(v, self.axes, m) for v, m in zip(parents, self.maps, strict=True)))


def mixer(
    layouts: Sequence[Layout],
    shape: Sequence[int],
    matchings: Mapping[str, Matching],
    shares: Sequence[float],
    where: str,
) -> Mixer | None:
    """The Mixer for a value of `shape` (a parent's) whose features lie as in `layouts`; what is no feature counts
    shares[i] in model i.

    None when no matched space is visible in it, or it has features on several groups of axes at once.
    """
    held = [(k, [(s, p) for s, p in k.runs if s in matchings]) for k in layouts]
    held = [(k, runs) for k, runs in held if runs]
    if len(held) != 1:
        return None
    layout, runs = held[0]
    length = prod(shape[a] for a in layout.axes)
    maps = tuple(
        axis_map(
            [(s, column, matchings[s].blocks_merge(i)) for s, p in runs for column in p.T],
            length,
            where,
            scale=share,
        )
        for i, share in enumerate(shares)
    )
    return Mixer(layout.axes, maps)


def _along(value: Tensor, axes: tuple[int, ...], step: AxisMap) -> Tensor:
    if len(axes) == 1:
        moved = value.movedim(axes[0], -1)
        channels_last = value.dtype is torch.bfloat16 and moved.is_contiguous()  # of images
        last = axes[0] == value.dim() - 1 or channels_last
        return _last(moved, step).movedim(-1, axes[0]) if last else apply(value, axes[0], step)
    last = tuple(range(-len(axes), 0))
    moved = value.movedim(axes, last)
    sizes = moved.shape[-len(axes) :]
    out = _last(moved.flatten(-len(axes)), step)
    return out.unflatten(-1, sizes).movedim(last, axes)  # jointly labelled axes keep their sizes


def _last(value: Tensor, step: AxisMap) -> Tensor:
    """Along the last axis: of few features a product of matrices, zeros and all, goes several times as fast as indices
    do, on a CPU. [..., length_in] -> [..., length]"""
    precise = value.dtype in (torch.float64, torch.bfloat16) or (value.dtype is torch.float32 and exact())
    if value.is_cpu and precise and value.shape[-1] <= NARROW:
        rows = value.reshape(-1, value.shape[-1])
        found = product(rows, step.matrix(value).mT)
        if bool(found.sum().isfinite()):  # or else 0 * inf might have come in
            return found.view(*value.shape[:-1], step.length)
    return apply(value, -1, step)
