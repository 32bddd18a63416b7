"""Inference: walk the lowered graph once, type every value, solve, and read the feature spaces off.

Rules (fxzip/infer/rules) see types and constants, never weights. What no rule covers pins everything
it touches and is recorded as frozen.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import SpaceError
from ..trace.lower import Lowered
from . import inner
from .labels import Group, LabelledType, inert, label_of
from .relations import Relations
from .rules import OutSpec, Refusal, Value, apply, blocks, propagates_linear
from .sampling import broken_families
from .solver import Solution, solve
from .spaces import Frozen

MAX_REPAIRS = 8
_MAX_CONSTANT = 5_000_000  # elements: larger constants are typed inert rather than compared by value


class Notes:
    """What the rules state: relations, roles of parameters, non-linearities. One per inference."""

    def __init__(self) -> None:
        self.relations = Relations()
        self.roles: list[tuple[np.ndarray, str]] = []
        self.nonlinearities: list[tuple[np.ndarray, str]] = []
        self.contractions: dict[fx.Node, dict[str, list[np.ndarray]]] = {}  # lowered node -> role -> labels
        self.node: fx.Node | None = None  # whose rule is running

    def role(self, labels: np.ndarray, role: str) -> None:
        """The current op contracts a parameter along these labels ("consume") or keeps them ("produce")."""
        self.roles.append((label_of(labels).ravel(), role))
        if self.node is not None:
            self.contractions.setdefault(self.node, defaultdict(list))[role].append(label_of(labels).ravel())

    def nonlinear(self, groups: Iterable[Group], kind: str) -> None:
        """The current op commutes with permuting these labels jointly, not with a general change of basis."""
        self.nonlinearities.extend((label_of(g.labels).ravel(), kind) for g in groups)


class Inference:
    """Types of all values of one lowered graph. `run()` fills it; `solution` is what the edges imply."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.notes = Notes()
        self.types: dict[fx.Node, LabelledType] = {}
        self.outputs: dict[fx.Node, list[LabelledType]] = {}  # of ops with several results
        self.linear: set[fx.Node] = set()  # parameters, and what linear data movement made of them
        self.weights: set[fx.Node] = set()  # depends on parameters and constants only
        self.data: set[fx.Node] = set()  # depends on inputs
        self.axes: dict[str, tuple[np.ndarray, ...]] = {}  # parameter -> labels of every axis
        self.inner: dict[fx.Node, np.ndarray] = {}  # parameter cut into blocks -> labels [blocks, columns] of axis 1
        self.frozen: list[Frozen] = []
        self.frozen_nodes: list[fx.Node] = []
        self.owned = 0

    def run(self, counted: Iterable[fx.Node]) -> Solution:
        """Type every node, pin the `counted` outputs, solve. Raises SpaceError when no fixpoint is found."""
        for name, node in self.lowered.parameters.items():
            if "const" not in node.meta:  # index tables and buffers outside the checkpoint are known by value
                self._parameter(name, node)
        self.owned = self.notes.relations.size  # labels below are parameters' own
        for node in self.lowered.inputs:
            self.types[node] = inert(node.meta["shape"])
            self.data.add(node)
        for node in self.lowered.graph.nodes:
            if node.op == "call_function" and "const" not in node.meta:
                self._call(node)
        for node in counted:
            if node in self.types:
                self.notes.relations.pin_all(self.held(node), opaque=True)
        return self._solve()

    def _parameter(self, name: str, node: fx.Node) -> None:
        shape = node.meta["shape"]
        labels = tuple(self.notes.relations.fresh([d]) for d in shape)
        groups = [Group((i,), a) for i, a in enumerate(labels)]
        cut = _blocks(node)
        if cut > 1:
            self.inner[node] = self.notes.relations.fresh([cut, shape[inner.AXIS]])
            labels = (*labels[: inner.AXIS], self.inner[node].ravel(), *labels[inner.AXIS + 1 :])
            del groups[inner.AXIS]
        self.axes[name] = labels
        self.types[node] = LabelledType(shape, tuple(groups))
        self.linear.add(node)
        self.weights.add(node)

    def held(self, node: fx.Node) -> LabelledType:
        """The type of a value; of a parameter in blocks with the labels of its columns, on two axes more."""
        known, columns = self.types[node], self.inner.get(node)
        if columns is None:
            return known
        return LabelledType((*known.shape, *columns.shape), (*known.groups, Group((-2, -1), columns)))

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.types[node] = self.outputs[source][index]  # type: ignore[index]
            self._inherit(node, [source])  # type: ignore[list-item]
            return
        self.notes.node = node
        operands = [n for n in node.all_input_nodes if "const" not in n.meta]
        args, kwargs = tree_map(self._value, (node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
        specs = _specs(node)
        before = len(self.notes.relations.ordered)
        result = apply(self.notes, node.target, args, kwargs, specs)  # type: ignore[arg-type]
        if isinstance(result, Refusal):
            result = self._freeze(node, operands, specs, result.reason)
        elif self._loses_places(operands, self.notes.relations.ordered[before:]):
            result = [replace(t, foreign=True) for t in result]
        self.outputs[node] = result
        self.types[node] = result[0]
        self._inherit(node, operands)

    def _loses_places(self, operands: list[fx.Node], ordered: list[np.ndarray]) -> bool:
        """Whether inert axes of a result may be features that an operator (just now, or upstream) keeps in order."""
        data = [self.types[o] for o in operands if o in self.data]
        if any(t.foreign for t in data):
            return True
        held = [label_of(g.labels) for t in data for g in t.groups] if ordered else []
        return any(np.isin(labels, mine).any() for labels in ordered for mine in held)

    def _inherit(self, node: fx.Node, operands: list[fx.Node]) -> None:
        if any(o in self.data for o in operands):
            self.data.add(node)
        else:
            self.weights.add(node)
        moved = node.target is operator.getitem or propagates_linear(_packet(node))
        if moved and operands and all(o in self.linear for o in operands):
            self.linear.add(node)

    def _value(self, leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        if leaf not in self.types:
            self.types[leaf] = self._constant(leaf.meta["const"])
        const = leaf.meta.get("const")
        kinds = leaf in self.linear, leaf in self.weights
        return Value(self.types[leaf], leaf.meta["dtype"], const, *kinds, self.inner.get(leaf))

    def _constant(self, value: Tensor) -> LabelledType:
        """A constant is free along axes on which it is uniform, inert along the others (and where it has no values)."""
        shape = tuple(value.shape)
        if value.numel() == 0 or value.numel() > _MAX_CONSTANT or value.is_complex() or value.is_meta:
            return LabelledType(shape, foreign=True)
        uniform = [i for i, d in enumerate(shape) if d > 1 and bool((value == value.narrow(i, 0, 1)).all())]
        groups = tuple(Group((i,), self.notes.relations.fresh([shape[i]])) for i in uniform)
        return LabelledType(shape, groups, foreign=True)

    def _freeze(self, node: fx.Node, operands: list[fx.Node], specs: list[OutSpec], reason: str) -> list[LabelledType]:
        touches = any(o in self.weights or self._depends_on_parameters(o) for o in operands)
        for operand in operands:
            self.notes.relations.pin_all(self.held(operand), opaque=True)
        origin = node.meta.get("origin") or node.name
        names = tuple(n for n, p in self.lowered.parameters.items() if p in operands)
        self.frozen.append(Frozen(origin, str(node.target), node.meta.get("line") or "", reason, names))
        if touches:
            self.frozen_nodes.append(node)
        return [inert(s.shape) for s in specs]

    def _depends_on_parameters(self, node: fx.Node) -> bool:
        seen, stack = set(), [node]
        while stack:
            current = stack.pop()
            if current in self.linear:
                return True
            if current not in seen:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return False

    def _solve(self) -> Solution:
        """Solve; a family whose parents do not fit together in a group element is pinned, and again."""
        relations = self.notes.relations
        for _ in range(MAX_REPAIRS):
            solution = solve(relations)
            broken = broken_families(solution)
            if not broken:
                return solution
            labels = np.flatnonzero(np.isin(solution.family[solution.atom], broken))
            labels = labels[labels < relations.size]
            relations.mark(labels, labels + (1 << 41))
        raise SpaceError(f"{len(broken)} families of features stay inconsistent; please report this graph")


def _blocks(parameter: fx.Node) -> int:
    """Blocks of axis 0 in which axis 1 has features of its own, if every use says the same; else 1."""
    shape = parameter.meta["shape"]
    if len(shape) < 2 or shape[inner.AXIS] < 2:
        return 1
    found = {blocks(user.target, user.args, user.kwargs, parameter) for user in parameter.users}
    return found.pop() if len(found) == 1 else 1


def _packet(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def _specs(node: fx.Node) -> list[OutSpec]:
    results = node.meta.get("results")
    if results is None:
        return [OutSpec(tuple(node.meta["shape"]), node.meta["dtype"])]
    return [OutSpec(tuple(r[0]), r[1]) if r is not None else OutSpec((), torch.float32) for r in results]


def tensor_nodes(outputs: Any) -> list[fx.Node]:
    """The lowered nodes of a model's output, in order."""
    return [n for n in tree_flatten(outputs, is_leaf=lambda x: isinstance(x, fx.Node))[0] if isinstance(n, fx.Node)]
