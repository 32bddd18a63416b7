"""Read feature spaces off a solved inference: which family sits where on which parameter axis, and how."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from .engine import Inference
from .labels import LabelledType, label_of, tag_of
from .solver import Solution
from .spaces import Anchor, FeatureSpace, Layout, Parent, Segment, Spaces

QUIET = 1e-3  # weight of what producers write beside what consumers read


@dataclass
class _Reader:
    """Working tables shared by the steps below."""

    inference: Inference
    solution: Solution

    def __post_init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}  # family -> feature index of every atom (dense lookup)
        self.order: dict[int, np.ndarray] = {}  # family -> atoms in feature order
        self.lookup = np.full(len(self.solution.family), -1, np.int64)
        self.size = np.array([len(m) for m in self.solution.members])
        self.roles = _role_bits(self.inference)

    def atoms(self, labels: np.ndarray) -> np.ndarray:
        return self.solution.atom[label_of(labels)]

    def place(self, family: int, atoms: np.ndarray) -> None:
        """Fix the feature order of a family: as its atoms first appear."""
        self.order[family] = atoms
        self.lookup[atoms] = np.arange(len(atoms))

    def split(self, labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(family, positions [n, t]) for every role a family of more than one plays in these flat labels."""
        solution = self.solution
        bare = label_of(labels)
        atoms, colours = solution.atom[bare], solution.colour[bare]
        families = solution.family[atoms]
        found = []
        keys = np.stack([families.astype(np.uint64), colours], 1)
        _, inverse = np.unique(keys, axis=0, return_inverse=True)
        for run in _by_value(inverse.reshape(-1)):
            family = int(families[run[0]])
            if self.size[family] < 2:
                continue
            found.append((family, run))
        found.sort(key=lambda item: item[1][0])
        return found

    def positions(self, family: int, labels: np.ndarray, run: np.ndarray) -> np.ndarray | None:
        """int64 [n, t] for the entries `run` of `labels`; None when not every feature occurs equally often."""
        n = int(self.size[family])
        features = self.lookup[self.atoms(labels[run])]
        if len(run) % n or (np.bincount(features, minlength=n) != len(run) // n).any():
            return None
        order = np.lexsort((run, tag_of(labels[run]), features))
        return run[order].reshape(n, -1)


def read_spaces(inference: Inference, solution: Solution) -> Spaces:
    """The `Spaces` of a solved inference."""
    reader = _Reader(inference, solution)
    owned = _owned(reader)  # family -> [(parameter, axis, run)]
    wanted = _with_ancestors(solution, reader.size, owned)
    for family, uses in owned.items():
        name, axis, run = uses[0]
        reader.place(family, reader.atoms(inference.axes[name][axis][run]))
    _place_ancestors(reader, wanted)
    ranked = _ranked(reader, wanted, owned)
    names = {family: f"s{i}" for i, family in enumerate(ranked)}
    anchors = _anchors(reader, wanted)
    kinds = _kinds(reader)
    spaces = tuple(_space(reader, f, names, owned.get(f, []), anchors.get(f, []), kinds.get(f, set())) for f in ranked)
    used = {n for n, p in inference.lowered.parameters.items() if p.users}
    untouched = tuple(n for n in inference.lowered.parameters if n not in used)
    layouts = _Layouts(reader, names, {n.name: n for n in inference.types})
    return Spaces(spaces, tuple(inference.frozen), untouched, _opaque_nodes(reader), inference.lowered, layouts)


@dataclass
class _Layouts:
    """Where the spaces sit in any value of the lowered graph, worked out when asked."""

    reader: _Reader
    names: dict[int, str]
    nodes: dict[str, fx.Node]

    def __call__(self, name: str) -> tuple[Layout, ...]:
        """The feature layouts of the lowered node `name`; () when its type carries no space."""
        found = []
        for axes, labels in self.reader.inference.types[self.nodes[name]].groups if name in self.nodes else ():
            ascending, flat = _flat(axes, labels)
            runs = []
            for family, run in self.reader.split(flat):
                positions = self.reader.positions(family, flat, run) if family in self.names else None
                if positions is not None:
                    runs.append((self.names[family], positions))
            if runs:
                found.append(Layout(ascending, tuple(runs)))
        return tuple(found)


def _flat(axes: tuple, labels: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Axes in ascending order and the labels flattened row-major over them."""
    ascending = tuple(sorted(axes))
    return ascending, np.ascontiguousarray(labels.transpose([axes.index(a) for a in ascending])).ravel()


def _owned(reader: _Reader) -> dict[int, list[tuple[str, int, np.ndarray]]]:
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


def _place_ancestors(reader: _Reader, wanted: set[int]) -> None:
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


def _ranked(reader: _Reader, wanted: set[int], owned: dict) -> list[int]:
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


def _space(reader: _Reader, family: int, names: dict, uses: list, anchors: list[Anchor], kinds: set[str]) -> FeatureSpace:
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
            raise ValueError(f"{name} axis {axis}: a role of a family covers it unevenly")
        segments.append(Segment(name, axis, positions[:, 0], _roles(reader.roles[labels[run]])))
    consumers = [s for s in segments if "consume" in s.roles]
    tied = any({"consume", "produce"} <= s.roles or {"consume", "vector"} <= s.roles for s in segments)
    tangled = any("tangled" in s.roles for s in segments)
    rigid = tied or tangled or (bool(segments) and not consumers)
    return FeatureSpace(names[family], int(reader.size[family]), tuple(parents), tuple(segments), tuple(anchors),
                        frozenset(kinds), rigid)


_BITS = {"produce": 1, "consume": 2, "tangled": 4}


def _role_bits(inference: Inference) -> np.ndarray:
    """uint8 [labels]: the roles each label plays, those of derived labels passed on to what they stand for."""
    bits = np.zeros(inference.notes.relations.size, np.uint8)
    for labels, role in inference.notes.roles:
        bits[label_of(labels).ravel()] |= _BITS[role]
    for new, source in reversed(inference.notes.relations.derived):
        np.bitwise_or.at(bits, source, bits[label_of(new)])
    return bits


def _roles(bits: np.ndarray) -> frozenset[str]:
    total = int(np.bitwise_or.reduce(bits))
    return frozenset(r for r, b in _BITS.items() if total & b) or frozenset({"vector"})


def _kinds(reader: _Reader) -> dict[int, set[str]]:
    kinds: dict[int, set[str]] = defaultdict(set)
    for labels, kind in reader.inference.notes.nonlinearities:
        for family in np.unique(reader.solution.family[reader.atoms(labels)]):
            kinds[int(family)].add(kind)
    return kinds


def _anchors(reader: _Reader, wanted: set[int]) -> dict[int, list[Anchor]]:
    """Where features are measured: what consumers read, and with little weight what producers write, which
    tells apart features that stay silent behind a non-linearity; without consumers, the latter in full."""
    read, written = defaultdict(dict), defaultdict(dict)
    for node, roles in reader.inference.notes.contractions.items():
        if "consume" in roles:
            for operand in node.all_input_nodes:
                if operand in reader.inference.data:
                    _collect(reader, _before_affine(reader, operand), wanted, read)
        if "produce" in roles:
            _collect(reader, node, wanted, written)
    found = {}
    for family in wanted:
        quiet = [a for key, a in written[family].items() if key not in read[family]]
        if read[family]:
            found[family] = [*read[family].values(), *(replace(a, weight=QUIET) for a in quiet)]
        elif quiet:
            found[family] = quiet
    return found


def _before_affine(reader: _Reader, node: fx.Node) -> fx.Node:
    """Step over norms and scales whose parameters live in the space: the stream itself is what is shared."""
    inference = reader.inference
    while True:
        op = node.args[0] if node.target is operator.getitem else node  # a norm has several results
        if not isinstance(op, fx.Node) or op.op != "call_function" or op in inference.notes.contractions:
            return node
        operands = [o for o in op.all_input_nodes if "const" not in o.meta]
        data = [o for o in operands if o in inference.data]
        affine = any(o in inference.weights for o in operands)
        if not affine or len(data) != 1 or data[0].meta["shape"] != inference.types[node].shape:
            return node
        node = data[0]


def _collect(reader: _Reader, node: fx.Node, wanted: set[int], into: dict[int, dict]) -> None:
    if node.meta["shape"] is None:  # several results: the first is the value
        node = next((u for u in node.users if u.args[1] == 0), node)
    for axes, labels in reader.inference.types[node].groups:
        ascending, flat = _flat(axes, labels)
        for family, run in reader.split(flat):
            positions = reader.positions(family, flat, run) if family in wanted else None
            if positions is not None:
                into[family].setdefault((node, ascending, run[0]), Anchor(node.name, ascending, positions))


def _opaque_nodes(reader: _Reader) -> frozenset[str]:
    """FX nodes that cannot be shared: frozen ones, and those whose parameters produce features that something
    pins (an output, an op without a rule, a constant), so that indices mean something else in every model."""
    inference = reader.inference
    opaque = _alone_and(reader, inference.notes.relations.opaque)
    pinned = _alone_and(reader, inference.notes.relations.pinned)
    nodes = {n.meta.get("origin") for n in inference.frozen_nodes}
    for node, kind in inference.types.items():
        mine = [inference.types[o] for o in node.all_input_nodes if o in inference.linear]
        if node.op != "call_function" or not mine:
            continue
        produced = inference.notes.contractions.get(node, {}).get("produce", ())
        fixed = any(pinned[reader.atoms(labels[labels < inference.owned])].any() for labels in produced)
        # features that a parameter brings to the result; other axes of it (batch, tokens) are not the parameter's
        brought = np.intersect1d(_atoms_in(reader, mine), _atoms_in(reader, [kind]))
        if fixed or opaque[brought].any():
            nodes.add(node.meta.get("origin"))
    return frozenset(n for n in nodes if n)


def _atoms_in(reader: _Reader, types: list[LabelledType]) -> np.ndarray:
    arrays = [reader.atoms(g.labels).ravel() for t in types for g in t.groups]
    return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)


def _alone_and(reader: _Reader, labels: list[np.ndarray]) -> np.ndarray:
    """bool [atoms]: atoms of families of one that hold any of `labels`."""
    flags = np.zeros(len(reader.solution.family), bool)
    for array in labels:
        flags[reader.atoms(array)] = True
    return flags & (reader.size[reader.solution.family] == 1)


def _by_value(inverse: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(inverse, kind="stable")
    ordered = inverse[order]
    return np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
