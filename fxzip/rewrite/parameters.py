"""Merged weights: W* = sum_i W_i x_axis A_i; A = M_i where an axis makes features, U_i^T where it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import SpaceError
from ..infer.inner import AXIS
from ..infer.spaces import MAKES
from .axes import apply, axis_map
from .blocks import in_blocks

if TYPE_CHECKING:
    from ..infer.spaces import Segment, Spaces
    from ..match import Matching


def merge_parameters(
    states: Sequence[Mapping[str, Tensor]],
    spaces: Spaces,
    matchings: Mapping[str, Matching],
    names: Collection[str],
    shares: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Merge the parameters `names` of N models (design, section 1; ZipIt!, arXiv:2305.03053, eq. 4).

    states: per model name -> tensor. spaces: inferred on model 0. matchings: space name -> Matching; spaces
    without one are averaged as they are, model i counting shares[i] (default: all alike). Computed in float64 on
    the CPU, returned in the dtype and on the device of model 0. Integers must agree.
    Untouched parameters (counters of batches) are left out: build takes model 0's, extract gives back each model's own.
    Raises SpaceError when an axis cannot be laid out at the merged width, or integers differ.
    """
    shares = shares or (1.0 / len(states),) * len(states)
    segments = _by_parameter(spaces, matchings)
    first_name = tied_names(spaces)
    merged = {}
    for name in names:
        key = first_name.get(name, name)
        if key in spaces.untouched:
            continue
        tensors = [_get(s, name if name in s else key, i) for i, s in enumerate(states)]
        first = tensors[0].detach()
        if not (first.is_floating_point() or first.is_complex()):
            merged[name] = _integers(name, tensors)
        else:
            merged[name] = _merge(name, tensors, segments.get(key, {}), matchings, shares)
    return merged


def tied_names(spaces: Spaces) -> Mapping[str, str]:
    """Other name -> first name of tied parameters; segments speak of first names only."""
    return getattr(spaces.lowered, "tied", {})


def _by_parameter(spaces: Spaces, matchings: Mapping[str, Matching]) -> dict[str, dict[int, list]]:
    """parameter -> axis -> [(space name, segment)], matched spaces only."""
    table: dict[str, dict[int, list]] = {}
    for space in spaces:
        for segment in space.segments if space.name in matchings else ():
            table.setdefault(segment.parameter, {}).setdefault(segment.axis, []).append((space.name, segment))
    return table


def _merge(
    name: str,
    tensors: Sequence[Tensor],
    axes: Mapping[int, list],
    matchings: Mapping[str, Matching],
    shares: Sequence[float],
) -> Tensor:
    """sum_i W_i x_axis A_i. The first axis that makes features sums over models; without one, the weighted mean.
    An axis in blocks is mapped together with axis 0, whose blocks they are."""
    making = min((a for a, held in axes.items() if any(s.roles & MAKES for _, s in held)), default=None)
    total = None
    for i, tensor in enumerate(tensors):
        x = tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)
        share, steps = shares[i], {}
        for axis, held in sorted(axes.items()):
            where, many = f"{name}[axis {axis}]", held[0][1].blocks
            pieces = _pieces(held, matchings, i, axis == making, share)
            step = axis_map(pieces, tensors[0].shape[axis] * many, where, scale=share if axis == making else 1.0)
            if step.length_in != x.shape[axis] * many:
                raise SpaceError(
                    f"{where}: model {i} has {x.shape[axis] * many} entries where its spaces make {step.length_in}"
                )
            steps[axis] = step
        blocks = max((held[0][1].blocks for held in axes.values()), default=1)
        if blocks > 1:
            x = in_blocks(x, steps.pop(0, None), steps.pop(AXIS), blocks, name)
        for axis, step in steps.items():
            x = apply(x, axis, step)
        x = x if making is not None else x * share
        if total is not None and total.shape != x.shape:
            raise SpaceError(
                f"{name}: {list(tensors[0].shape)} and {list(tensor.shape)} differ outside any space"
            )
        total = x if total is None else total + x
    assert total is not None
    return total.contiguous().to(tensors[0].device, tensors[0].dtype)


def _pieces(
    held: Sequence[tuple[str, Segment]], matchings: Mapping[str, Matching], i: int, making: bool, share: float
) -> list[tuple[str, np.ndarray, Tensor]]:
    """(space, positions, matrix [m, n_i]) of every segment of an axis: M_i, or U_i^T.

    On the summing axis U_i^T takes the model's share, so that its rows are means over models.
    """
    made: dict[tuple[str, bool], Tensor] = {}
    pieces = []
    for space, segment in held:
        merges = making and bool(segment.roles & MAKES)
        if (space, merges) not in made:
            matching = matchings[space]
            matrix = matching.blocks_merge(i) if merges else matching.blocks_unmerge(i).T
            made[space, merges] = matrix * share if making and not merges else matrix
        pieces.append((space, segment.positions, made[space, merges]))
    return pieces


def _integers(name: str, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0].detach()
    if any(t.shape != first.shape or not torch.equal(t.to(first.device), first) for t in tensors[1:]):
        raise SpaceError(f"{name}: integer buffers differ between models and cannot be averaged")
    return first.clone()


def _get(state: Mapping[str, Tensor], name: str, i: int) -> Tensor:
    if name not in state:
        raise SpaceError(f"{name}: model {i} has no such parameter or buffer")
    return state[name]
