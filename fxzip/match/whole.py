"""Whole blocks kept rather than averaged: an attention head, with its queries, keys and values, of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..infer.spaces import FeatureSpace
from ..measure.moments import SpaceMoments

RIDGE = 1e-4  # relative to unit variance: an explained share of 1 is then no rounding error


def units(spaces: Sequence[FeatureSpace]) -> dict[str, np.ndarray]:
    """Per space and feature, the number of the unit that has to be kept as a whole.

    A feature belongs with every parent it lies under and with all that lies under those.
    """
    starts = dict(zip((s.name for s in spaces), np.cumsum([0, *(s.size for s in spaces)]), strict=False))
    rows, columns = [], []
    for space in spaces:
        for parent in space.parents:
            rows.append(starts[space.name] + np.arange(space.size))
            columns.append(starts[parent.space] + np.asarray(parent.index))
    total = sum(s.size for s in spaces)
    ends = (np.concatenate(rows), np.concatenate(columns)) if rows else (np.zeros(0, int), np.zeros(0, int))
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(ends[0])), ends), shape=(total, total))
    found = connected_components(graph, directed=False)[1]
    return {s.name: found[starts[s.name] : starts[s.name] + s.size] for s in spaces}


def keepers(
    spaces: Sequence[FeatureSpace], moments: Mapping[str, SpaceMoments], slots: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Per space and slot, the model whose features are kept there. slots: per model and space, of every feature.

    Of the matched blocks of all models the one is kept that explains the most variance of the others, by least
    squares on standardised features; of equals the first model's. Empty where that would keep one whole model
    (blocks in two directions hang together throughout), or where nothing was measured.
    """
    unit = units(spaces)
    count = 1 + max(int(u.max()) for u in unit.values())
    if count == 1 or not moments:
        return {}
    score = np.zeros((count, len(slots)))
    for space in spaces:
        if space.name not in moments:
            continue
        correlation = moments[space.name].correlation().cpu().numpy()
        order = [np.argsort(s[space.name]) + space.size * i for i, s in enumerate(slots)]  # slot -> feature
        for number in np.unique(unit[space.name]):
            inside = unit[space.name] == number
            score[number] += [_explained(correlation, [o[inside] for o in order], i) for i in range(len(slots))]
    best = np.argmax(score > score.max(1, keepdims=True) - 1e-6, axis=1)
    return {name: best[u] for name, u in unit.items()}


def _explained(correlation: np.ndarray, features: Sequence[np.ndarray], model: int) -> float:
    """The variance of the other models' features that `model`'s explain, in numbers of features."""
    mine = features[model]
    others = np.concatenate([f for i, f in enumerate(features) if i != model])
    own = correlation[np.ix_(mine, mine)] + RIDGE * np.eye(len(mine))
    cross = correlation[np.ix_(mine, others)]
    return float((cross * np.linalg.solve(own, cross)).sum())
