"""Ops along the last axes that keep the order there: pooling, resampling, padding by content, patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..labels import LabelledType
from .context import Context, OutSpec, Value
from .registry import rule, values_in


def _spatial(rank: int) -> Callable[..., list[LabelledType]]:
    def resample(ctx: Context, out: Sequence[OutSpec], **arguments) -> list[LabelledType]:
        """Channels keep their labels; so do those of a second result, the positions of maxima."""
        (x,) = values_in(arguments.values())  # `self` or `input`
        return [ctx.inert_along(x.type, range(x.dim - rank, x.dim), o.shape) for o in out]

    return resample


rule(
    "_upsample_nearest_exact1d",
    "reflection_pad1d",
    "replication_pad1d",
    "upsample_linear1d",
    "upsample_nearest1d",
)(_spatial(1))
rule("_adaptive_avg_pool2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d",
     "adaptive_max_pool2d", "avg_pool2d", "max_pool2d_with_indices", "reflection_pad2d", "replication_pad2d",
     "upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d")(_spatial(2))  # fmt: skip
rule("_adaptive_avg_pool3d", "_upsample_nearest_exact3d", "adaptive_max_pool3d", "avg_pool3d",
     "max_pool3d_with_indices", "reflection_pad3d", "replication_pad3d", "upsample_nearest3d",
     "upsample_trilinear3d")(_spatial(3))  # fmt: skip


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(ctx: Context, out: Sequence[OutSpec], input: Value, grid: Value, **_) -> LabelledType:
    """n c p q, n P Q 2 -> n c P Q"""
    rank = input.dim - 2
    before, after = "pqr"[:rank], "PQR"[:rank]
    pinned = {*before, *after, "x"}
    return ctx.einsum([(input.type, f"nc{before}"), (grid.type, f"n{after}x")], f"nc{after}", out[0].shape, pin=pinned)


@rule("im2col", moves=True)
def im2col(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    """n c h w -> n (c k) l: every channel with the k positions of its kernel."""
    *lead, rows, columns = out[0].shape
    channels = self.shape[-3]
    axis = self.dim - 3
    flat = (*lead, channels, rows // channels, columns)
    labelled = ctx.inert_along(self.type, [axis + 1, axis + 2], flat)
    return ctx.relations.reshape(labelled, out[0].shape)


@rule("col2im")
def col2im(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    """n (c k) l -> n c h w"""
    *lead, rows, columns = self.shape
    channels = out[0].shape[-3]
    axis = len(lead)
    split = ctx.relations.reshape(self.type, (*lead, channels, rows // channels, columns))
    return ctx.inert_along(split, [axis + 1, axis + 2], out[0].shape)
