"""Optimal pairing: the best way to merge features two by two, within and across models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from .matching import Correspondence, Evidence, Matching, from_slots, similarity

TIE = 1e-9  # what staying in place is worth when the data does not care


@dataclass(frozen=True)
class Pair:
    """Pairs of features, of any models, with the largest sum of correlations (a maximum weight perfect matching).

    Edmonds, "Paths, trees, and flowers", 1965; compared with the greedy in Stoica et al., ZipIt!, ICLR 2024,
    appendix. Unlike "permute" it may pair two features of one model. A width above half of all features leaves
    the rest alone; below, pairs are paired again (three models and more), as similar as their members on average.
    `neighbours` bounds the time: only each feature's most similar ones are considered (and the best one-to-one
    partners, so that there always is a pairing); exact from Sn - 1 on.
    Raises InputError for neighbours < 1, or a width outside 1..Sn.
    """

    neighbours: int = 24

    name: ClassVar[str] = "pair"
    paper: ClassVar[str] = "Edmonds, Paths, trees, and flowers, 1965; Stoica et al., ZipIt!, ICLR 2024, appendix"
    correspondence: ClassVar[Correspondence] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise InputError(f"Pair: neighbours must be 1 or more, not {self.neighbours}")

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """moments of Sn features -> M [m, Sn], U [Sn, m]; slots in order of their first features."""
        total = sum(moments.sizes)
        if not 1 <= width <= total:
            raise InputError(f"pair: the width must be in 1..{total}, not {width}")
        alike = similarity(moments)
        local = np.concatenate([np.arange(n) for n in moments.sizes])
        score = alike + TIE * (local[:, None] == local[None, :])
        group = np.arange(total)
        while (count := int(group.max()) + 1) > width:
            member = np.eye(count)[group]  # [Sn, groups]
            mean = member / member.sum(0)
            first = np.arange(count)
            for a, b in pairing(mean.T @ score @ mean, 2 * max(width, -(-count // 2)) - count, self.neighbours):
                first[b] = a
            group = np.unique(first, return_inverse=True)[1][group]
        return from_slots(group, width, moments.sizes, alike)


def pairing(score: np.ndarray, alone: int, neighbours: int) -> list[tuple[int, int]]:
    """The pairs with the largest sum of scores that leave `alone` features over; n - alone must be even.

    score: float [n, n], symmetric. Features that stay alone are paired with `alone` extra vertices, at no gain.

    >>> pairing(np.array([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.1], [0, 0, 0.1, 1]]), 0, 3)
    [(0, 1), (2, 3)]
    """
    import networkx as nx
    from scipy.optimize import linear_sum_assignment

    n = len(score)
    off = score.copy()
    np.fill_diagonal(off, -np.inf)
    k = min(neighbours, n - 1)
    near = np.argpartition(-off, k - 1, 1)[:, :k] if k else np.zeros((n, 0), np.int64)
    rows, columns = np.repeat(np.arange(n), near.shape[1]), near.reshape(-1)
    half = n // 2
    partners = linear_sum_assignment(score[:half, half:], maximize=True)
    rows, columns = np.concatenate([rows, partners[0]]), np.concatenate([columns, partners[1] + half])
    weight = score[rows, columns]
    extra = np.arange(n, n + alone)
    graph = nx.Graph()
    graph.add_weighted_edges_from(zip(rows.tolist(), columns.tolist(), weight.tolist(), strict=True))
    spare = np.repeat(extra, n).tolist(), np.tile(np.arange(n), alone).tolist()
    graph.add_weighted_edges_from((e, f, 0.0) for e, f in zip(*spare, strict=True))
    pairs = nx.max_weight_matching(graph, maxcardinality=True)
    return sorted((min(p), max(p)) for p in pairs if max(p) < n)
