"""ZipIt! greedy matching, in quadratic time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from .matching import Correspondence, Evidence, Matching, from_slots, model_of, similarity

BLOCK = 32  # rows searched at once
LISTED = 2  # pairs of one sorted list for every group, about
SAMPLE = 16  # rows that tell which entries these are
POOR = 16  # a round that merges fewer than one group in 16 costs more than it saves


@dataclass(frozen=True)
class Zip:
    """Merges the most correlated pair of groups, within or across models, until `width` groups are left.

    Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", ICLR 2024, section 4 and
    appendix: a new group is as similar to another as the less similar of its two parts, times alpha; model i
    may spend int((Sn - m) // N * beta + 1e-4) merges within itself (the one that uses up the budget
    included, so even a budget of 0 allows one), then its groups stay apart. A group counts for the model of
    its first feature. Merge for merge what the published code does, except that equal dead features of two
    models count as equal, and that the ban is lifted where it leaves no pair (three models and more).
    Raises InputError for alpha outside (0, 1], beta < 0, or a width outside 1..Sn.
    """

    alpha: float = 0.3
    beta: float = 0.125

    name: ClassVar[str] = "zip"
    paper: ClassVar[str] = "Stoica et al., ZipIt!, ICLR 2024"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"Zip: alpha must be in (0, 1], not {self.alpha}")
        if not self.beta >= 0:
            raise InputError(f"Zip: beta must be 0 or more, not {self.beta}")

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn], U [Sn, m]; slots in order of their first features."""
        total = sum(moments.sizes)
        if not 1 <= width <= total:
            raise InputError(f"zip: the width must be in 1..{total}, not {width}")
        correlation = similarity(moments)
        pairs = merges(correlation, moments.sizes, width, self.alpha, self.beta)
        first = np.arange(total)
        for i, j in reversed(pairs):  # i < j, and j joins nothing afterwards: backwards, i is final already
            first[j] = first[i]
        return from_slots(np.unique(first, return_inverse=True)[1], width, moments.sizes, correlation)


