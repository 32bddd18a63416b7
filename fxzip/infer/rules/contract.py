"""Contractions: matrix products and attention, each one equation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_letters

from ..labels import Group, LabelledType
from .context import Context, OutSpec, Refuse, Value
from .registry import rule


@rule("mm")
def mm(ctx: Context, out: Sequence[OutSpec], self: Value, mat2: Value, **_) -> LabelledType:
    return ctx.contract("ik,kj->ij", [self, mat2], out[0].shape)


@rule("bmm")
def bmm(ctx: Context, out: Sequence[OutSpec], self: Value, mat2: Value, **_) -> LabelledType:
    return ctx.contract("bik,bkj->bij", [self, mat2], out[0].shape)


@rule("mv")
def mv(ctx: Context, out: Sequence[OutSpec], self: Value, vec: Value, **_) -> LabelledType:
    return ctx.contract("ik,k->i", [self, vec], out[0].shape)


@rule("dot", "vdot")
def dot(
    ctx: Context,
    out: Sequence[OutSpec],
    self: Value,
    tensor: Value | None = None,
    other: Value | None = None,
    **_,
) -> LabelledType:
    return ctx.contract("k,k->", [self, tensor or other], out[0].shape)  # type: ignore[list-item]


@rule("addmm", "_addmm_activation")
def addmm(ctx: Context, out: Sequence[OutSpec], self: Value, mat1: Value, mat2: Value, **_) -> LabelledType:
    product = ctx.contract("ik,kj->ij", [mat1, mat2], out[0].shape)
    return ctx.pointwise([product, self.type], out[0].shape)


@rule("baddbmm")
def baddbmm(ctx: Context, out: Sequence[OutSpec], self: Value, batch1: Value, batch2: Value, **_) -> LabelledType:
    product = ctx.contract("bik,bkj->bij", [batch1, batch2], out[0].shape)
    return ctx.pointwise([product, self.type], out[0].shape)


@rule("addbmm")
def addbmm(ctx: Context, out: Sequence[OutSpec], self: Value, batch1: Value, batch2: Value, **_) -> LabelledType:
    product = ctx.contract("bik,bkj->ij", [batch1, batch2], out[0].shape)
    return ctx.pointwise([product, self.type], out[0].shape)


@rule("addmv")
def addmv(ctx: Context, out: Sequence[OutSpec], self: Value, mat: Value, vec: Value, **_) -> LabelledType:
    product = ctx.contract("ik,k->i", [mat, vec], out[0].shape)
    return ctx.pointwise([product, self.type], out[0].shape)


@rule("addr")
def addr(ctx: Context, out: Sequence[OutSpec], self: Value, vec1: Value, vec2: Value, **_) -> LabelledType:
    product = ctx.contract("i,j->ij", [vec1, vec2], out[0].shape)
    return ctx.pointwise([product, self.type], out[0].shape)


@rule("linear")
def linear(
    ctx: Context, out: Sequence[OutSpec], input: Value, weight: Value, bias: Value | None, **_
) -> LabelledType:
    """... k, o k -> ... o"""
    lead = ascii_letters[: input.dim - 1]
    if weight.dim == 1:
        return ctx.contract(f"{lead}y,y->{lead}", [input, weight], out[0].shape)
    product = ctx.contract(f"{lead}y,zy->{lead}z", [input, weight], out[0].shape)
    return product if bias is None else ctx.pointwise([product, bias.type], out[0].shape)


@rule("_trilinear")
def trilinear(
    ctx: Context, out: Sequence[OutSpec], i1: Value, i2: Value, i3: Value, expand1: Sequence[int],
    expand2: Sequence[int], expand3: Sequence[int], sumdim: Sequence[int], **_
) -> LabelledType:  # fmt: skip
    """Three tensors over common axes; `expandN` lists the axes that operand N lacks. Bilinear layers."""
    names = ascii_letters[: i1.dim + len(expand1)]
    lacking = (expand1, expand2, expand3)
    inputs = ["".join(n for a, n in enumerate(names) if a not in lacks) for lacks in lacking]
    result = "".join(n for a, n in enumerate(names) if a not in sumdim)
    equation = f"{inputs[0]},{inputs[2]},{inputs[1]}->{result}"  # the weight last
    return ctx.contract(equation, [i1, i3, i2], out[0].shape)


@rule("_cdist_forward", "_euclidean_dist")
def cdist(ctx: Context, out: Sequence[OutSpec], x1: Value, x2: Value, **_) -> LabelledType:
    """Distances between rows: sums over features of a non-linear function of both."""
    lead = "abcdefgh"[: len(out[0].shape) - 2]
    for value in (x1, x2):
        ctx.mixed(value.type, [value.dim - 1], "cdist")
    operands = [(v.type, f"{lead}{row}k"[-v.dim :]) for v, row in ((x1, "x"), (x2, "y"))]
    return ctx.einsum(operands, f"{lead}xy", out[0].shape)


@rule(
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(
    ctx: Context, out: Sequence[OutSpec], query: Value, key: Value, value: Value, dropout_p: float, is_causal: bool,
    attn_mask: Value | None = None, attn_bias: Value | None = None, **_
) -> list[LabelledType]:  # fmt: skip
    """softmax(b h l e, b h s e -> b h l s), b h s v -> b h l v. Causal: tokens keep their order."""
    if dropout_p:
        raise Refuse("attention drops weights at random; put the model in eval mode")
    key, value = (_shared_heads(ctx, t, query.shape[1] // key.shape[1]) for t in (key, value))
    shape = (*query.shape[:-1], key.shape[-2])
    scores = ctx.contract("bhle,bhse->bhls", [query, key], shape, pin={"l", "s"} if is_causal else ())
    mask = attn_mask or attn_bias
    if mask is not None:
        scores = ctx.pointwise([scores, mask.type], shape)
    ctx.mixed(scores, [3], "softmax")
    weights = Value(scores, query.dtype)
    result = ctx.contract("bhls,bhsv->bhlv", [weights, value], out[0].shape)
    normaliser = ctx.project(scores, range(3))  # the log-sum-exp of the scores; the rest is random state
    return [result, *(LabelledType(o.shape, normaliser if o.shape == shape[:3] else ()) for o in out[1:])]


def _shared_heads(ctx: Context, value: Value, copies: int) -> Value:
    """b g s d -> b (g copies) s d: grouped queries share a key and value head."""
    b, g, s, d = value.shape
    split = ctx.relations.reshape(value.type, (b, g, 1, s, d))
    widened = LabelledType((b, g, copies, s, d), (*split.groups, Group((2,), ctx.relations.fresh([copies]))))
    return replace(value, type=ctx.relations.reshape(widened, (b, g * copies, s, d)))
