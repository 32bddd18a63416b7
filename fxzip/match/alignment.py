"""Permutations of many models to one order, respecting blocks: heads with head-dims, groups of channels.

Spaces form a forest or a DAG: a feature of a child belongs to one feature of each parent. One model is
aligned to the others in two passes: scores upwards (two heads are as alike as the best pairing of what
lies under them), permutations downwards (heads first, then the dimensions inside matched heads).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Slots = dict[str, np.ndarray]  # space -> slot of every feature of one model

SWEEPS = 8  # over all models when there are three or more; two are solved exactly by the first step
FORBIDDEN = -1e6  # far below any sum of correlations
TIE = 1e-9  # what staying in place is worth when the data does not care
# Scoring all pairs of blocks exactly takes blocks^2 assignments of about size^3 + CALL steps each; above
# STEPS (seconds) pairs of blocks are compared by an upper bound. Matched blocks are always solved exactly.
CALL, STEPS = 20_000, 1 << 31


@dataclass(frozen=True, eq=False)
class Layer:
    """One space as the alignment sees it. parents: (name, parent feature of every feature int [n]).

    correlation: float [Sn, Sn] over all models, or what makes it when it is asked for, so that of many spaces only
    one is held; None when nothing is known. sizes: n_i (equal when blocks are involved); width: the number of slots.
    """

    name: str
    width: int
    sizes: tuple[int, ...]
    parents: tuple[tuple[str, np.ndarray], ...] = ()
    correlation: np.ndarray | Callable[[], np.ndarray] | None = None


def align(layers: Sequence[Layer]) -> list[Slots]:
    """The slots of every model's features, one-to-one, slot k being model 0's feature k. Parents come first.

    Maximises the sum of correlations over all pairs of models by coordinate ascent: each model is aligned
    to the sum of all others until nothing moves.

    >>> c = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1.0]])
    >>> align([Layer("s0", 2, (2, 2), correlation=c)])[1]["s0"]
    array([1, 0])
    """
    count = len(layers[0].sizes)
    placed: list[Slots] = [{layer.name: np.arange(layer.sizes[0]) for layer in layers}]
    for model in range(1, count):
        placed.append(_align_one(layers, model, dict(enumerate(placed))))
    for _ in range(SWEEPS if count > 2 else 0):
        before = list(placed)
        for model in range(count):
            others = {i: slots for i, slots in enumerate(placed) if i != model}
            placed[model] = _align_one(layers, model, others)
        if all(np.array_equal(a[k], b[k]) for a, b in zip(before, placed, strict=True) for k in a):
            break
    return _relabelled(layers, placed)


def _relabelled(layers: Sequence[Layer], placed: list[Slots]) -> list[Slots]:
    """The same groups in model 0's order; slots that model 0 leaves empty come last."""
    new: list[Slots] = [{} for _ in placed]
    for layer in layers:
        first = placed[0][layer.name]
        order = np.concatenate([first, np.setdiff1d(np.arange(layer.width), first)])
        rank = np.argsort(order)
        for slots, old in zip(new, placed, strict=True):
            slots[layer.name] = rank[old[layer.name]]
    return new


def _align_one(layers: Sequence[Layer], model: int, others: Mapping[int, Slots]) -> Slots:
    """Align one model to the others. Falls back to the identity where parents' best partners do not fit."""
    own = {layer.name: _against(layer, model, others) for layer in layers}
    scores: dict[str, np.ndarray] = {}
    for layer in reversed(layers):
        scores[layer.name] = own[layer.name] + _from_children(layer, layers, scores, lambda _, s: s)
    slots: Slots = {}
    for layer in layers:
        score = scores[layer.name]
        if any(_shares_child(layers, layer.name, done) for done in slots):
            score = own[layer.name] + _from_children(
                layer, layers, scores, lambda child, s, me=layer.name: _consistent(child, s, slots, me)
            )
        found = _assign(score) if not layer.parents else _assign_inside(layer, score, slots)
        if found is None:
            return {each.name: np.arange(each.sizes[model]) for each in layers}
        slots[layer.name] = found
    return slots


