"""What a rule sees: labelled values in, a context to make statements with, labelled types out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..labels import Group, LabelledType, Name, label_of
from ..relations import Relations


@dataclass(frozen=True)
class Value:
    """One tensor operand.

    const: its value, when it depends on neither parameters nor inputs.
    parametric: derived from parameters and constants only.
    linear: parametric, by linear data movement alone.
    inner: of a parameter that is only used in blocks of its first axis: the labels [blocks, columns] of the second.
    """

    type: LabelledType
    dtype: torch.dtype
    const: torch.Tensor | None = None
    linear: bool = False
    parametric: bool = False
    inner: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dim(self) -> int:
        return len(self.type.shape)


class OutSpec(NamedTuple):
    """One tensor result, before it has a type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Refusal:
    """No rule for this op or this configuration of it: the caller pins every operand and reports why."""

    reason: str


class Refuse(Exception):
    """Raised inside a rule to refuse; `apply` turns it into a Refusal."""


class Notes(Protocol):
    """Where the statements of all rules are collected; the engine owns it.

    role: a contraction consumes ("consume") or keeps ("produce") these labels of a parameter.
    nonlinear: an op commutes with permuting these groups, not with a general change of basis.
    """

    relations: Relations

    def role(self, labels: np.ndarray, role: str) -> None: ...

    def nonlinear(self, groups: Iterable[Group], kind: str) -> None: ...


class Context:
    """The vocabulary of rules: statements about types, each a few relations and notes."""

    def __init__(self, notes: Notes) -> None:
        self.relations = notes.relations
        self.role = notes.role
        self.nonlinear = notes.nonlinear

    # -- statements about types -------------------------------------------------------------------

    def project(self, labelled: LabelledType, axes: Collection[int]) -> tuple[Group, ...]:
        """The marginals of all groups on `axes`."""
        kept = [(g, [a for a in g.axes if a in axes]) for g in labelled.groups]
        return tuple(self.relations.marginal(g, k) for g, k in kept if k)

    def pin(self, labelled: LabelledType, axes: Collection[int], ranked: bool = False) -> None:
        """Nobody may reorder `axes`. ranked: what the indices mean is each model's own affair (classes of an
        argmax, experts of a router), so features along them cannot be shared."""
        for group in labelled.groups:
            inside = [a for a in group.axes if a in axes]
            for axis in inside:
                self.relations.pin(group, axis)
            if ranked and inside:
                self.relations.opaque.append(np.unique(label_of(group.labels)))

    def inert_along(
        self,
        labelled: LabelledType,
        axes: Collection[int],
        shape: Sequence[int],
        mapping: Mapping[int, int] | None = None,
        ranked: bool = False,
    ) -> LabelledType:
        """Pin `axes`; a result of `shape` keeps the others' labels, at `mapping` (default: same place)."""
        self.pin(labelled, axes, ranked)
        rest = [a for a in range(len(labelled.shape)) if a not in axes]
        groups = self.project(labelled, rest)
        if mapping is not None:
            groups = tuple(g.renamed(mapping) for g in groups)
        return LabelledType(tuple(shape), groups)

    def constant(self, shape: Sequence[int]) -> LabelledType:
        """The type of a tensor with one value everywhere: every axis is free."""
        groups = (Group((a,), self.relations.fresh([d])) for a, d in enumerate(shape) if d > 1)
        return LabelledType(tuple(shape), tuple(groups))

    def einsum(
        self,
        operands: Sequence[tuple[LabelledType, Sequence[Name | None]]],
        out: Sequence[Name],
        shape: Sequence[int],
        pin: Collection[Name] = (),
    ) -> LabelledType:
        """Relate operands along equal names; axis i of the result is `out[i]`."""
        place = {name: i for i, name in enumerate(out)}
        groups = self.relations.einsum(operands, list(out), pin)
        return LabelledType(tuple(shape), tuple(g.renamed(place) for g in groups))

    def pointwise(self, types: Sequence[LabelledType], shape: Sequence[int]) -> LabelledType:
        """Relate types along the axes that broadcasting aligns; size-1 axes say nothing."""
        n = len(shape)
        aligned = [(t, range(n - len(t.shape), n)) for t in types]
        return self.einsum(aligned, range(n), shape)

    def contract(
        self, equation: str, operands: Sequence[Value], shape: Sequence[int], pin: Collection[Name] = ()
    ) -> LabelledType:
        """`bik,bkj->bij`: relate, and note which parameter axes the contraction consumes and produces."""
        inputs, out = equation.split("->")
        inputs = inputs.split(",")
        self._note_roles(operands, inputs, out)
        return self.einsum([(v.type, n) for v, n in zip(operands, inputs, strict=True)], out, shape, pin)

    def _note_roles(self, operands: Sequence[Value], inputs: Sequence[str], out: str) -> None:
        """By position the last operand is the weight. If all are parametric, the others are what it acts on
        (learned queries). A weight computed from parameters allows no change of basis but permutation:
        its contracted axes count as both."""
        data = [not v.parametric and not v.linear and v.const is None for v in operands]
        meets_data = any(data)
        for i, (value, names) in enumerate(zip(operands, inputs, strict=True)):
            is_weight = i == len(operands) - 1
            computed = value.parametric and not value.linear
            if all(data):
                summed = [g for g in value.type.groups if any(names[a] not in out for a in g.axes)]
                self.nonlinear(summed, "product")
            if not (meets_data or is_weight) or not (value.linear or computed and meets_data and is_weight):
                continue
            for group in value.type.groups:
                consumed = any(names[a] not in out for a in group.axes)
                if consumed:
                    self.role(group.labels, "consume")
                if computed or not consumed:
                    self.role(group.labels, "produce")
            if computed:
                self.nonlinear(value.type.groups, "computed weight")

    def mixed(self, labelled: LabelledType, axes: Collection[int], kind: str) -> None:
        """An op named `kind` mixes symmetrically along `axes`, the other axes being batch."""
        for group in labelled.groups:
            if any(a in axes for a in group.axes):
                self.relations.mixed(group, axes)
                self.nonlinear([group], kind)
