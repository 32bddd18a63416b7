"""Parents' values in merged coordinates: t = sum_i M_i h_i along the feature axes of a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..infer import Layout
from ..match import Matching
from ..rewrite.parameters import AxisMap, apply, axis_map


@dataclass(frozen=True)
class Mixer:
    """Maps the N parents' values of one node to merged coordinates. maps: per layout, axes and a map per model."""

    maps: tuple[tuple[tuple[int, ...], tuple[AxisMap, ...]], ...]

    def __call__(self, parents: Sequence[Tensor]) -> Tensor:
        """parents: N tensors of one shape -> their merge; axes without features are averaged."""
        total = None
        for i, value in enumerate(parents):
            first = True
            for axes, maps in self.maps:
                value = _along(value, axes, maps[i])
                first = False
            value = value if not first else value / len(parents)
            total = value if total is None else total + value
        assert total is not None
        return total


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
    length = 1
    for a in layout.axes:
        length *= int(shape[a])
    if max(int(p.max()) for _, p in runs) >= length:
        return None  # at this batch size the batch is flattened into these axes
    maps = tuple(
        axis_map(
            [(s, column, matchings[s].blocks_merge(i)) for s, p in runs for column in p.T],
            length,
            where,
            scale=share,
        )
        for i, share in enumerate(shares)
    )
    return Mixer(((layout.axes, maps),))


def _along(value: Tensor, axes: tuple[int, ...], step: AxisMap) -> Tensor:
    if len(axes) == 1:
        return apply(value, axes[0], step)
    last = tuple(range(-len(axes), 0))
    moved = value.movedim(axes, last)
    sizes = moved.shape[moved.dim() - len(axes) :]
    out = apply(moved.flatten(-len(axes)), -1, step)
    return out.unflatten(-1, sizes).movedim(last, axes)  # jointly labelled axes keep their sizes
