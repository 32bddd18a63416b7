"""Reductions along axes, running and sorted reductions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..labels import LabelledType
from .context import Context, OutSpec, Refuse, Value
from .registry import elementwise, rule


@rule("all", "amax", "amin", "aminmax", "any", "count_nonzero", "linalg_vector_norm", "logsumexp", "max",
      "mean", "median", "min", "nanmedian", "nansum", "norm", "prod", "std", "std_mean", "sum", "var",
      "var_mean")  # fmt: skip
def reduction(
    ctx: Context, out: Sequence[OutSpec], self: Value, dim: int | Sequence[int] | None = None,
    other: Value | None = None, **_
) -> list[LabelledType]:  # fmt: skip
    """The marginal on the kept axes. A result that is a position keeps the order of the axis it indexes."""
    if other is not None:
        return elementwise(ctx, "maximum", [self, other], out)
    reduced = _axes(dim, self.dim)
    kept = [a for a in range(self.dim) if a not in reduced]
    if len(out) == 2 and isinstance(dim, int) and out[1].dtype == torch.int64:  # max, min, median along an axis
        ctx.pin(self.type, reduced, ranked=True)
    ctx.nonlinear([g for g in self.type.groups if any(a in reduced for a in g.axes)], "reduction")
    place = {a: a if len(out[0].shape) == self.dim else i for i, a in enumerate(kept)}
    groups = tuple(g.renamed(place) for g in ctx.project(self.type, kept))
    return [LabelledType(o.shape, groups) for o in out]


def _axes(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    if dim is None or rank == 0 or (not isinstance(dim, int) and not len(dim)):
        return list(range(rank))
    return sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim)})


@rule("argmax", "argmin")
def argmax(
    ctx: Context, out: Sequence[OutSpec], self: Value, dim: int | None, **_
) -> LabelledType:
    """A position: the axis (all of them without dim) keeps its order."""
    axes = _axes(dim, self.dim)
    return _ordered(ctx, self, axes, out[0])


@rule("cummax", "cummin", "cumprod", "cumsum", "kthvalue", "logcumsumexp", "mode", "sort", "topk")
def ordered(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, **_) -> list[LabelledType]:
    """The axis keeps its order, the others their labels."""
    axes = [dim % self.dim] if self.dim else []
    return [_ordered(ctx, self, axes, o) for o in out]


def _ordered(ctx: Context, self: Value, axes: Sequence[int], out: OutSpec) -> LabelledType:
    kept = [a for a in range(self.dim) if a not in axes]
    same_rank = len(out.shape) == self.dim
    place = {a: a if same_rank else i for i, a in enumerate(kept)}
    return ctx.inert_along(self.type, axes, out.shape, place, ranked=True)


@rule("unfold", moves=True)
def unfold(ctx: Context, out: Sequence[OutSpec], self: Value, dimension: int, **_) -> LabelledType:
    """Windows along an axis that keeps its order; positions within a window are a new last axis."""
    if not self.dim:
        raise Refuse("unfold of a scalar")
    return ctx.inert_along(self.type, [dimension % self.dim], out[0].shape)


@rule("tril", "triu", moves=True)
def triangle(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    """Rows and columns keep their order."""
    return ctx.inert_along(self.type, [self.dim - 2, self.dim - 1], out[0].shape)
