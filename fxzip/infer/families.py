"""Read feature spaces off a solved inference: which family sits where on which parameter axis, and how."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ..errors import SpaceError
from .anchors import Layouts, anchors_of
from .engine import Inference
from .labels import LabelledType, label_of
from .reader import Reader, roles_of
from .solver import Solution
from .spaces import Anchor, FeatureSpace, Parent, Segment, Spaces


def read_spaces(inference: Inference, solution: Solution) -> Spaces:
    """The `Spaces` of a solved inference."""
    reader = Reader(inference, solution)
    owned = _owned(reader)  # family -> [(parameter, axis, run)]
    wanted = _with_ancestors(solution, reader.size, owned)
    for family, uses in owned.items():
        name, axis, run = uses[0]
        reader.place(family, reader.atoms(inference.axes[name][axis][run]))
    _place_ancestors(reader, wanted)
    ranked = _ranked(reader, wanted, owned)
    names = {family: f"s{i}" for i, family in enumerate(ranked)}
    anchors = anchors_of(reader, wanted)
    kinds = _kinds(reader)
    spaces = tuple(_space(reader, f, names, owned.get(f, []), anchors.get(f, []), kinds.get(f, set())) for f in ranked)
    used = {n for n, p in inference.lowered.parameters.items() if p.users}
    untouched = tuple(n for n in inference.lowered.parameters if n not in used)
    layouts = Layouts(reader, names, {n.name: n for n in inference.types})
    return Spaces(spaces, tuple(inference.frozen), untouched, _opaque_nodes(reader), inference.lowered, layouts)


def _owned(reader: Reader) -> dict[int, list[tuple[str, int, np.ndarray]]]:
    owned: dict[int, list[tuple[str, int, np.ndarray]]] = defaultdict(list)
    for name, axes in reader.inference.axes.items():
        if not reader.inference.lowered.parameters[name].users:
            continue
        for axis, labels in enumerate(axes):
            for family, run in reader.split(labels) if labels.size > 1 else ():
                owned[family].append((name, axis, run))
    return dict(owned)


def _with_ancestors(solution: Solution, size: np.ndarray, owned: dict) -> set[int]:
    wanted, stack = set(), list(owned)
    while stack:
        family = stack.pop()
        if family in wanted or size[family] < 2:
            continue
        wanted.add(family)
        stack.extend(int(solution.family[c[0]]) for c in solution.parents.get(family, (None, ()))[1])
    return wanted


def _place_ancestors(reader: Reader, wanted: set[int]) -> None:
    """Block spaces without parameters take their order from their children."""
    for family in reversed(reader.solution.order):
        if family not in wanted:
            continue
        atoms, parents = reader.solution.table(family)
        row = np.empty(len(atoms), np.int64)
        row[reader.lookup[atoms]] = np.arange(len(atoms))
        for column in parents.T:
            above = int(reader.solution.family[column[0]])
            if above not in reader.order:
                distinct, first = np.unique(column[row], return_index=True)
                reader.place(above, distinct[np.argsort(first)])


def _ranked(reader: Reader, wanted: set[int], owned: dict) -> list[int]:
    """Parents before children, otherwise in the order in which parameters show them."""
    appearance = {f: i for i, f in enumerate(owned)}
    ranked: list[int] = []

    def visit(family: int) -> None:
        if family in ranked:
            return
        for column in reader.solution.parents.get(family, (None, ()))[1]:
            visit(int(reader.solution.family[column[0]]))
        ranked.append(family)

    for family in sorted(wanted & set(appearance), key=appearance.__getitem__):
        visit(family)
    return ranked


def _space(
    reader: Reader, family: int, names: dict, uses: list, anchors: list[Anchor], kinds: set[str]
) -> FeatureSpace:
    atoms, table = reader.solution.table(family)
    order = np.argsort(reader.lookup[atoms])
    parents = []
    for column in table[order].T:
        above = int(reader.solution.family[column[0]])
        parents.append(Parent(names[above], reader.lookup[column]))
    segments = []
    for name, axis, run in uses:
        labels = reader.inference.axes[name][axis]
        positions = reader.positions(family, labels, run)
        if positions is None or positions.shape[1] != 1:
            raise SpaceError(
                f"{name}[axis {axis}]: the features of {names[family]} do not come once each, so inference is wrong"
                " about this graph; please report it, and merge a part of the model without this parameter"
            )
        cut = len(labels) // reader.inference.lowered.parameters[name].meta["shape"][axis]
        segments.append(Segment(name, axis, positions[:, 0], roles_of(reader.roles[labels[run]]), cut))
    consumers = [s for s in segments if "consume" in s.roles]
    tied = any({"consume", "produce"} <= s.roles or {"consume", "vector"} <= s.roles for s in segments)
    tangled = any("tangled" in s.roles for s in segments)
    rigid = tied or tangled or (bool(segments) and not consumers)
    return FeatureSpace(
        names[family],
        int(reader.size[family]),
        tuple(parents),
        tuple(segments),
        tuple(anchors),
        frozenset(kinds),
        rigid,
    )


def _kinds(reader: Reader) -> dict[int, set[str]]:
    """family -> what touches it that only permutations commute with, or touches labels that stand for its."""
    notes = reader.inference.notes
    kinds: dict[int, set[str]] = defaultdict(set)
    for kind in sorted({kind for _, kind in notes.nonlinearities}):
        touched = np.zeros(len(reader.solution.atom), bool)
        for labels, other in notes.nonlinearities:
            if other == kind:
                touched[labels] = True
        for new, source in reversed(notes.relations.derived):
            touched[source[touched[label_of(new)]]] = True
        for family in np.unique(reader.solution.family[reader.solution.atom[touched]]):
            kinds[int(family)].add(kind)
    return kinds


def _opaque_nodes(reader: Reader) -> frozenset[str]:
    """FX nodes that cannot be shared: frozen ones, and those whose parameters produce features that something
    pins (an output, an op without a rule, a constant), so that indices mean something else in every model. What is
    pinned because it stands for a place in the input (token mixing, relative positions) means the same in all."""
    inference = reader.inference
    opaque = _with_children(reader, _alone_and(reader, inference.notes.relations.opaque))
    pinned = _alone_and(reader, inference.notes.relations.pinned)
    pinned &= opaque | ~_alone_and(reader, list(inference.notes.relations.placed.values()))
    nodes = {n.meta.get("origin") for n in inference.frozen_nodes}
    for node, kind in inference.types.items():
        mine = [inference.held(o) for o in node.all_input_nodes if o in inference.linear]
        if node.op != "call_function" or not mine:
            continue
        produced = inference.notes.contractions.get(node, {}).get("produce", ())
        fixed = any(pinned[reader.atoms(labels[labels < inference.owned])].any() for labels in produced)
        # features that a parameter brings to the result; other axes of it (batch, tokens) are not the parameter's
        brought = np.intersect1d(_atoms_in(reader, mine), _atoms_in(reader, [kind]))
        if fixed or opaque[brought].any():
            nodes.add(node.meta.get("origin"))
    return frozenset(n for n in nodes if n)


def _with_children(reader: Reader, flags: np.ndarray) -> np.ndarray:
    """bool [atoms]: those flagged, and those that belong to flagged ones only (the units that vote for one class)."""
    edges = [(reader.atoms(u), reader.atoms(v)) for u, v, _ in reader.inference.notes.relations.many]
    free = np.zeros(len(flags), bool)
    for child, parent in edges:
        free[child[~flags[parent]]] = True
    flags = flags.copy()
    for child, _ in edges:
        flags[child[~free[child]]] = True
    return flags


def _atoms_in(reader: Reader, types: list[LabelledType]) -> np.ndarray:
    arrays = [reader.atoms(g.labels).ravel() for t in types for g in t.groups]
    return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)


def _alone_and(reader: Reader, labels: list[np.ndarray]) -> np.ndarray:
    """bool [atoms]: atoms of families of one that hold any of `labels`."""
    flags = np.zeros(len(reader.solution.family), bool)
    for array in labels:
        flags[reader.atoms(array)] = True
    return flags & (reader.size[reader.solution.family] == 1)
