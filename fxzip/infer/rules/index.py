"""Picking entries: slices, gathers and scatters.

Known indices are applied to the labels themselves. Indices that depend on data keep the order of the
axis they index; the axes of the index tensor itself carry its labels to the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..labels import Group, LabelledType, inert
from .context import Context, OutSpec, Refuse, Value
from .registry import rule


def take(
    ctx: Context,
    labelled: LabelledType,
    axis: int,
    index: int | Sequence[int] | np.ndarray,
    shape: Sequence[int],
) -> LabelledType:
    """Entries `index` along `axis`, as numpy takes them: an int drops the axis, repeats become copies."""
    drop = isinstance(index, int)
    chosen = np.atleast_1d(np.asarray(index, np.int64))
    groups = []
    for group in labelled.groups:
        if axis in group.axes:
            group = _taken(ctx, group, axis, chosen)
        if group.axes:
            groups.append(group.renamed({a: a - (drop and a > axis) for a in group.axes}))
    return LabelledType(tuple(shape), tuple(groups))


def _taken(ctx: Context, group: Group, axis: int, chosen: np.ndarray) -> Group:
    """One group after indexing; what is left out tells the chosen apart, so they are marked."""
    p = group.axes.index(axis)
    labels = np.take(group.labels, chosen, axis=p)
    distinct, rank = _rank_among_repeats(chosen)
    if distinct < group.labels.shape[p]:
        key = ("take", group.labels.tobytes(), group.labels.shape, p, chosen.tobytes())
        if ctx.relations.once(key):
            ctx.relations.mark(labels, ctx.relations.types())
    if distinct < len(chosen):
        copies = ctx.relations.fresh(labels.shape)
        kinds = ctx.relations.types(int(rank.max()) + 1) + rank
        along = [len(chosen) if i == p else 1 for i in range(labels.ndim)]
        ctx.relations.one_to_one(copies, labels, np.broadcast_to(kinds.reshape(along), labels.shape))
        labels = copies
    if len(chosen) == 1:
        return Group(group.axes[:p] + group.axes[p + 1 :], labels.squeeze(p))
    return Group(group.axes, labels)


def _rank_among_repeats(chosen: np.ndarray) -> tuple[int, np.ndarray]:
    """How many entries differ; and which repeat of its entry each one is: 7 7 2 7 -> 0 1 0 2."""
    order = np.argsort(chosen, kind="stable")
    _, first, counts = np.unique(chosen[order], return_index=True, return_counts=True)
    rank = np.empty(len(chosen), np.int64)
    rank[order] = np.arange(len(chosen)) - np.repeat(first, counts)
    return len(counts), rank


@rule("slice", moves=True)
def slice_(
    ctx: Context, out: Sequence[OutSpec], self: Value, dim: int,
    start: int | None, end: int | None, step: int, **_
) -> LabelledType:  # fmt: skip
    axis = dim % self.dim
    return take(ctx, self.type, axis, range(self.shape[axis])[start:end:step], out[0].shape)


@rule("select", moves=True)
def select(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, index: int, **_) -> LabelledType:
    axis = dim % self.dim
    return take(ctx, self.type, axis, index % self.shape[axis], out[0].shape)


@rule("flip", moves=True)
def flip(ctx: Context, out: Sequence[OutSpec], self: Value, dims: Sequence[int], **_) -> LabelledType:
    labelled = self.type
    for dim in dims:
        size = self.shape[dim % self.dim]
        labelled = take(ctx, labelled, dim % self.dim, range(size)[::-1], out[0].shape)
    return labelled


@rule("roll", moves=True)
def roll(
    ctx: Context, out: Sequence[OutSpec], self: Value, shifts: Sequence[int], dims: Sequence[int], **_
) -> LabelledType:
    """Without dims the flattened tensor is rolled."""
    if not dims:
        flat = ctx.relations.reshape(self.type, (int(np.prod(self.shape)),))
        rolled = take(ctx, flat, 0, np.roll(np.arange(flat.shape[0]), shifts[0]), flat.shape)
        return ctx.relations.reshape(rolled, out[0].shape)
    labelled = self.type
    for shift, dim in zip(shifts, dims, strict=True):
        index = np.roll(np.arange(self.shape[dim % self.dim]), shift)
        labelled = take(ctx, labelled, dim % self.dim, index, out[0].shape)
    return labelled


@rule("index_select", moves=True)
def index_select(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, index: Value, **_) -> LabelledType:
    return index_one(ctx, self.type, dim % self.dim if self.dim else 0, index, out[0].shape)


@rule("index", "_unsafe_index", moves=True)
def index(ctx: Context, out: Sequence[OutSpec], self: Value, indices: Sequence[Value | None], **_) -> LabelledType:
    """x[:, i] with one index tensor, or several adjacent or separate ones, as numpy counts their axes."""
    given = {axis: i for axis, i in enumerate(indices) if i is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in given.values()):
        return _index_mask(ctx, self, given, out[0])
    if len(given) == 1:
        ((axis, only),) = given.items()
        return index_one(ctx, self.type, axis, only, out[0].shape)
    picked = np.broadcast_shapes(*(tuple(i.shape) for i in given.values()))
    axes = list(given)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    return _indexed(ctx, self.type, axes, list(given.values()), axes[0] if adjacent else 0, picked, out[0].shape)


def index_one(ctx: Context, labelled: LabelledType, axis: int, index: Value, shape: Sequence[int]) -> LabelledType:
    """One index tensor of any rank along `axis`; known values act on the labels."""
    if index.const is None or index.const.is_meta or labelled.group_of(axis) is None:
        return _indexed(ctx, labelled, [axis], [index], axis, index.shape, shape)
    chosen = index.const.reshape(-1).cpu().numpy().astype(np.int64) % labelled.shape[axis]
    flat = (*labelled.shape[:axis], len(chosen), *labelled.shape[axis + 1 :])
    return ctx.relations.reshape(take(ctx, labelled, axis, chosen, flat), shape)


def _indexed(
    ctx: Context, labelled: LabelledType, axes: Sequence[int], indices: Sequence[Value], at: int,
    picked: Sequence[int], shape: Sequence[int],
) -> LabelledType:  # fmt: skip
    """The indexed axes keep their order; the axes of the indices appear at `at` with the indices' labels."""
    rest = [a for a in range(len(labelled.shape)) if a not in axes]
    place = {a: i if i < at else i + len(picked) for i, a in enumerate(rest)}
    kept = ctx.inert_along(labelled, axes, shape, place)
    broadcast = ctx.pointwise([i.type for i in indices], picked)
    return LabelledType(
        tuple(shape), (*kept.groups, *(g.renamed(range(at, at + len(picked))) for g in broadcast.groups))
    )


