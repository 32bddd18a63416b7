"""Models of one graph and different hidden widths, brought to the widest one's: narrower ones get idle features.

An idle feature is made like the model's own first one and read by nothing (its consuming weights are zero), so the
padded network computes what it did; whether it does is tried, as a norm over all features may count idle ones. They
are never matched: see `Matching.expanded`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .infer import FeatureSpace, Segment, Spaces, analyse
from .infer.inner import AXIS, gathered, spread
from .infer.spaces import MAKES
from .rewrite.absorb import close
from .rewrite.modules import Tensors, fill
from .trace import state_of

Real = Mapping[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Padded:
    """graph_modules: all of one width. widest: the model that needed no padding. real: space -> for every model the
    features of the padded space that are its own, where widths differ. reason: why it was not possible, or ""."""

    graph_modules: tuple[fx.GraphModule, ...] = ()
    widest: int = 0
    real: Real = field(default_factory=dict)
    reason: str = ""


def pad(graph_modules: Sequence[fx.GraphModule], args: tuple, names: Sequence[str]) -> Padded | None:
    """The models at the widths of the widest, if it is in spaces alone that their shapes differ; None where no space
    differs. The models are not changed. args: example inputs."""
    states = [state_of(g) for g in graph_modules]
    shapes = [{n: tuple(t.shape) for n, t in s.items()} for s in states]
    if all(s == shapes[0] for s in shapes):
        return None
    once = {repr(s): analyse(g, args) for s, g in zip(shapes, graph_modules, strict=True)}
    spaces = [once[repr(s)] for s in shapes]
    uneven = [s.name for s in spaces[0] if len({_size(found, s.name) for found in spaces}) > 1]
    if not uneven or any(_structure(found) != _structure(spaces[0]) for found in spaces):
        return None  # nothing does, or more than widths: there is nothing to say about them
    widest = max(range(len(spaces)), key=lambda i: sum(_size(spaces[i], n) for n in uneven))
    for name in uneven:
        other = max(range(len(spaces)), key=lambda i: _size(spaces[i], name))
        if _size(spaces[other], name) > _size(spaces[widest], name):
            return Padded(reason=f"{names[widest]} is wider elsewhere, and {names[other]} in {name}")
    places = _all_places(spaces, spaces[widest])
    if not places:
        return Padded(reason="a block of features (an attention head, say) is larger than its counterpart")
    made = []
    for i, module in enumerate(graph_modules):
        if shapes[i] != shapes[widest]:
            values = _padded(states[i], spaces[i], shapes[widest], spaces[widest], places[i])
            if values is None:
                return Padded(reason="what lies beside the features differs, too")
            module = _filled(graph_modules[widest], module, values)
            if not _same(graph_modules[i], module, args):
                return Padded(reason=f"idle features would change what {names[i]} computes (a norm over all?)")
        made.append(module)
    return Padded(tuple(made), widest, {name: tuple(p[name] for p in places) for name in uneven})


def _size(spaces: Spaces, name: str) -> int:
    return next((s.size for s in spaces if s.name == name), -1)


def _structure(spaces: Spaces) -> list[tuple]:
    return [
        (s.name, [(g.parameter, g.axis, g.roles) for g in s.segments], [p.space for p in s.parents]) for s in spaces
    ]


def _all_places(every: Sequence[Spaces], widest: Spaces) -> list[dict[str, np.ndarray]]:
    """`_places` of every model; none if a block has no room for a model's."""
    found = [_places(own, widest) for own in every]
    return [p for p in found if p is not None] if None not in found else []


def _places(own: Spaces, widest: Spaces) -> dict[str, np.ndarray] | None:
    """Space -> the padded feature of every own one: the k-th of a block goes to the k-th of that block. int [n_i]

    None where a block has no room for them."""
    found: dict[str, np.ndarray] = {}
    for mine, wide in zip(own, widest, strict=True):
        blocks = [found[p.space][p.index] for p in mine.parents]
        here, there = _blocks(blocks, mine.size), _blocks([p.index for p in wide.parents], wide.size)
        if any(len(members) > len(there.get(key, ())) for key, members in here.items()):
            return None
        found[mine.name] = np.array([there[key][k] for key, k in _ranked(here, mine)], np.int64)
    return found


