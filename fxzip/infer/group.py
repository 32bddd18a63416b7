"""Apply group elements to parameters: permute spaces, or duplicate one unit and shift weight between the copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from .spaces import FeatureSpace

Use = tuple[str, int]  # parameter, axis
State = Mapping[str, Tensor]


def axis_indices(spaces: Iterable[FeatureSpace], permutations: Mapping[str, np.ndarray], state: State) -> dict[Use, np.ndarray]:
    """(parameter, axis) -> int64 index: the permuted axis is `old.index_select(axis, index)`. Identities left out."""
    indices: dict[Use, np.ndarray] = {}
    for space in spaces:
        permutation = permutations[space.name]
        for s in space.segments:
            use = (s.parameter, s.axis)
            if use not in indices:
                indices[use] = np.arange(state[s.parameter].shape[s.axis])
            indices[use][s.positions] = s.positions[permutation]
    return {use: index for use, index in indices.items() if (index != np.arange(len(index))).any()}


def permuted(state: State, indices: Mapping[Use, np.ndarray], leave_out: Collection[Use] = ()) -> dict[str, Tensor]:
    """A new state with every axis in `indices` permuted; `leave_out` is for negative controls."""
    out = dict(state)
    for (name, axis), index in indices.items():
        if (name, axis) not in leave_out:
            out[name] = out[name].index_select(axis, torch.from_numpy(index).to(out[name].device))
    return out


def duplicated(
    state: State, spaces: Iterable[FeatureSpace], rng: np.random.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Three states that test roles: (base, shifted, control).

    base: in every space with a consumer one unit is made a copy of another (produce and vector axes).
    shifted: consuming weight moved from the unit to its copy, so the function equals base's.
    control: the same weight taken from the unit only, so the function differs.
    """
    base = {n: t.clone() for n, t in state.items()}
    deltas: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for space in spaces:
        pair = _exchangeable_pair(space, rng)
        if pair is None:
            continue
        source, copy = pair
        for s in space.segments:
            axis, a, b = s.axis, int(s.positions[source]), int(s.positions[copy])
            if "consume" in s.roles:
                deltas[s.parameter].append((axis, a, b))
            else:
                base[s.parameter].select(axis, b).copy_(base[s.parameter].select(axis, a))
    shifted = {n: t.clone() if n in deltas else t for n, t in base.items()}
    control = {n: t.clone() if n in deltas else t for n, t in base.items()}
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    for name, moves in deltas.items():
        # on one parameter several axes may consume; deltas along one must not touch units of another
        for axis, a, b in moves[:1]:
            delta = torch.randn(base[name].select(axis, a).shape, generator=generator, dtype=base[name].dtype)
            delta = delta.to(base[name].device) * base[name].std()
            shifted[name].select(axis, a).add_(delta)
            shifted[name].select(axis, b).sub_(delta)
            control[name].select(axis, a).add_(delta)
    return base, shifted, control


def _exchangeable_pair(space: FeatureSpace, rng: np.random.Generator) -> tuple[int, int] | None:
    if space.orthogonal_only or not space.segments:
        return None
    blocks = space.blocks
    for first in rng.permutation(space.size)[:16]:
        others = np.flatnonzero((blocks == blocks[first]) & (np.arange(space.size) != first))
        if len(others):
            return int(first), int(rng.choice(others))
    return None
