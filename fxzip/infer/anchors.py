"""Where features are visible: anchors to measure them at, and the layout of any value."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from .reader import Reader
from .spaces import Anchor, Layout

QUIET = 1e-3  # weight of what producers write beside what consumers read


def anchors_of(reader: Reader, wanted: set[int]) -> dict[int, list[Anchor]]:
    """Where features are measured: what consumers read; and with little weight what producers write, which tells apart
    features that stay silent behind a non-linearity, and what scales and shifts make of it, which tells apart features
    that are one constant before. Without consumers, the latter in full. A space that only parameters meet in (a table
    of coordinates) is measured in the parameter, where its entries correspond; one that no layer reads or makes
    (latents that scale a value and are summed) where it ends, but for blocks, which are known by what they hold.

    Where another axis carries features as well (channels beside hidden tokens), samples along it are in an order of
    each model's own: such a value counts only where there is no other, and then by rank along that axis.
    """
    read, written, stored = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    for node, roles in reader.inference.notes.contractions.items():
        for operand in node.all_input_nodes if "consume" in roles else ():
            if operand in reader.inference.data:
                stream = _before_affine(reader, operand)
                _collect(reader, stream, wanted, read)
                _collect(reader, operand, wanted, written)
            elif len(_families(reader, operand) & wanted) == 1:
                _collect(reader, operand, wanted, stored)
        if "produce" in roles:
            _collect(reader, node, wanted, written)
    found = {}
    for family in wanted:
        seen = list(read[family].values())
        quiet = [a for key, a in written[family].items() if key not in read[family]]
        clear = [a for a in quiet if not a.unordered]
        if any(not a.unordered for a in seen):
            found[family] = [*(a for a in seen if not a.unordered), *(replace(a, weight=QUIET) for a in clear)]
        elif clear or seen or quiet or stored[family]:
            found[family] = clear or seen or quiet or list(stored[family].values())
    return found | _where_they_end(reader, wanted - found.keys() - _blocks(reader, wanted))


def _blocks(reader: Reader, wanted: set[int]) -> set[int]:
    """Families that others are inside of."""
    columns = (c for f in wanted for c in reader.solution.parents.get(f, (None, ()))[1])
    return {int(reader.solution.family[c[0]]) for c in columns}


def _where_they_end(reader: Reader, wanted: set[int]) -> dict[int, list[Anchor]]:
    """Values with these features that a node without them is made of."""
    data, ends = reader.inference.data, defaultdict(dict)
    for node in (n for n in reader.inference.lowered.graph.nodes if n in data and wanted):
        for operand in node.all_input_nodes:
            if operand in data:
                _collect(reader, operand, wanted & (_families(reader, operand) - _families(reader, node)), ends)
    seen = {family: list(places.values()) for family, places in ends.items()}
    return {family: [a for a in places if not a.unordered] or places for family, places in seen.items()}


def _families(reader: Reader, node: fx.Node) -> set[int]:
    """The families that have a place in a value."""
    return {f for _, labels in reader.inference.types[node].groups for f, _ in reader.split(labels.ravel())}


def _before_affine(reader: Reader, node: fx.Node) -> fx.Node:
    """Step over norms and scales whose parameters live in the space: the stream itself is what is shared."""
    inference = reader.inference
    while True:
        op = node.args[0] if node.target is operator.getitem else node  # a norm has several results
        if not isinstance(op, fx.Node) or op.op != "call_function" or op in inference.notes.contractions:
            return node
        operands = [o for o in op.all_input_nodes if "const" not in o.meta]
        data = [o for o in operands if o in inference.data]
        affine = any(o in inference.weights for o in operands)
        if not affine or len(data) != 1 or _places(reader, data[0]) != _places(reader, node):
            return node
        node = data[0]


def _places(reader: Reader, node: fx.Node) -> tuple:
    """Shape of a value, and which feature sits where in it."""
    labelled = reader.inference.types[node]
    flat = (_flat(*group) for group in labelled.groups)
    return labelled.shape, sorted((axes, reader.atoms(labels).tobytes()) for axes, labels in flat)


def _collect(reader: Reader, node: fx.Node, wanted: set[int], into: dict[int, dict]) -> None:
    if node.meta["shape"] is None:  # several results: the first is the value
        node = next((u for u in node.users if u.args[1] == 0), node)
    groups = reader.inference.types[node].groups
    loose = {axis for axes, labels in groups if _movable(reader, labels) for axis in axes}
    for axes, labels in groups:
        ascending, flat = _flat(axes, labels)
        for family, run in reader.split(flat):
            positions = reader.positions(family, flat, run) if family in wanted else None
            if positions is not None:
                anchor = Anchor(node.name, ascending, positions, unordered=tuple(sorted(loose - set(axes))))
                into[family].setdefault((node, ascending, run[0]), anchor)


def _movable(reader: Reader, labels: np.ndarray) -> bool:
    """Whether any two of these features may change places."""
    return bool((reader.size[reader.solution.family[reader.atoms(labels)]] > 1).any())


@dataclass
class Layouts:
    """Where the spaces sit in any value of the lowered graph, worked out when asked."""

    reader: Reader
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
