"""ZipIt! greedy matching, in quadratic time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from .matching import Correspondence, Evidence, Matching, from_slots, model_of, similarity

BLOCK = 64  # rows searched at once


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
    total = len(correlation)
    origin = model_of(sizes)
    budget = np.full(len(sizes), int((total - width) // len(sizes) * beta + 1e-4))
    table, done = _Table(correlation, alpha), []
    while len(done) < total - width:
        pair = table.best()
        if pair is None:  # nothing but banned pairs: go on from the same groups without the ban
            table = _Table(correlation, alpha)
            for i, j in done:
                table.merge(i, j)
            budget[:] = total
            continue
        i, j = pair
        table.merge(i, j)
        done.append((i, j))
        if origin[i] == origin[j]:
            budget[origin[i]] -= 1
            if budget[origin[i]] <= 0:
                table.forbid(np.flatnonzero(origin == origin[i]))
    return done


class _Table:
    """Similarities of groups, with the largest entry at hand.

    Each row keeps its first maximum right of the diagonal (the first maximum of a symmetric matrix lies
    there). A row whose maximum may have gone stays as it is, as an upper bound, and is searched again
    only when it comes up as the largest of all: O(n) work per merge, apart from those rare searches.
    """

    def __init__(self, correlation: np.ndarray, alpha: float) -> None:
        n = len(correlation)
        # Eight more columns: with rows a power of two apart, writing a column would thrash the cache.
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
