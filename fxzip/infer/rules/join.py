"""Putting tensors side by side: the result's label array is composed of those of the parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from ..labels import Group, LabelledType, Name, inert
from .context import Context, OutSpec, Value
from .index import take
from .registry import rule


@rule("cat", moves=True)
def cat(ctx: Context, out: Sequence[OutSpec], tensors: Sequence[Value], dim: int, **_) -> LabelledType:
    """Empty tensors of one dimension are skipped, as PyTorch does."""
    types = [t.type for t in tensors if t.shape != (0,)]
    if not types:
        return inert(out[0].shape)
    return concatenate(ctx, types, dim % len(out[0].shape), out[0].shape)


def concatenate(ctx: Context, types: Sequence[LabelledType], axis: int, shape: Sequence[int]) -> LabelledType:
    """Label arrays joined along `axis`; along all other axes the parts are related."""
    if len(types) == 1:
        return types[0]
    joint = _joint_axes(types, axis)
    rest = [a for a in range(len(shape)) if a not in joint and a != axis]
    labelled = ctx.einsum(
        [(LabelledType(t.shape, ctx.project(t, rest)), _only(rest, t)) for t in types],
        range(len(shape)),
        shape,
    )
    if not joint:
        return labelled
    parts = _distinct(ctx, [_part(ctx, t, joint, axis) for t in types])
    others = [a for a in joint if a != axis]
    if others:
        batches = [ctx.relations.marginal(Group(joint, part), others) for part in parts]
        for batch in batches[1:]:
            ctx.relations.relate(batches[0], batch)
    whole = Group(joint, np.concatenate(parts, axis=joint.index(axis)))
    return LabelledType(tuple(shape), (*labelled.groups, whole))


def _only(axes: Sequence[int], labelled: LabelledType) -> list[int | None]:
    return [a if a in axes else None for a in range(len(labelled.shape))]


def _joint_axes(types: Sequence[LabelledType], axis: int) -> tuple[int, ...]:
    """The axes labelled jointly with `axis` in every part that labels it; `axis` alone if they differ."""
    found = {tuple(sorted(g.axes)) for g in (t.group_of(axis) for t in types) if g is not None}
    if len(found) < 2:
        return next(iter(found), ())
    return (axis,)


def _part(ctx: Context, labelled: LabelledType, joint: tuple[int, ...], axis: int) -> np.ndarray:
    """The labels of one part over the axes `joint`."""
    group = labelled.group_of(axis)
    if group is not None:
        return ctx.relations.marginal(group, joint).aligned(joint)
    sizes: dict[Name, int] = {a: labelled.shape[a] for a in joint}
    batch = ctx.project(labelled, joint)
    if batch:  # inert along `axis`: labels of the batch axes, tagged with the position
        return ctx.relations.join(joint, sizes, batch).labels
    labels = ctx.relations.fresh([sizes[a] for a in joint])
    ctx.pin(LabelledType(tuple(sizes.values()), (Group(tuple(range(len(joint))), labels),)), range(len(joint)))
    return labels


def _distinct(ctx: Context, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A label that occurs twice, as in cat([x, x]), is replaced by one copy per part."""
    every = np.concatenate([p.ravel() for p in parts])
    if len(np.unique(every)) == len(every):
        return list(parts)
    copies = [ctx.relations.fresh(p.shape) for p in parts]
    for copy, part in zip(copies, parts, strict=True):
        ctx.relations.one_to_one(copy, part, ctx.relations.types())
    return copies