def _blocks(indices: Sequence[np.ndarray], size: int) -> dict[tuple, list[int]]:
    """Features by the tuple of their blocks, in order."""
    found: dict[tuple, list[int]] = {}
    for k in range(size):
        found.setdefault(tuple(int(i[k]) for i in indices), []).append(k)
    return found


def _ranked(blocks: Mapping[tuple, list[int]], space: FeatureSpace) -> list[tuple[tuple, int]]:
    """(block, position in it) of every feature."""
    ranked: list[tuple[tuple, int]] = [((), 0)] * space.size
    for key, members in blocks.items():
        for k, feature in enumerate(members):
            ranked[feature] = key, k
    return ranked


def _padded(
    state: Mapping[str, Tensor],
    spaces: Spaces,
    shapes: Mapping[str, tuple[int, ...]],
    widest: Spaces,
    places: Mapping[str, np.ndarray],
) -> dict[str, Tensor] | None:
    """`state` at the widest model's widths; None where entries beside the features do not correspond."""
    own, wide = _by_axis(spaces), _by_axis(widest)
    made = {}
    for name, tensor in state.items():
        key = spaces.lowered.tied.get(name, name)
        blocks = {s.blocks for axes in (own, wide) for held in axes.get(key, {}).values() for _, s in held}
        many = max(blocks, default=1)
        if len(blocks - {1}) > 1:
            return None
        x = spread(tensor.detach(), many)
        for axis, held in own.get(key, {}).items():
            length = shapes[name][axis] * (many if axis == AXIS else 1)
            taken, source = np.zeros(length, bool), np.full(length, -1)
            for (space, mine), (_, theirs) in zip(held, wide[key][axis], strict=True):
                taken[theirs.positions] = True
                # idle features: copies where features are made, zeros where they are read
                source[theirs.positions] = mine.positions[0] if mine.roles & MAKES else -1
                source[theirs.positions[places[space]]] = mine.positions
            rest = np.setdiff1d(np.arange(x.shape[axis]), np.concatenate([m.positions for _, m in held]))
            if len(rest) != (~taken).sum():
                return None
            source[~taken] = rest
            x = _select(x, axis, source)
        made[name] = gathered(x, many)
    return made


def _by_axis(spaces: Spaces) -> dict[str, dict[int, list[tuple[str, Segment]]]]:
    found: dict[str, dict[int, list[tuple[str, Segment]]]] = {}
    for space in spaces:
        for s in space.segments:
            found.setdefault(s.parameter, {}).setdefault(s.axis, []).append((space.name, s))
    return found


def _select(x: Tensor, axis: int, source: np.ndarray) -> Tensor:
    """Entries of an axis by index, -1 for zeros."""
    index = torch.from_numpy(source).to(x.device)
    out = x.index_select(axis, index.clamp(min=0))
    out.movedim(axis, 0)[index < 0] = 0
    return out


def _filled(widest: fx.GraphModule, own: fx.GraphModule, values: Mapping[str, Tensor]) -> fx.GraphModule:
    """The widest model's program, as sizes may be written into it, with a padded model's tensors."""
    module = copy.deepcopy(widest)
    fill(module, "", Tensors(own, values))
    return module


@torch.no_grad()
def _same(first: fx.GraphModule, second: fx.GraphModule, args: tuple) -> bool:
    try:
        pairs = list(zip(tree_leaves(first(*args)), tree_leaves(second(*args)), strict=True))
    except (RuntimeError, ValueError, TypeError):  # whatever insists on its old size
        return False
    # no units of rounding: a few idle features that a norm counts may change less than bfloat16 rounds
    return all(close(b, a) for a, b in pairs if isinstance(a, Tensor))
