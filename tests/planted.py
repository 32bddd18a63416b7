"""Rules that claim too much, each wrong in a way that somebody might write it: the proof has to catch them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fxzip.infer.labels import Group, LabelledType, inert
from fxzip.infer.rules.join import concatenate
from fxzip.infer.rules.registry import _RULES, Rule


def _split_is_free(ctx, out, self, dim=0, **_):
    """The parts have nothing to do with the whole."""
    axis = dim % self.dim
    return [LabelledType(o.shape, (Group((axis,), ctx.relations.fresh([o.shape[axis]])),)) for o in out]


def _cat_backwards(ctx, out, tensors, dim=0, **_):
    return concatenate(ctx, [t.type for t in reversed(tensors)], dim % len(out[0].shape), out[0].shape)


def _layer_norm_is_elementwise(ctx, out, input, weight=None, bias=None, **_):
    affine = [v.type for v in (weight, bias) if v is not None]
    return [ctx.pointwise([input.type, *affine], out[0].shape), *(inert(o.shape) for o in out[1:])]


def _group_norm_without_groups(ctx, out, input, **_):
    return [input.type, *(inert(o.shape) for o in out[1:])]


def _convolution_without_groups(ctx, out, input, weight, bias, **_):
    w = ctx.project(weight.type, [0])
    for group in w:
        ctx.role(group.labels, "produce")
    return LabelledType(out[0].shape, tuple(g.renamed({0: 1}) for g in w))


def _unmoved(ctx, out, self, **_):
    return self.type


def _first_operand(ctx, out, self, other, **_):
    return self.type


def _padding_at_the_end(ctx, out, self, **_):
    """Zeros come last, wherever they were put."""
    if tuple(self.shape) == tuple(out[0].shape):
        return self.type
    axis = next(a for a in range(self.dim) if self.shape[a] != out[0].shape[a])
    rest = list(out[0].shape)
    rest[axis] -= self.shape[axis]
    return concatenate(ctx, [self.type, inert(tuple(rest))], axis, out[0].shape)




PLANTED: list[tuple[str, tuple[str, ...], Callable]] = [
    ("a split is free", ("split", "split_with_sizes"), _split_is_free),
    ("cat is backwards", ("cat",), _cat_backwards),
    ("layer norm is element-wise", ("native_layer_norm",), _layer_norm_is_elementwise),
    ("group norm has no groups", ("native_group_norm",), _group_norm_without_groups),
    ("convolutions have no groups", ("convolution",), _convolution_without_groups),
    ("cumsum keeps the order", ("cumsum",), _unmoved),
    ("flip and roll keep the order", ("flip", "roll"), _unmoved),
    ("sums have one operand", ("add",), _first_operand),
    ("products have one operand", ("mul",), _first_operand),
    ("padding is at the end", ("constant_pad_nd", "pad"), _padding_at_the_end),
]


@contextmanager
def planted(ops: tuple[str, ...], wrong: Callable) -> Iterator[None]:
    """The wrong rule in place of the right ones."""
    before = {op: _RULES.get(op) for op in ops}
    _RULES.update({op: Rule(wrong, True) for op in ops})
    try:
        yield
    finally:
        for op, rule in before.items():
            if rule is None:
                del _RULES[op]
            else:
                _RULES[op] = rule