@rule("stack", moves=True)
def stack(ctx: Context, out: Sequence[OutSpec], tensors: Sequence[Value], dim: int, **_) -> LabelledType:
    """Along the new axis the parts keep their order. One group that all parts share stays apart in each
    (stack([-x2, x1], -1) of a rotary embedding); the labels of other groups are related."""
    shape = out[0].shape
    axis = dim % len(shape)
    place = [a for a in range(len(shape)) if a != axis]
    types = [t.type for t in tensors]
    shared = set.intersection(*({tuple(sorted(g.axes)) for g in t.groups} for t in types))
    apart = next(iter(shared)) if len(shared) == 1 else ()
    rest = [[g for g in t.groups if tuple(sorted(g.axes)) != apart] for t in types]
    names = [[None if a in apart else place[a] for a in range(t.dim)] for t in tensors]
    related = ctx.einsum(
        [(LabelledType(t.shape, tuple(g)), n) for t, g, n in zip(types, rest, names, strict=True)],
        range(len(shape)),
        shape,
    )
    if not apart:
        return related
    groups = [next(g for g in t.groups if tuple(sorted(g.axes)) == apart) for t in types]
    parts = _distinct(ctx, [g.aligned(apart) for g in groups])
    whole = LabelledType(shape, (Group((axis, *(place[a] for a in apart)), np.stack(parts)),))
    if len(types) > 1:
        ctx.pin(whole, [axis])
    else:
        whole = LabelledType(shape, (Group(tuple(place[a] for a in apart), parts[0]),))
    return LabelledType(shape, (*related.groups, *whole.groups))


@rule("constant_pad_nd", moves=True)
def pad(ctx: Context, out: Sequence[OutSpec], self: Value, pad: Sequence[int], **_) -> LabelledType:
    """Padding is free along a labelled axis (a zero-padded shortcut); an inert axis stays inert."""
    labelled = self.type
    shape = list(self.shape)
    for k in range(len(pad) // 2):
        axis, low, high = self.dim - 1 - k, pad[2 * k], pad[2 * k + 1]
        start, stop = max(0, -low), shape[axis] - max(0, -high)
        shape[axis] = stop - start
        labelled = take(ctx, labelled, axis, range(start, stop), shape)
        low, high = max(0, low), max(0, high)
        shape[axis] += low + high
        if low or high:
            labelled = _padded(ctx, labelled, axis, low, high, tuple(shape))
    return labelled


def _padded(
    ctx: Context, labelled: LabelledType, axis: int, low: int, high: int, shape: tuple[int, ...]
) -> LabelledType:
    """Both sides hold the same value, so their labels have one home."""
    groups = []
    for group in labelled.groups:
        if axis not in group.axes:
            groups.append(group)
            continue
        p = group.axes.index(axis)
        free = ctx.relations.fresh([*group.labels.shape[:p], low + high, *group.labels.shape[p + 1 :]])
        before, after = np.split(free, [low], axis=p)
        groups.append(Group(group.axes, np.concatenate([before, group.labels, after], axis=p)))
    return LabelledType(shape, tuple(groups))


@rule("slice_scatter", moves=True)
def slice_scatter(
    ctx: Context, out: Sequence[OutSpec], self: Value, src: Value, dim: int, start: int | None,
    end: int | None, step: int, **_
) -> LabelledType:  # fmt: skip
    """`self` with a slice replaced: what stays and what is written, in the order of the axis."""
    axis = dim % self.dim
    return _replaced(ctx, self.type, src.type, axis, range(self.shape[axis])[start:end:step])


@rule("select_scatter", moves=True)
def select_scatter(
    ctx: Context, out: Sequence[OutSpec], self: Value, src: Value, dim: int, index: int, **_
) -> LabelledType:
    axis = dim % self.dim
    place = {a: a + (a >= axis) for a in range(src.dim)}
    written = src.type.mapped([*src.shape[:axis], 1, *src.shape[axis:]], place)
    position = index % self.shape[axis]
    return _replaced(ctx, self.type, written, axis, range(position, position + 1))


def _replaced(ctx: Context, labelled: LabelledType, written: LabelledType, axis: int, positions: range) -> LabelledType:
    shape = labelled.shape
    stay = [i for i in range(shape[axis]) if i not in positions]
    if not stay:
        return written
    kept = take(ctx, labelled, axis, stay, [*shape[:axis], len(stay), *shape[axis + 1 :]])
    joined = concatenate(ctx, [kept, written], axis, shape)
    order = np.argsort(list(chain(stay, positions)))
    return take(ctx, joined, axis, order, shape)
