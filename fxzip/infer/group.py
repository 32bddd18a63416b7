"""Apply group elements to parameters: permute spaces, or duplicate one unit and shift weight between the copies."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .inner import permuted_inside
from .spaces import FeatureSpace, Segment

Use = tuple[str, int]  # parameter, axis
State = Mapping[str, Tensor]


def axis_indices(
    spaces: Iterable[FeatureSpace], permutations: Mapping[str, np.ndarray], state: State
) -> dict[Use, np.ndarray]:
    """(parameter, axis) -> int64 index: the permuted axis is `old.index_select(axis, index)`. Identities left out.
    Of an axis in blocks (`Segment.blocks`) the index is of (block, index on the axis)."""
    indices: dict[Use, np.ndarray] = {}
    for space in spaces:
        permutation = permutations[space.name]
        for s in space.segments:
            use = (s.parameter, s.axis)
            if use not in indices:
                indices[use] = np.arange(state[s.parameter].shape[s.axis] * s.blocks)
            indices[use][s.positions] = s.positions[permutation]
    return {use: index for use, index in indices.items() if (index != np.arange(len(index))).any()}


def permuted(state: State, indices: Mapping[Use, np.ndarray], leave_out: Collection[Use] = ()) -> dict[str, Tensor]:
    """A new state with every axis in `indices` permuted; `leave_out` is for negative controls."""
    out = dict(state)
    for (name, axis), index in sorted(indices.items(), key=lambda use: use[0][1]):  # blocks move first
        if (name, axis) not in leave_out:
            x, at = out[name], torch.from_numpy(index).to(out[name].device)
            out[name] = x.index_select(axis, at) if len(at) == x.shape[axis] else permuted_inside(x, at)
    return out


@contextmanager
def moved(state: State, indices: Mapping[Use, np.ndarray], leave_out: Collection[Use] = ()) -> Iterator[None]:
    """Inside the block `state` is as `permuted` makes it, in place: no second copy of a large model is held."""
    wanted = {use: index for use, index in indices.items() if use not in leave_out}
    try:
        for use, index in sorted(wanted.items(), key=lambda item: item[0][1]):
            _move(state, use, index)
        yield
    finally:
        for use, index in sorted(wanted.items(), key=lambda item: -item[0][1]):
            _move(state, use, _inverse(index, state[use[0]].shape[use[1]]))


def _move(state: State, use: Use, index: np.ndarray) -> None:
    state[use[0]].copy_(permuted(state, {use: index})[use[0]])


def _inverse(index: np.ndarray, length: int) -> np.ndarray:
    """Of a permutation of an axis of `length`, or of (block, index on the axis), where blocks stay in place."""
    inside = (index % length).reshape(-1, length)  # [blocks, length]
    return (inside.argsort(1) + length * np.arange(len(inside))[:, None]).ravel()


def duplicated(state: State, spaces: Iterable[FeatureSpace], rng: np.random.Generator) -> Generator[None]:
    """Edits `state` in place to three states that test roles, one a step: base, shifted, control; and undoes it.
    No step when no space has both two exchangeable units and a consumer.

    base: in every such space one unit is made a copy of another (produce and vector axes).
    shifted: all consuming weight of the copy is added to the unit's, so the function equals base's; and the
    copy, which nobody reads now, is changed (where no op mixes features without weights).
    control: the same weight taken from the copy and given to nobody, so the function differs.
    """
    pairs = [(s, p) for s in spaces if (p := _exchangeable_pair(s, rng)) is not None]
    uses = [(f, s, _entry(state, s, a), _entry(state, s, b)) for f, (a, b) in pairs for s in f.segments]
    if not pairs:
        return
    with _restored(uses):
        for _, s, unit, twin in uses:
            if "consume" not in s.roles:
                twin.copy_(unit)
        yield
        with _restored(uses):
            for space, s, unit, twin in uses:
                if "consume" in s.roles:
                    unit.add_(twin)
                    twin.zero_()
                elif not space.nonlinear:
                    twin.mul_(1.7)
            yield
        for _, s, _, twin in uses:
            if "consume" in s.roles:
                twin.zero_()
        yield


@contextmanager
def _restored(uses: Sequence[tuple[FeatureSpace, Segment, Tensor, Tensor]]) -> Iterator[None]:
    """Afterwards the entries hold what they hold now."""
    before = [(entry, entry.clone()) for *_, unit, twin in uses for entry in (unit, twin)]
    try:
        yield
    finally:
        for entry, value in before:
            entry.copy_(value)


def _entry(state: State, segment: Segment, feature: int) -> Tensor:
    """View of what belongs to one feature of a segment."""
    x, position = state[segment.parameter], int(segment.positions[feature])
    if segment.blocks > 1:
        block, position = divmod(position, x.shape[segment.axis])
        x = x.tensor_split(segment.blocks)[block]
    return x.select(segment.axis, position)


def _exchangeable_pair(space: FeatureSpace, rng: np.random.Generator) -> tuple[int, int] | None:
    if space.orthogonal_only or not any("consume" in s.roles for s in space.segments):
        return None
    blocks = space.blocks
    for first in rng.permutation(space.size)[:16]:
        others = np.flatnonzero((blocks == blocks[first]) & (np.arange(space.size) != first))
        if len(others):
            return int(first), int(rng.choice(others))
    return None
