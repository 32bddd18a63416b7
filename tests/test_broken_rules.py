"""Rules broken on purpose: if that went unnoticed, the proof would prove nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_soundness import BY_NAME, proof
from torch import Tensor, nn
from toys import Residual, randomise

import fxzip
from fxzip.infer.labels import Group, LabelledType
from fxzip.infer.rules.registry import _RULES, Rule


def _conv_without_groups(ctx, out, input, weight, bias, **_):
    w = ctx.project(weight.type, [0])
    for group in w:
        ctx.role(group.labels, "produce")
    return LabelledType(out[0].shape, tuple(g.renamed({0: 1}) for g in w))


def _cat_without_order(ctx, out, tensors, dim=0, **_):
    from fxzip.infer.rules.join import concatenate

    return concatenate(ctx, [t.type for t in reversed(tensors)], dim % len(out[0].shape), out[0].shape)


def _unmixed(ctx, out, self, **_):
    return self.type


def _first_operand(ctx, out, self, other, **_):
    return self.type


def _linear_with_swapped_roles(ctx, out, input, weight, bias=None, **_):
    for group in weight.type.groups:
        ctx.role(group.labels, "produce" if 1 in group.axes else "consume")
    lead = "abc"[: input.dim - 1]
    product = ctx.einsum([(input.type, f"{lead}y"), (weight.type, "zy")], f"{lead}z", out[0].shape)
    return product if bias is None else ctx.pointwise([product, bias.type], out[0].shape)


def _linear_that_only_consumes(ctx, out, input, weight, bias=None, **_):
    for group in weight.type.groups:
        ctx.role(group.labels, "consume")
    product = ctx.einsum([(input.type, "abcy"[-input.dim :]), (weight.type, "zy")], "abcz"[-input.dim :], out[0].shape)
    return product if bias is None else ctx.pointwise([product, bias.type], out[0].shape)


def _transposed_mm(ctx, out, self, mat2, **_):
    return ctx.contract("ik,jk->ij", [self, mat2], out[0].shape)


def _batch_norm_without_statistics(ctx, out, input, weight=None, bias=None, **_):
    names = range(input.dim)
    affine = [(v.type, [1]) for v in (weight, bias) if v is not None]
    result = ctx.einsum([(input.type, names), *affine], names, out[0].shape)
    return [result, *(LabelledType(o.shape) for o in out[1:])]


def _group_norm_without_groups(ctx, out, input, **_):
    return [input.type, *(LabelledType(o.shape) for o in out[1:])]


def _attention_without_heads(ctx, out, self, **_):
    """A reshape that forgets which axis was split: fresh labels for every axis."""
    shape = out[0].shape
    groups = tuple(Group((a,), ctx.relations.fresh([d])) for a, d in enumerate(shape) if d > 1 and a)
    return LabelledType(shape, groups)


def _reduction_without_labels(ctx, out, self, **_):
    return [LabelledType(o.shape) for o in out]


BROKEN = [
    ("convolution", _conv_without_groups, "image: convolution grouped"),
    ("convolution", _conv_without_groups, "inverted bottleneck"),
    ("cat", _cat_without_order, "features: cat constant"),
    ("cat", _cat_without_order, "u-net"),
    ("_softmax", _unmixed, "features: reshape"),
    ("flip", _unmixed, "features: flip"),
    ("cumsum", _unmixed, "tokens: cumsum features"),
    ("add", _first_operand, "residual with a zero-padded shortcut"),
    ("mul", _first_operand, "inverted bottleneck"),
    ("native_group_norm", _group_norm_without_groups, "image: native_group_norm"),
    ("native_batch_norm", _batch_norm_without_statistics, "residual with a zero-padded shortcut"),
    ("reshape", _attention_without_heads, "vision transformer"),
    ("min", _reduction_without_labels, "tokens: min"),
    ("linear", _linear_with_swapped_roles, "reused module"),
    ("linear", _linear_that_only_consumes, "tokens: native_layer_norm"),
]


@pytest.mark.parametrize("op, wrong, name", BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_rule_is_noticed(monkeypatch, op, wrong, name):
    monkeypatch.setitem(_RULES, op, Rule(wrong, True))
    found = proof(BY_NAME[name])
    assert not found.ok, f"unnoticed: {found}"
    with pytest.raises(fxzip.VerificationError, match="Nothing was merged"):
        found.check()


class Product(nn.Module):
    """A square matrix product, where exchanging its two axes fits all shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.w, self.after = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(torch.mm(F.relu(self.before(x)), self.w)))


def test_a_transposed_product_is_noticed(monkeypatch):
    model, x = randomise(Product()).eval(), torch.randn(2, 6)
    assert fxzip.verify(model, x).ok
    monkeypatch.setitem(_RULES, "mm", Rule(_transposed_mm, False))
    assert not fxzip.verify(model, x).ok
    assert not torch.allclose(fxzip.scramble(model, x)(x), model(x), atol=1e-3)


def test_a_wrong_role_breaks_recovery(monkeypatch):
    """Swapped roles survive permutations: only zipping, which applies M and U, goes wrong."""
    model, x = randomise(Residual()).eval(), torch.randn(32, 3, 6, 6)
    twin = fxzip.scramble(model, x)
    monkeypatch.setitem(_RULES, "linear", Rule(_linear_with_swapped_roles, False))
    with pytest.raises(fxzip.VerificationError):
        fxzip.merge([model, twin], [x], progress=False)


def test_a_wrong_rule_is_noticed_behind_silent_units(monkeypatch):
    """The model's own units say nothing: random ones do."""

    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.past = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.past(x) + self.last(F.relu(self.first(x)).flip(-1) * self.scale)

    model, x = randomise(Flipped()).eval(), torch.randn(4, 6)
    with torch.no_grad():
        model.first.bias.fill_(-1000.0)
        model.first.weight.mul_(1e-3)
    assert fxzip.verify(model, x).ok
    monkeypatch.setitem(_RULES, "flip", Rule(_unmixed, True))
    found = fxzip.verify(model, x)
    assert not found.ok and found.redrawn and found.error > 1e-3
