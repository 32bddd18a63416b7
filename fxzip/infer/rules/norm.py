"""Normalisation: affine per channel, or symmetric mixing along some axes."""

from __future__ import annotations

from collections.abc import Sequence

from ..labels import LabelledType, inert
from .context import Context, OutSpec, Value
from .registry import rule


@rule("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_batch_norm")
def batch_norm(
    ctx: Context, out: Sequence[OutSpec], input: Value,
    weight: Value | None, bias: Value | None,
    running_mean: Value | None = None, running_var: Value | None = None, training: bool = False, **_
) -> list[LabelledType]:  # fmt: skip
    """With running statistics pointwise; with batch statistics every channel mixes its own samples."""
    names = range(input.dim)
    channel = [v for v in (weight, bias, running_mean, running_var) if v is not None]
    if training:
        ctx.mixed(input.type, [a for a in names if a != 1], "batch_norm")
    operands = [(input.type, names), *((v.type, [1]) for v in channel)]
    result = ctx.einsum(operands, names, out[0].shape)
    statistic = tuple(g.renamed({1: 0}) for g in ctx.project(result, [1]))
    return [
        result,
        *(LabelledType(o.shape, statistic) if o.shape == input.shape[1:2] else inert(o.shape) for o in out[1:]),
    ]


@rule("native_layer_norm")
def layer_norm(
    ctx: Context, out: Sequence[OutSpec], input: Value, normalized_shape: Sequence[int],
    weight: Value | None, bias: Value | None, **_
) -> list[LabelledType]:  # fmt: skip
    """Mixes along the last axes; mean and scale keep the others."""
    names = range(input.dim)
    last = range(input.dim - len(normalized_shape), input.dim)
    ctx.mixed(input.type, last, "layer_norm")
    affine = [(v.type, last) for v in (weight, bias) if v is not None]
    result = ctx.einsum([(input.type, names), *affine], names, out[0].shape)
    batch = ctx.project(result, range(last.start))
    return [result, *(LabelledType(o.shape, batch) for o in out[1:])]


@rule("native_group_norm")
def group_norm(
    ctx: Context,
    out: Sequence[OutSpec],
    input: Value,
    weight: Value | None,
    bias: Value | None,
    group: int,
    **_,
) -> list[LabelledType]:
    """n (g c) ...: mixes along c and what follows, per group."""
    n, channels, *rest = input.shape
    split = ctx.relations.reshape(input.type, (n, group, channels // group, *rest))
    ctx.mixed(split, range(2, len(split.shape)), "group_norm")
    names = range(input.dim)
    affine = [(v.type, [1]) for v in (weight, bias) if v is not None]
    result = ctx.einsum([(ctx.relations.reshape(split, input.shape), names), *affine], names, out[0].shape)
    batch = ctx.project(split, range(2))
    return [result, *(LabelledType(o.shape, batch) for o in out[1:])]


@rule("_log_softmax", "_safe_softmax", "_softmax")
def softmax(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, **_) -> LabelledType:
    if self.dim:
        ctx.mixed(self.type, [dim % self.dim], "softmax")
    return self.type


@rule("_weight_norm_interface")
def weight_norm(ctx: Context, out: Sequence[OutSpec], v: Value, g: Value, dim: int, **_) -> list[LabelledType]:
    """g v / |v|, the norm along all axes but `dim`."""
    names = range(v.dim)
    ctx.mixed(v.type, [a for a in names if a != dim], "weight_norm")
    result = ctx.einsum([(v.type, names), (g.type, names)], names, out[0].shape)
    norms = ctx.project(result, [dim])
    return [result, *(LabelledType(o.shape, norms) for o in out[1:])]
