"""Close the parents of every family: relate the partitions that two parents make of one family.

A family's features may belong to a head (by one path) and to a group of heads (by another). Two
partitions p, q of the same features, seen through the components of their overlap (the join):
equal to both -> the parents are one-to-one; equal to one -> nested, the finer parent has the coarser
as its own parent; equal to none -> a new block node above both. Partitions that exist already, with
another name, are recognised structurally; otherwise grouped-query attention does not converge.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from .components import components
from .hashing import U64, pair
from .relations import Edges


class Table(NamedTuple):
    """children: atoms [n], ascending; columns: (slot, parent labels [n]) aligned with children."""

    children: np.ndarray
    columns: list[tuple[np.uint64, np.ndarray]]


class _Side(NamedTuple):
    """One parent partition of a family: its labels per child and its distinct atoms."""

    labels: np.ndarray  # parent label of every child [n]
    atoms: np.ndarray  # parent atom of every child [n]
    distinct: np.ndarray  # distinct parent atoms [k]
    index: np.ndarray  # which distinct atom, per child [n]
    first: np.ndarray  # first child of every distinct atom [k]
    slot: np.uint64
    block: np.ndarray  # component of the overlap with another side, per distinct atom [k]


class Closure:
    """Edges that follow from pairs of parents: `one`, `many` and sizes of new block nodes `blocks`."""

    def __init__(self, atom: np.ndarray, family: np.ndarray, tables: dict[int, Table], labels: int) -> None:
        self.atom, self.family, self.tables, self.next_label = atom, family, tables, labels
        self.one: list[Edges] = []
        self.many: list[Edges] = []
        self.blocks: list[int] = []

    @property
    def changed(self) -> bool:
        return bool(self.one or self.many or self.blocks)

    def run(self) -> None:
        for table in self.tables.values():
            for a, b in combinations([self._side(*column) for column in table.columns], 2):
                self._pair(a, b)

    def _side(self, slot: np.uint64, labels: np.ndarray) -> _Side:
        atoms = self.atom[labels]
        distinct, first, index = np.unique(atoms, return_index=True, return_inverse=True)
        return _Side(labels, atoms, distinct, index, first, slot, np.arange(len(distinct)))

    def _pair(self, a: _Side, b: _Side) -> None:
        a, b, count = _overlap(a, b)
        if count == 1:
            return  # independent: the partitions say nothing about each other
        kind = pair(np.array([a.slot]), np.array([b.slot]))[0]
        if count == len(a.distinct) == len(b.distinct):
            self._same(a.labels[a.first], b.labels[a.first], kind)
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
        chosen = np.searchsorted(table.children, side.distinct, side="right") - 1
        for _, labels in table.columns:
            if _same_partition(self.atom[labels[chosen]], side.block):
                return labels[chosen]
        return None


def _overlap(a: _Side, b: _Side) -> tuple[_Side, _Side, int]:
    """Both partitions with the components of the bipartite graph 'share a child' (the join of the two)."""
    k, m = len(a.distinct), len(b.distinct)
    in_a, in_b = np.divmod(np.unique(a.index * m + b.index), m)  # its edges, ascending
    if len(in_a) == k * m:  # each meets each: most pairs
        return a, b, 1
    if len(in_a) == k:  # each of a lies within one of b
        return a._replace(block=in_b), b, m
    if len(in_a) == m:
        return a, b._replace(block=in_a[np.argsort(in_b)]), k
    block, count = components(k + m, in_a, in_b + k)
    return a._replace(block=block[:k]), b._replace(block=block[k:]), count


def _representative(labels: np.ndarray, block: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(count, np.int64)
    chosen[block] = labels
    return chosen


def _same_partition(p: np.ndarray, q: np.ndarray) -> bool:
    p, q = (np.unique(x, return_inverse=True)[1] for x in (p, q))
    return int(p.max()) == int(q.max()) == len(np.unique(p * (q.max() + 1) + q)) - 1