def _index_mask(ctx: Context, self: Value, given: dict[int, Value], out: OutSpec) -> LabelledType:
    """x[mask]: the axes of the mask, and those it covers, become one inert axis."""
    if len(given) != 1:
        raise Refuse("indexing with a mask and other indices at once")
    ((axis, mask),) = given.items()
    ctx.pin(mask.type, range(mask.dim))
    covered = range(axis, axis + mask.dim)
    place = {a: a if a < axis else a - mask.dim + 1 for a in range(self.dim)}
    return ctx.inert_along(self.type, covered, out.shape, place)


@rule("embedding", moves=True)
def embedding(ctx: Context, out: Sequence[OutSpec], weight: Value, indices: Value, **_) -> LabelledType:
    """Rows of a table: the vocabulary keeps its order, the features are produced."""
    if weight.linear:
        for group in ctx.project(weight.type, [1]):
            ctx.role(group.labels, "produce")
    return _indexed(ctx, weight.type, [0], [indices], 0, indices.shape, out[0].shape)


@rule("gather", moves=True)
def gather(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, index: Value, **_) -> LabelledType:
    """out[i, j] = x[index[i, j], j]: the other axes are shared."""
    if self.dim == 0:
        return inert(out[0].shape)
    axis = dim % self.dim
    _same_but(axis, self, index)
    names = range(self.dim)
    picked = [n if n != axis else "picked" for n in names]
    return ctx.einsum([(self.type, picked), (index.type, names)], names, out[0].shape, pin={"picked"})


@rule("index_add", "index_copy", "index_reduce")
def index_write(
    ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, index: Value, source: Value, **_
) -> LabelledType:
    """Whole slices are written at `index`, which keeps the order of the axis."""
    axis = dim % self.dim
    _same_but(axis, self, source)
    ctx.pin(index.type, range(index.dim))
    return _written(ctx, axis, [self, source], out[0].shape)


@rule("index_fill")
def index_fill(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, index: Value, **_) -> LabelledType:
    ctx.pin(index.type, range(index.dim))
    return _written(ctx, dim % self.dim, [self], out[0].shape)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(
    ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, index: Value, src: Value | None = None, **_
) -> LabelledType:
    """out[index[i, j], j] = src[i, j]: the other axes are shared."""
    axis = dim % self.dim
    written = [index] if src is None else [index, src]
    for value in written:
        _same_but(axis, self, value)
    return _written(ctx, axis, [self, *written], out[0].shape)


def _written(ctx: Context, axis: int, values: Sequence[Value], shape: Sequence[int]) -> LabelledType:
    """Values that agree on all axes but `axis`, each of which keeps its order."""
    names = range(len(shape))
    operands = [(v.type, [n if n != axis else ("along", k) for n in names]) for k, v in enumerate(values)]
    return ctx.einsum(operands, names, shape, pin={("along", k) for k in range(len(values))})


def _same_but(axis: int, a: Value, b: Value) -> None:
    rest = [(d, e) for i, (d, e) in enumerate(zip(a.shape, b.shape, strict=False)) if i != axis]
    if a.dim != b.dim or any(d != e for d, e in rest):
        raise Refuse(f"an index of {b.shape} covers part of a tensor of {a.shape}")
