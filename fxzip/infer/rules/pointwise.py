"""Element-wise ops that PyTorch does not tag as such, copies, and constant fills."""

from __future__ import annotations

from collections.abc import Sequence

from ..labels import LabelledType, inert
from .context import Context, OutSpec, Refuse, Value
from .index import take
from .registry import Types, elementwise, rule, values_in
from .shape import expand


@rule("_prelu_kernel", "complex", "floor_divide", "hardswish", "log_sigmoid_forward", "masked_fill", "polar")
def untagged(ctx: Context, out: Sequence[OutSpec], **arguments) -> list[LabelledType]:
    """Pointwise, but without `torch.Tag.pointwise` on every overload."""
    return elementwise(ctx, "product", values_in(arguments.values()), out)


@rule("rsub")
def rsub(ctx: Context, out: Sequence[OutSpec], **arguments) -> list[LabelledType]:
    return elementwise(ctx, "rsub", values_in(arguments.values()), out)


@rule("_conj", "_to_copy", "neg", moves=True)
def same(ctx: Context, out: Sequence[OutSpec], self: Value, **_) -> LabelledType:
    return self.type


@rule("copy", moves=True)
def copy(ctx: Context, out: Sequence[OutSpec], self: Value, src: Value, **_) -> Types:
    """`self` lends only its shape."""
    return expand(ctx, out, src)


@rule("fill", "zero")
def fill(ctx: Context, out: Sequence[OutSpec], **_) -> LabelledType:
    """One value everywhere: a number, or a tensor of one element."""
    return ctx.constant(out[0].shape)


@rule("native_dropout")
def dropout(
    ctx: Context, out: Sequence[OutSpec], input: Value, p: float, train: bool | None, **_
) -> list[LabelledType]:
    if train or train is None:
        raise Refuse("dropout is active: features are dropped at random; put the model in eval mode")
    return [input.type, ctx.constant(out[1].shape)]


@rule("rrelu_with_noise_functional")
def rrelu(
    ctx: Context, out: Sequence[OutSpec], self: Value, noise: Value, training: bool, **_
) -> list[LabelledType]:
    if training:
        raise Refuse("rrelu is random in training mode; put the model in eval mode")
    return [self.type, noise.type]


@rule("glu")
def glu(ctx: Context, out: Sequence[OutSpec], self: Value, dim: int, **_) -> LabelledType:
    """One half of the axis times the sigmoid of the other."""
    axis = dim % self.dim
    half = self.shape[axis] // 2
    value, gate = (take(ctx, self.type, axis, range(i, i + half), out[0].shape) for i in (0, half))
    gated = ctx.pointwise([value, gate], out[0].shape)
    ctx.nonlinear(gated.groups, "glu")
    return gated


@rule("bincount", "bucketize", "histc", "isin", "nonzero", "searchsorted")
def counted(ctx: Context, out: Sequence[OutSpec], **arguments) -> list[LabelledType]:
    """Positions or counts: every operand keeps its order."""
    for value in values_in(arguments.values()):
        ctx.pin(value.type, range(value.dim), ranked=True)
    return [inert(o.shape) for o in out]
