"""From typed edges to features, families and their parents. The solver never names an op.

1. Colour refinement (1-WL) over the typed edges: labels that differ in any way get different colours.
2. Many-to-one edges that are one-to-one within (type, child colour) are one-to-one.
3. Connected components of one-to-one edges are the *atoms*: features.
4. Atoms with the same multiset of colours form a *family*, with a table atom -> parent atoms.
5. Pairs of parents of one family: equal partitions become one-to-one, nested ones a new parent edge,
   others a new block node - unless a structurally equal partition exists already.
6. Repeat to a fixpoint. Exchangeable = same family, same parents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import SpaceError
from .closure import Closure, Table
from .components import components
from .hashing import U64, mix, multiset, pair
from .relations import Edges, Relations

MAX_ROUNDS = 16


@dataclass(frozen=True)
class Solution:
    """Atoms (features), families (interchangeable kinds of features) and their parents.

    atom: int [N] atom of every label; colour: uint64 [N]; family: int [A] family of every atom.
    parents: family -> (children int [n], tuple of parent-atom arrays int [n], aligned with children).
    order: families, parents before children.
    """

    atom: np.ndarray
    colour: np.ndarray
    family: np.ndarray
    members: tuple[np.ndarray, ...]
    parents: Mapping[int, tuple[np.ndarray, tuple[np.ndarray, ...]]]
    order: tuple[int, ...]

    def table(self, family: int) -> tuple[np.ndarray, np.ndarray]:
        """(atoms [n], their parent atoms [n, number of parents])."""
        if family not in self.parents:
            atoms = self.members[family]
            return atoms, np.zeros((len(atoms), 0), np.int64)
        atoms, columns = self.parents[family]
        return atoms, np.stack(columns, 1)


def solve(relations: Relations) -> Solution:
    """Run to a fixpoint. Raises SpaceError when there is none (never seen; refuse rather than guess)."""
    state = _State(relations)
    for _ in range(MAX_ROUNDS):
        solution = state.round()
        if solution is not None:
            return solution
    raise SpaceError(
        f"inference did not converge in {MAX_ROUNDS} rounds on {state.count} labels; please report this graph"
    )


class _State:
    """Edges and marks of the relations, plus what the closure adds to them."""

    def __init__(self, relations: Relations) -> None:
        self.home = np.zeros(relations.size, U64)
        for first, count, kind in relations.homes:
            self.home[first : first + count] = kind
        self.one = _stacked(relations.one)
        self.many = _stacked(relations.many)
        marks = relations.marks
        self.marked = np.concatenate([m[0] for m in marks]) if marks else np.zeros(0, np.int64)
        self.keys = np.concatenate([m[1] for m in marks]) if marks else np.zeros(0, U64)
        self.next_home = relations.types(1 << 20)

    @property
    def count(self) -> int:
        return len(self.home)

    def round(self) -> Solution | None:
        """One pass of steps 1 to 5; the solution when nothing changed."""
        colour = self._refine()
        self._promote(colour)
        atom, atoms = components(self.count, *self.one[:2])
        changed = self._distinguish_repeated(colour, atom)
        of_atom = multiset(atom, mix(colour), atoms)
        family = np.unique(of_atom, return_inverse=True)[1]
        tables = self._tables(colour, atom, family)
        closure = Closure(atom, family, tables, self.count)
        closure.run()
        if not changed and not closure.changed:
            return _solution(atom, colour, family, tables)
        self._extend(closure)
        return None

    def _refine(self) -> np.ndarray:
        one, many, n = self.one, self.many, self.count
        colour = pair(mix(self.home + U64(77)), multiset(self.marked, mix(self.keys + U64(12345)), n))
        distinct = -1
        sides = [
            (e[a], e[b], e[2] * U64(4) + U64(k))
            for k, (e, a, b) in enumerate([(one, 0, 1), (one, 1, 0), (many, 0, 1), (many, 1, 0)])
        ]
        while True:
            total = np.zeros(n, U64)
            for source, target, kind in sides:
                total += multiset(target, pair(colour[source], kind), n)
            colour = pair(colour, total)
            now = len(np.unique(colour))
            if now == distinct:
                return colour
            distinct = now

    def _promote(self, colour: np.ndarray) -> None:
        """Step 2. Only whole (type, colour) classes are promoted. No reason for another round: what the new edges say,
        the colours knew, and so it is the same classes that would be promoted then."""
        child, parent, kind = self.many
        key = pair(kind, colour[child])
        _, inverse, counts = np.unique(pair(key, parent.astype(U64)), return_inverse=True, return_counts=True)
        shared = np.unique(key[counts[inverse] > 1])
        single = ~np.isin(key, shared)
        promoted = (child[single], parent[single], mix(key[single]))
        self.one = _stacked([self.one, promoted])
        self.many = (child[~single], parent[~single], kind[~single])

    def _distinguish_repeated(self, colour: np.ndarray, atom: np.ndarray) -> bool:
        """An atom in which one role occurs twice ties a space to itself in a way we do not model: pin it."""
        _, inverse, counts = np.unique(pair(colour, atom.astype(U64)), return_inverse=True, return_counts=True)
        repeated = np.unique(atom[counts[inverse] > 1])
        if not len(repeated):
            return False
        labels = np.flatnonzero(np.isin(atom, repeated))
        self._mark(labels, 1 << 40)
        return True

    def _mark(self, labels: np.ndarray, salt: int) -> None:
        self.marked = np.concatenate([self.marked, labels])
        self.keys = np.concatenate([self.keys, (labels + salt).astype(U64)])

    def _tables(self, colour: np.ndarray, atom: np.ndarray, family: np.ndarray) -> dict[int, Table]:
        """family -> its children atoms and, per slot, the parent labels; trivial and repeated slots left out."""
        child, parent, kind = self.many
        slot = pair(kind, colour[child])
        atoms = atom[child]
        families = family[atoms]
        order = np.lexsort((atoms, slot, families))
        tables = {}
        for run in _runs(order, families[order]):
            slots = _runs(run, slot[run])
            children = atoms[slots[0]]
            if any(len(s) != len(children) or (atoms[s] != children).any() for s in slots):
                continue  # ragged: an atom with several parents in one slot
            columns, seen = [], set()
            for s in slots:
                parents = atom[parent[s]]
                if parents.tobytes() in seen or (parents == parents[0]).all():
                    continue
                seen.add(parents.tobytes())
                columns.append((slot[s[0]], parent[s]))
            tables[int(families[run[0]])] = Table(children, columns)
        return tables

    def _extend(self, closure: Closure) -> None:
        if closure.blocks:
            homes = [np.full(k, self.next_home + i, U64) for i, k in enumerate(closure.blocks)]
            self.next_home += len(homes)
            self.home = np.concatenate([self.home, *homes])
        self.one = _stacked([self.one, *closure.one])
        self.many = _stacked([self.many, *closure.many])


def _stacked(edges: list[Edges]) -> Edges:
    if not edges:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, U64)
    u, v, kind = (np.concatenate([e[i] for e in edges]) for i in range(3))
    return u.astype(np.int64), v.astype(np.int64), kind.astype(U64)


def _runs(index: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """`index` cut where `keys` (sorted alike) changes."""
    cuts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    return np.split(index, cuts) if len(index) else []


def _solution(atom: np.ndarray, colour: np.ndarray, family: np.ndarray, tables: dict[int, Table]) -> Solution:
    by_family = np.argsort(family, kind="stable")
    members = tuple(_runs(by_family, family[by_family]))
    parents = {f: (t.children, tuple(atom[labels] for _, labels in t.columns)) for f, t in tables.items() if t.columns}
    return Solution(atom, colour, family, members, parents, _parents_first(len(members), family, parents))


def _parents_first(count: int, family: np.ndarray, parents: Mapping[int, tuple]) -> tuple[int, ...]:
    """Families so that parents precede children; families on a cycle are left out (their atoms stay fixed)."""
    above = {f: {int(family[c[0]]) for c in columns} for f, (_, columns) in parents.items()}
    below: dict[int, list[int]] = {}
    for f, ps in above.items():
        for p in ps:
            below.setdefault(p, []).append(f)
    waiting = {f: len(above.get(f, ())) for f in range(count)}
    ready = [f for f in range(count) if not waiting[f]]
    order = []
    while ready:
        f = ready.pop()
        order.append(f)
        for child in below.get(f, ()):
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return tuple(order)
