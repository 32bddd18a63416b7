"""Close the parents of every family: relate the partitions that two parents make of one family.

A family's features may belong to a head (by one path) and to a group of heads (by another). Two
partitions p, q of the same features, seen through the components of their overlap (the join):
equal to both -> the parents are one-to-one; equal to one -> nested, the finer parent has the coarser
as its own parent; equal to none -> a new block node above both. Partitions that exist already, with
another name, are recognised structurally; otherwise grouped-query attention does not converge.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .hashing import U64, pair
from .relations import Edges


class Table(NamedTuple):
    """children: atoms [n]; columns: (slot, parent labels [n]) aligned with children."""

    children: np.ndarray
    columns: list[tuple[np.uint64, np.ndarray]]


class _Side(NamedTuple):
    """One parent partition of a family: its labels per child and its distinct atoms."""

    labels: np.ndarray  # parent label of every child [n]
    atoms: np.ndarray  # parent atom of every child [n]
    distinct: np.ndarray  # distinct parent atoms [k]
    index: np.ndarray  # which distinct atom, per child [n]
    first: np.ndarray  # first child of every distinct atom [k]
    block: np.ndarray  # component of the overlap, per distinct atom [k]


class Closure:
    """Edges that follow from pairs of parents: `one`, `many` and sizes of new block nodes `blocks`."""

    def __init__(self, atom: np.ndarray, family: np.ndarray, tables: dict[int, Table], labels: int) -> None:
        self.atom, self.family, self.tables, self.next_label = atom, family, tables, labels
        self.one: list[Edges] = []
        self.many: list[Edges] = []
        self.blocks: list[int] = []
        self._rows: dict[int, dict[int, int]] = {}

    @property
    def changed(self) -> bool:
        return bool(self.one or self.many or self.blocks)

    def run(self) -> None:
        for table in self.tables.values():
            columns = table.columns
            for i in range(len(columns)):
                for j in range(i + 1, len(columns)):
                    self._pair(columns[i], columns[j])

    def _pair(self, p: tuple[np.uint64, np.ndarray], q: tuple[np.uint64, np.ndarray]) -> None:
        a, b, count = _overlap(self.atom, p[1], q[1])
        if count == 1:
            return  # independent: the partitions say nothing about each other
        kind = pair(np.array([p[0]]), np.array([q[0]]))[0]
        if count == len(a.distinct) == len(b.distinct):
            both = np.unique(np.stack([a.index, b.index], 1), axis=0, return_index=True)[1]
            self._same(p[1][both], q[1][both], kind)
        elif count == len(b.distinct):
            self._nested(a, b, kind)
        elif count == len(a.distinct):
            self._nested(b, a, kind)
        else:
            self._above_both(a, b, count, kind)

    def _same(self, u: np.ndarray, v: np.ndarray, kind: np.uint64) -> None:
        self.one.append((u, v, np.full(len(u), kind, U64)))

    def _belongs(self, u: np.ndarray, v: np.ndarray, kind: np.uint64) -> None:
        self.many.append((u, v, np.full(len(u), kind, U64)))

    def _nested(self, fine: _Side, coarse: _Side, kind: np.uint64) -> None:
        """Every atom of `fine` lies in one atom of `coarse`: make that a parent edge, unless it is one."""
        row = np.searchsorted(coarse.distinct, coarse.atoms[fine.first])
        target = coarse.labels[coarse.first][row]
        known = self._existing(fine)
        if known is None:
            self._belongs(fine.labels[fine.first], target, kind)
        elif (self.atom[known] != self.atom[target]).any():
            self._same(known, target, kind)

    def _above_both(self, a: _Side, b: _Side, count: int, kind: np.uint64) -> None:
        """A coarser partition than either: a block node above both, or the one there is already."""
        known_a, known_b = self._existing(a), self._existing(b)
        if known_a is None and known_b is None:
            block = self.next_label + np.arange(count)
            self.next_label += count
            self.blocks.append(count)
            self._belongs(a.labels[a.first], block[a.block], kind ^ U64(1))
            self._belongs(b.labels[b.first], block[b.block], kind ^ U64(2))
            return
        of_a = None if known_a is None else _representative(known_a, a.block, count)
        of_b = None if known_b is None else _representative(known_b, b.block, count)
        if of_a is not None and of_b is not None:
            if (self.atom[of_a] != self.atom[of_b]).any():
                self._same(of_a, of_b, kind)
        elif of_a is not None:
            self._belongs(b.labels[b.first], of_a[b.block], kind ^ U64(2))
        elif of_b is not None:
            self._belongs(a.labels[a.first], of_b[a.block], kind ^ U64(1))

    def _existing(self, side: _Side) -> np.ndarray | None:
        """Parent labels [k] of the side's atoms that partition them as `side.block` does, if there are any."""
        number = int(self.family[side.distinct[0]])
        table = self.tables.get(number)
        if table is None:
            return None
        if number not in self._rows:
            self._rows[number] = {int(x): i for i, x in enumerate(table.children)}
        rows = self._rows[number]
        chosen = np.array([rows[int(x)] for x in side.distinct])
        for _, labels in table.columns:
            if _same_partition(self.atom[labels[chosen]], side.block):
                return labels[chosen]
        return None


def _overlap(atom: np.ndarray, p: np.ndarray, q: np.ndarray) -> tuple[_Side, _Side, int]:
    """Both partitions with the components of the bipartite graph 'share a child' (the join of the two)."""
    ap, aq = atom[p], atom[q]
    up, fp, ip = np.unique(ap, return_index=True, return_inverse=True)
    uq, fq, iq = np.unique(aq, return_index=True, return_inverse=True)
    size = len(up) + len(uq)
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(ip), np.int8), (ip, iq + len(up))), shape=(size, size))
    count, block = connected_components(graph, directed=False)
    a = _Side(p, ap, up, ip, fp, block[: len(up)])
    b = _Side(q, aq, uq, iq, fq, block[len(up) :])
    return a, b, int(count)


def _representative(labels: np.ndarray, block: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(count, np.int64)
    chosen[block] = labels
    return chosen


def _same_partition(p: np.ndarray, q: np.ndarray) -> bool:
    both = np.unique(np.stack([p, q], 1), axis=0)
    return len(np.unique(p)) == len(np.unique(q)) == len(both)