def merges(
    correlation: np.ndarray, sizes: Sequence[int], width: int, alpha: float, beta: float
) -> list[tuple[int, int]]:
    """The greedy's merges in order, as (group i, group j) with i < j, named by their first features.

    correlation: float [Sn, Sn], symmetric; not modified.

    >>> c = np.array([[1, 0.1, 0.2, 0.9], [0.1, 1, 0.3, 0.2], [0.2, 0.3, 1, 0.1], [0.9, 0.2, 0.1, 1]])
    >>> merges(c, (2, 2), 2, alpha=0.3, beta=1.0)
    [(0, 3), (1, 2)]
    """
    correlation = np.ascontiguousarray(correlation, np.float64)
    total, origin = len(correlation), np.asarray(model_of(sizes))
    budget = [int((total - width) // len(sizes) * beta + 1e-4)] * len(sizes)
    done, c, names = [], correlation, np.arange(total)
    while len(done) < total - width:
        pairs, spent = _round(c, origin[names].tolist(), budget, total - width - len(done), alpha)
        done += zip(*names[np.array(pairs, np.int64).reshape(-1, 2).T].tolist(), strict=True)
        if len(done) == total - width:
            break
        if spent is None and len(pairs) * POOR < len(names):
            return _one_by_one(correlation, c, names, pairs, done, origin, budget, total - width, alpha)
        c, kept = _joined(c, pairs, alpha)
        names = names[kept]
        if spent is not None:
            banned = np.flatnonzero(origin[names] == spent)
            c[np.ix_(banned, banned)] = -np.inf
    return done


def _round(
    c: np.ndarray, origin: list[int], budget: list[int], most: int, alpha: float
) -> tuple[list[tuple[int, int]], int | None]:
    """The next merges, at most `most`, of groups as they are, as far as no new group comes before them; and the model
    whose budget they have used up, where that ends them.

    c: [g, g]; its diagonal does not count. Free groups, in no merge of this round, are merged in the order of a sorted
    list, as long as they are more similar than any new group can be: to a free one (a merge to come makes alpha times
    its own value at most) or to another new one (at most alpha^2 times the largest value). Never below zero, where
    alpha raises what it scales."""
    found: list[tuple[int, int]] = []
    free, floor, bound = np.arange(len(c)), 0.0, None
    i, j, open_ = free[:0], free[:0], np.ones(len(c), bool)
    while True:
        before = len(found)
        pairs, values, above = _pairs_above(c if bound is None else _among(c, free), floor)
        if bound is None and len(values):
            floor = bound = alpha * float(values[0])  # the largest of all
            pairs = pairs[:, : np.searchsorted(-values, -floor)]
        spent = _take(zip(*free[pairs].tolist(), strict=True), origin, budget, most, found)
        if bound is None or spent is not None or len(found) in (before, most):
            return found, spent
        new = np.array(found[before:])
        open_[new] = False
        i, j, free = np.append(i, new[:, 0]), np.append(j, new[:, 1]), np.flatnonzero(open_)
        if above <= floor:
            floor = alpha * max(floor, bound, _most_alike(c, free, i, j))


def _among(c: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """c[groups][:, groups], a block of rows at a time: one large copy, not two."""
    made = np.empty((len(groups), len(groups)))
    for start in range(0, len(groups), BLOCK):
        part = slice(start, start + BLOCK)
        c.take(groups[part], 0).take(groups, 1, out=made[part], mode="clip")  # "raise" would buffer it
    return made


def _most_alike(c: np.ndarray, groups: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    """The largest min(c_ki, c_kj) of any of the groups k, or 0."""
    largest = 0.0
    for start in range(0, len(groups), BLOCK):
        rows = c.take(groups[start : start + BLOCK], 0)
        largest = max(largest, float(np.minimum(rows.take(i, 1), rows.take(j, 1)).max(initial=0.0)))
    return largest


def _pairs_above(c: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs [2, pairs] of which c > floor, the largest first, equal ones in row-major order; their values; and what
    all larger ones than are there: more than the floor where sorting all would take long."""
    g, higher = len(c), floor
    if g > 2 * LISTED:
        sample = c[:: -(-g // SAMPLE)].ravel()
        last = len(sample) - 1 - len(sample) * 2 * LISTED // g
        higher = max(floor, float(np.partition(sample, last)[last]))
    flat = np.flatnonzero(c > higher)
    i = flat // max(g, 1)  # NumPy vectorises this, and not divmod
    j = flat - g * i
    upper = i < j
    flat, pairs = flat[upper], np.stack([i[upper], j[upper]])
    values = c.ravel()[flat]
    order = np.argsort(-values, kind="stable")
    return pairs[:, order], values[order], higher


def _take(
    pairs: Iterable[tuple[int, int]], origin: list[int], budget: list[int], most: int, found: list[tuple[int, int]]
) -> int | None:
    """Add to `found`, up to `most`, every pair of which neither group is taken; the model whose budget ends it."""
    taken: set[int] = set()
    for i, j in pairs:
        if i in taken or j in taken:
            continue
        taken.update((i, j))
        found.append((i, j))
        if origin[i] == origin[j]:
            budget[origin[i]] -= 1
            if budget[origin[i]] <= 0:
                return origin[i]
        if len(found) == most:
            break
    return None


def _joined(c: np.ndarray, pairs: Sequence[tuple[int, int]], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of the groups after these merges, no group being in two; and which groups of c they are named by."""
    i, j = np.array(pairs, np.int64).reshape(-1, 2).T
    other, scale = np.arange(len(c)), np.ones(len(c))
    other[i], scale[i] = j, alpha
    kept = np.delete(np.arange(len(c)), j)
    other, scale = other[kept], scale[kept]
    made = np.empty((len(kept), len(kept)))
    for start in range(0, len(kept), BLOCK):  # what is at work stays in the cache
        part = slice(start, start + BLOCK)
        rows = c.take(kept[part], 0)
        np.minimum(rows, c.take(other[part], 0), out=rows)
        np.minimum(rows.take(kept, 1), rows.take(other, 1), out=made[part])
        made[part] *= scale[part, None]
        made[part] *= scale
    np.fill_diagonal(made, -np.inf)
    return made, kept


def _one_by_one(
    correlation: np.ndarray, c: np.ndarray, names: np.ndarray, pairs: list[tuple[int, int]],
    done: list[tuple[int, int]], origin: np.ndarray, budget: list[int], count: int, alpha: float,
) -> list[tuple[int, int]]:  # fmt: skip
    """`done` up to `count` merges. c: the groups `names` before the last of `done`, which are `pairs` in c."""
    table = _Table(c, alpha, spent=c is not correlation)
    for i, j in pairs:
        table.merge(i, j)
    while len(done) < count:
        pair = table.best()
        if pair is None:  # nothing but banned pairs: go on from the same groups without the ban
            table, names = _Table(correlation, alpha), np.arange(len(correlation))
            for i, j in done:
                table.merge(i, j)
            budget[:] = [len(correlation)] * len(budget)
            continue
        table.merge(*pair)
        i, j = (int(names[k]) for k in pair)
        done.append((i, j))
        model = origin[i]
        if model == origin[j]:
            budget[model] -= 1
            if budget[model] <= 0:
                table.forbid(np.flatnonzero(origin[names] == model))
    return done


class _Table:
    """Similarities of groups, with the largest entry at hand, for what `_round` cannot take from a list.

    Each row keeps its first maximum right of the diagonal (the first maximum of a symmetric matrix lies
    there). A row whose maximum may have gone stays as it is, as an upper bound, and is searched again
    only when it comes up as the largest of all: O(n) work per merge, apart from those rare searches.
    """

    def __init__(self, correlation: np.ndarray, alpha: float, spent: bool = False) -> None:
        """spent: it may be written over, which saves a matrix."""
        n = len(correlation)
        self.c = correlation
        if not spent or n % 512 == 0:  # rows a power of two apart: writing a column would thrash the cache
            self.c = np.empty((n, n + 8))[:, :n]
            self.c[:] = correlation
        np.fill_diagonal(self.c, -np.inf)
        self.alpha = alpha
        self.column = np.zeros(n, np.int64)  # where each row's maximum is, valid where fresh
        self.bound = np.full(n, -np.inf)  # upper bound of that maximum
        self.fresh = np.ones(n, bool)  # whether the bound is attained
        for start in range(0, n, BLOCK):  # a block of rows at a time: a call for each row would take longer
            part = self.c[start : start + BLOCK, start:].copy()
            part[np.tri(*part.shape, dtype=bool)] = -np.inf
            rows = slice(start, start + BLOCK)
            self.column[rows] = start + part.argmax(1)
            self.bound[rows] = part.max(1)

    def best(self) -> tuple[int, int] | None:
        """The first largest pair in row-major order; None when every pair is banned."""
        while True:
            i = int(self.bound.argmax())
            if self.bound[i] == -np.inf:
                return None
            if self.fresh[i]:
                return i, int(self.column[i])
            self._search(i)

    def _search(self, i: int) -> None:
        tail = self.c[i, i + 1 :]
        k = int(tail.argmax()) if len(tail) else -1
        self.column[i] = i + 1 + k
        self.bound[i] = tail[k] if len(tail) else -np.inf
        self.fresh[i] = True

    def merge(self, i: int, j: int) -> None:
        """Join group j to group i < j."""
        row = np.minimum(self.c[i], self.c[j])
        row *= self.alpha
        row[i] = -np.inf
        self.c[i] = row
        self.c[:, i] = row
        self.c[j] = -np.inf
        self.c[:, j] = -np.inf
        self.fresh[(self.column == i) | (self.column == j)] = False
        self.bound[j] = -np.inf
        above, bound, fresh = row[:i], self.bound[:i], self.fresh[:i]
        # Scaling by alpha raises negative entries: the new one may beat a row's maximum, or tie with it.
        up = (above > bound) | (fresh & (above == bound) & (self.column[:i] > i))
        bound[up] = above[up]
        self.column[:i][up] = i
        fresh[up] = True
        self._search(i)

    def forbid(self, rows: np.ndarray) -> None:
        """Ban every pair within `rows`."""
        self.c[np.ix_(rows, rows)] = -np.inf
        self.fresh[rows] = False