def _against(layer: Layer, model: int, others: Mapping[int, Slots]) -> np.ndarray:
    """Summed correlation of every slot's features with the model's features. [width, n_model]"""
    score = np.zeros((layer.width, layer.sizes[model]))
    if layer.correlation is None:
        return score
    starts = np.cumsum((0, *layer.sizes))
    columns = slice(starts[model], starts[model + 1])
    correlation = layer.correlation() if callable(layer.correlation) else layer.correlation
    for i, slots in others.items():
        score[slots[layer.name]] += correlation[starts[i] : starts[i + 1], columns]
    return score


def _from_children(
    layer: Layer,
    layers: Sequence[Layer],
    scores: Mapping[str, np.ndarray],
    view: Callable[[Layer, np.ndarray], np.ndarray],
) -> np.ndarray | float:
    """What the children say about every pair of this layer's features. [n, n], or 0 without children."""
    total: np.ndarray | float = 0.0
    for child in layers:
        for name, index in child.parents:
            if name == layer.name:
                total = total + _block_scores(view(child, scores[child.name]), index, layer.width)
    return total


def _shares_child(layers: Sequence[Layer], a: str, b: str) -> bool:
    return any({a, b} <= {name for name, _ in layer.parents} for layer in layers)


def _consistent(child: Layer, score: np.ndarray, slots: Slots, parent: str) -> np.ndarray:
    """The child's score with the pairs ruled out that its other, already matched parents exclude."""
    keep = np.ones(score.shape, bool)
    for name, index in child.parents:
        if name != parent and name in slots:
            keep &= index[:, None] == slots[name][index][None, :]
    return np.where(keep, score, FORBIDDEN)


def _assign(score: np.ndarray) -> np.ndarray:
    """The slot of every column in the best assignment; ties stay in place. [slots, n] -> int [n]"""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(score + TIE * np.eye(*score.shape), maximize=True)
    slots = np.empty(score.shape[1], np.int64)
    slots[columns] = rows
    return slots


def _assign_inside(layer: Layer, score: np.ndarray, slots: Slots) -> np.ndarray | None:
    """Assign inside the blocks that the parents' slots pair up; None when their sizes do not fit."""
    here = np.zeros(layer.width, np.int64)
    there = np.zeros(layer.width, np.int64)
    for name, index in layer.parents:
        here = here * len(slots[name]) + index
        there = there * len(slots[name]) + slots[name][index]
    rows, columns = np.argsort(here, kind="stable"), np.argsort(there, kind="stable")
    if not np.array_equal(here[rows], there[columns]):
        return None
    found = np.empty(layer.width, np.int64)
    cuts = np.flatnonzero(np.diff(here[rows])) + 1
    if len(cuts) + 1 == layer.width:  # blocks of one: the parents decide
        found[columns] = rows
        return found
    for r, c in zip(np.split(rows, cuts), np.split(columns, cuts), strict=True):
        found[c] = r[_assign(score[np.ix_(r, c)])]
    return found


def _block_scores(score: np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """Value of the best pairing inside every pair of blocks. [n, n], int [n] -> [count, count]"""
    order = np.argsort(index, kind="stable")
    sizes = np.bincount(index, minlength=count)
    size = int(sizes[0])
    if (sizes == size).all():
        tiles = score[np.ix_(order, order)].reshape(count, size, count, size).swapaxes(1, 2)
        return _tile_scores(tiles)
    members = np.split(order, np.cumsum(sizes)[:-1])
    result = np.full((count, count), FORBIDDEN)
    for a, b in np.argwhere(sizes[:, None] == sizes[None, :]):
        result[a, b] = _value(score[np.ix_(members[a], members[b])])
    return result


def _tile_scores(tiles: np.ndarray) -> np.ndarray:
    """[count, count, size, size] -> [count, count]"""
    count, _, size, _ = tiles.shape
    if size == 1:
        return tiles[:, :, 0, 0]
    if size == 2:
        straight = tiles[:, :, 0, 0] + tiles[:, :, 1, 1]
        return np.maximum(straight, tiles[:, :, 0, 1] + tiles[:, :, 1, 0])
    if count**2 * (size**3 + CALL) > STEPS:
        return np.minimum(tiles.max(3).sum(2), tiles.max(2).sum(2))
    flat = np.ascontiguousarray(tiles).reshape(-1, size, size)
    return np.array([_value(tile) for tile in flat]).reshape(count, count)


def _value(tile: np.ndarray) -> float:
    from scipy.optimize import linear_sum_assignment

    return float(tile[linear_sum_assignment(tile, maximize=True)].sum())
