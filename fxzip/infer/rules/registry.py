"""The table from ATen ops to rules, and the one function that consults it.

A rule is an ordinary function of types. Its parameters are those of the op's schema, by name, with tensors as
`Value`s and the schema's defaults filled in; `out` lists the shapes of the results. It returns one type per result:

    @rule("flip", moves=True)
    def flip(ctx, out, self, dims, **_): ...

A configuration that a rule does not cover raises `Refuse(reason)`. An op without a rule is treated as
element-wise only if PyTorch itself tags it so. Nothing else is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..labels import LabelledType, inert
from .context import Context, Notes, OutSpec, Refusal, Refuse, Value

__all__ = [
    "Context",
    "OutSpec",
    "Refusal",
    "Refuse",
    "Value",
    "apply",
    "bind",
    "blocks",
    "names",
    "propagates_linear",
    "rule",
]

Types = LabelledType | list[LabelledType]


@dataclass(frozen=True)
class Rule:
    """moves: the op only moves, copies or drops entries, so what is linear in parameters stays so. groups: the name of
    the argument that says into how many blocks the op cuts the first axis of its `weight`, each with features of its
    own on the second."""

    function: Callable[..., Types]
    moves: bool
    groups: str | None = None


_RULES: dict[str, Rule] = {}

# Element-wise ops of several tensors that are linear in all of them jointly.
_SUMS = frozenset({"add", "sub", "rsub"})


def rule(
    *packets: str, moves: bool = False, groups: str | None = None
) -> Callable[[Callable[..., Types]], Callable[..., Types]]:
    """Register a function for these ATen ops (names without namespace and overload)."""

    def register(function: Callable[..., Types]) -> Callable[..., Types]:
        for packet in packets:
            if packet in _RULES:
                raise ValueError(f"two rules for {packet}")
            _RULES[packet] = Rule(function, moves, groups)
        return function

    return register


def names() -> frozenset[str]:
    """Every op with a rule of its own."""
    return frozenset(_RULES)


def _known(op: Any) -> Rule | None:
    """The rule of an ATen overload; None for anything else."""
    if isinstance(op, torch._ops.OpOverload) and op.namespace == "aten":
        return _RULES.get(op._schema.name.split("::")[1])
    return None


def propagates_linear(packet: str) -> bool:
    """Whether the results of this ATen op are linear data movement of its tensor operands."""
    return packet in _RULES and _RULES[packet].moves


def blocks(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operand: Any) -> int:
    """Into how many blocks this call cuts the first axis of `operand`, which it takes as weight and as nothing else."""
    known = _known(op)
    if known is None or known.groups is None:
        return 1
    bound = bind(op, args, kwargs)
    alone = bound["weight"] is operand and sum(x is operand for x in bound.values()) == 1
    return bound[known.groups] if alone else 1


def apply(
    notes: Notes,
    op: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Sequence[OutSpec],
) -> list[LabelledType] | Refusal:
    """The types of the op's tensor results, or the reason why there is no rule."""
    ctx = Context(notes)
    known = _known(op)
    bound = bind(op, args, kwargs)
    try:
        if known is not None:
            types = known.function(ctx, out, **bound)
        elif torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags:
            types = elementwise(ctx, op._schema.name.split("::")[1], values_in(bound.values()), out)
        else:
            return Refusal(f"no rule for {op}")
    except Refuse as refusal:
        return Refusal(str(refusal))
    types = types if isinstance(types, list) else [types]
    if [t.shape for t in types] != [tuple(o.shape) for o in out]:
        raise AssertionError(f"the rule for {op} returned {[t.shape for t in types]} for {[o.shape for o in out]}")
    return types


def bind(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    bound = {}
    for i, argument in enumerate(op._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def values_in(arguments: Iterable[Any]) -> list[Value]:
    """The tensors among arguments and lists of arguments."""
    found = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            found.extend(values_in(argument))
        elif isinstance(argument, Value):
            found.append(argument)
    return found


def elementwise(ctx: Context, kind: str, values: Sequence[Value], out: Sequence[OutSpec]) -> list[LabelledType]:
    """Entry by entry under broadcasting: aligned axes are related, an inert one pins a labelled one."""
    shape = np.broadcast_shapes(*(tuple(v.shape) for v in values))  # torch.broadcast_shapes imports sympy
    if any(tuple(o.shape) != tuple(shape) and 0 not in o.shape for o in out):
        raise Refuse(f"{kind} does not broadcast {[v.shape for v in values]} to {[o.shape for o in out]}")
    labelled = ctx.pointwise([v.type for v in values], shape)
    activations = [v for v in values if not v.linear and not v.parametric and v.const is None and v.type.groups]
    if len(activations) > 1 and kind not in _SUMS:
        ctx.nonlinear(labelled.groups, kind)
    return [labelled if 0 not in o.shape else inert(o.shape) for o in out]
