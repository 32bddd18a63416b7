"""Convolution: any rank, transposed, grouped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..labels import Group, LabelledType
from .context import Context, OutSpec, Refuse, Value
from .registry import rule

_SPATIAL, _MOVED, _KERNEL = "pqr", "PQR", "uvw"


@rule("convolution", groups="groups")
def convolution(
    ctx: Context, out: Sequence[OutSpec], input: Value, weight: Value, bias: Value | None,
    stride: Sequence[int], padding: Sequence[int], transposed: bool, groups: int, **_
) -> LabelledType:  # fmt: skip
    """n (g c) p q, (g o) c u v -> n (g o) P Q. Spatial axes keep their order, unless the kernel does not
    reach along them. Depthwise is c = 1. A transposed weight is (g c) o u v. `weight.inner`: the second axis of the
    weight has features of its own in every group."""
    rank = input.dim - 2
    if rank > len(_SPATIAL) or weight.dim != input.dim:
        raise Refuse(f"convolution of {input.shape} with a weight of {weight.shape}")
    steps = zip(weight.shape[2:], _per_axis(stride, rank), _per_axis(padding, rank), strict=True)
    still = [k == s == 1 and p == 0 for k, s, p in steps]
    before = _SPATIAL[:rank]
    after = "".join(_SPATIAL[i] if still[i] else _MOVED[i] for i in range(rank))
    pinned = {n for i in range(rank) if not still[i] for n in (_SPATIAL[i], _KERNEL[i])}
    x = _grouped(ctx, input, 1, groups)
    w = _grouped(ctx, weight, 0, groups)
    if weight.inner is not None:
        w = replace(w, type=LabelledType(w.shape, (*w.type.groups, Group((0, 2), weight.inner))))
    layout = "gco" if transposed else "goc"
    shape = out[0].shape
    split = (shape[0], groups, shape[1] // groups, *shape[2:])
    equation = f"ngc{before},{layout}{_KERNEL[:rank]}->ngo{after}"
    result = ctx.relations.reshape(ctx.contract(equation, [x, w], split, pin=pinned), shape)
    if bias is None:
        return result
    names = range(len(shape))
    return ctx.einsum([(result, names), (bias.type, [1])], names, shape)


def _grouped(ctx: Context, value: Value, axis: int, groups: int) -> Value:
    """Axis `axis` split into (groups, rest)."""
    shape = (*value.shape[:axis], groups, value.shape[axis] // groups, *value.shape[axis + 1 :])
    return replace(value, type=ctx.relations.reshape(value.type, shape))


def _per_axis(option: Sequence[int], rank: int) -> list[int]:
    return list(option) * rank if len(option) == 1 else list(option)
