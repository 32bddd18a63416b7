"""Ops that only renumber, split, drop or duplicate axes."""

from __future__ import annotations

from collections.abc import Sequence

from ..labels import Group, LabelledType
from .context import Context, OutSpec, Value
from .index import take
from .registry import rule


@rule("reshape", "squeeze", "unsqueeze", moves=True)
def reshape(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    """Labels are reshaped as the data are."""
    return ctx.relations.reshape(self.type, out[0].shape)


@rule("permute", moves=True)
def permute(ctx: Context, out: Sequence[OutSpec], self: Value, dims: Sequence[int], **_) -> LabelledType:
    return self.type.mapped(out[0].shape, {d % self.dim: i for i, d in enumerate(dims)})


@rule("t", "transpose", moves=True)
def transpose(ctx: Context, out: Sequence[OutSpec], self: Value, dim0: int = 0, dim1: int = 1, **_) -> LabelledType:
    if self.dim < 2:
        return self.type
    a, b = dim0 % self.dim, dim1 % self.dim
    return self.type.mapped(out[0].shape, {**{i: i for i in range(self.dim)}, a: b, b: a})


@rule("expand", moves=True)
def expand(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    """A new or widened axis has one value along it: free labels."""
    shape = out[0].shape
    lead = len(shape) - self.dim
    groups = [g.renamed(range(lead, len(shape))) for g in self.type.groups]
    for axis, size in enumerate(shape):
        if size > 1 and (axis < lead or self.shape[axis - lead] == 1):
            groups.append(Group((axis,), ctx.relations.fresh([size])))
    return LabelledType(shape, tuple(groups))


@rule("repeat", moves=True)
def repeat(ctx: Context, out: Sequence[OutSpec], self: Value, repeats: Sequence[int], **_) -> LabelledType:
    """(d,) -> (r, d) -> (r d,), with the new axis free."""
    lead = len(repeats) - self.dim
    shape = []
    groups = [g.renamed([2 * (a + lead) + 1 for a in range(self.dim)]) for g in self.type.groups]
    for axis, count in enumerate(repeats):
        shape += [count, 1 if axis < lead else self.shape[axis - lead]]
        if count > 1:
            groups.append(Group((2 * axis,), ctx.relations.fresh([count])))
    return ctx.relations.reshape(LabelledType(tuple(shape), tuple(groups)), out[0].shape)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", moves=True)
def split(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, **_) -> list[LabelledType]:
    axis = dim % self.dim
    parts, start = [], 0
    for piece in out:
        stop = start + piece.shape[axis]
        parts.append(take(ctx, self.type, axis, range(start, stop), piece.shape))
        start = stop
    return parts


@rule("unbind", moves=True)
def unbind(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, **_) -> list[LabelledType]:
    return [take(ctx, self.type, dim % self.dim, i, piece.shape) for i, piece in enumerate(out)]


@rule("view_as_real", moves=True)
def view_as_real(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    """Real and imaginary part lie along a new inert axis."""
    return LabelledType(out[0].shape, self.type.groups)


@rule("view_as_complex", moves=True)
def view_as_complex(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    return ctx.inert_along(self.type, [self.dim - 1], out[0].shape)


@rule("pixel_shuffle", moves=True)
def pixel_shuffle(ctx: Context, out: Sequence[OutSpec], self: Value, upscale_factor: int, **_) -> LabelledType:
    """(c r q) h w -> c (h r) (w q)"""
    *lead, c, h, w = self.shape
    r, n = upscale_factor, len(self.shape) - 3
    split = ctx.relations.reshape(self.type, (*lead, c // r**2, r, r, h, w))
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    return _reordered(ctx, split, order, out[0].shape)


@rule("pixel_unshuffle", moves=True)
def pixel_unshuffle(ctx: Context, out: Sequence[OutSpec], self: Value, downscale_factor: int, **_) -> LabelledType:
    """c (h r) (w q) -> (c r q) h w"""
    *lead, c, h, w = self.shape
    r, n = downscale_factor, len(self.shape) - 3
    split = ctx.relations.reshape(self.type, (*lead, c, h // r, r, w // r, r))
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return _reordered(ctx, split, order, out[0].shape)


@rule("channel_shuffle", moves=True)
def channel_shuffle(ctx: Context, out: Sequence[OutSpec], self: Value, groups: int, **_) -> LabelledType:
    """n (g c) ... -> n (c g) ..."""
    n, c, *rest = self.shape
    split = ctx.relations.reshape(self.type, (n, groups, c // groups, *rest))
    return _reordered(ctx, split, [0, 2, 1, *range(3, len(rest) + 3)], out[0].shape)


def _reordered(ctx: Context, split: LabelledType, order: Sequence[int], shape: tuple[int, ...]) -> LabelledType:
    """Permute the split axes, then join them into `shape`."""
    permuted = split.mapped([split.shape[a] for a in order], {a: i for i, a in enumerate(order)})
    return ctx.relations.reshape(permuted, shape)
