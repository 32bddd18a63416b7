"""Types under row-major reshape: split axes into common factors, join factors into new axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .labels import Group, LabelledType, inert, label_of, tag_of

if TYPE_CHECKING:
    from .relations import Relations

Dim = tuple[int, int]  # axis number, size


def reshape(relations: Relations, labelled: LabelledType, shape: tuple[int, ...]) -> LabelledType:
    """(C,) -> (H, D) splits a label array, (H, D) -> (C,) joins; an axis joined with an inert one is tagged."""
    if labelled.shape == shape:
        return labelled
    if not labelled.groups or 0 in labelled.shape:
        return inert(shape)
    work = _Factors(relations, labelled)
    for old, new in _segments(labelled.shape, shape):
        work.segment(old, new)
    return work.finish(shape)


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[Dim], list[Dim]]]:
    """The finest runs of old and new axes (sizes of 1 left out) with equal products."""
    a = [(i, d) for i, d in enumerate(old) if d != 1]
    b = [(i, d) for i, d in enumerate(new) if d != 1]
    segments = []
    i = j = 0
    while i < len(a) or j < len(b):
        i0, j0 = i, j
        p, q = a[i][1], b[j][1]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p, i = p * a[i][1], i + 1
            else:
                q, j = q * b[j][1], j + 1
        segments.append((a[i0:i], b[j0:j]))
    return segments


def _suffix_products(dims: Sequence[Dim]) -> list[int]:
    products, total = [], 1
    for _, d in reversed(dims):
        total *= d
        products.append(total)
    return products


class _Factors:
    """Groups over names while they change from old axes ("o", i) over factors to new axes ("n", i)."""

    def __init__(self, relations: Relations, labelled: LabelledType) -> None:
        self.relations = relations
        self.groups = [Group(tuple(("o", a) for a in g.axes), g.labels) for g in labelled.groups]
        self.sizes: dict = {("o", i): d for i, d in enumerate(labelled.shape)}
        self.pending: list[tuple[int, list]] = []  # new axis <- its factors

    def segment(self, old: list[Dim], new: list[Dim]) -> None:
        if len(old) == len(new) == 1:
            self.pending.append((new[0][0], [("o", old[0][0])]))
            return
        cuts = sorted({1, *_suffix_products(old), *_suffix_products(new)})
        if all(hi % lo == 0 for lo, hi in zip(cuts, cuts[1:], strict=False)):
            self._refine(old, new, cuts)
        else:  # no common refinement, as 6 x 4 -> 8 x 3: flatten, then split
            self._flatten(old, new)

    def _refine(self, old: list[Dim], new: list[Dim], cuts: list[int]) -> None:
        tag = old[0][0]
        for k, (lo, hi) in enumerate(zip(cuts, cuts[1:], strict=False)):
            self.sizes["f", tag, k] = hi // lo

        def factors(dims: list[Dim]) -> dict[int, list]:
            found, low = {}, 1
            for axis, d in reversed(dims):
                found[axis] = [("f", tag, k) for k in reversed(range(len(cuts) - 1)) if low <= cuts[k] < low * d]
                low *= d
            return found

        for axis, names in factors(old).items():
            self._split(("o", axis), names)
        self.pending.extend(factors(new).items())

    def _flatten(self, old: list[Dim], new: list[Dim]) -> None:
        flat = ("flat", old[0][0])
        if not self._merge([("o", a) for a, _ in old], flat):
            return
        for axis, d in new:
            self.sizes["n", axis] = d
        self._split(flat, [("n", a) for a, _ in new])

    def _split(self, name: tuple, into: list) -> None:
        for i, group in enumerate(self.groups):
            if name not in group.axes:
                continue
            p = group.axes.index(name)
            shape = group.labels.shape
            labels = group.labels.reshape(shape[:p] + tuple(self.sizes[f] for f in into) + shape[p + 1 :])
            self.groups[i] = Group(group.axes[:p] + tuple(into) + group.axes[p + 1 :], labels)

    def _merge(self, names: list, new: tuple) -> bool:
        """Join `names` into the one axis `new`; False when none of them carries labels."""
        touched = [g for g in self.groups if any(x in names for x in g.axes)]
        self.sizes[new] = int(np.prod([self.sizes[x] for x in names]))
        if not touched:
            return False
        others = list(dict.fromkeys(x for g in touched for x in g.axes if x not in names))
        joint = self.relations.join([*others, *names], self.sizes, touched)
        labels = joint.labels.reshape((*joint.labels.shape[: len(others)], self.sizes[new]))
        self.groups = [g for g in self.groups if not any(g is t for t in touched)]
        self.groups.append(Group((*others, new), labels))
        return True

    def finish(self, shape: tuple[int, ...]) -> LabelledType:
        for axis, names in self.pending:
            if len(names) > 1:
                self._merge(names, ("n", axis))
                continue
            self.sizes["n", axis] = self.sizes[names[0]]
            self.groups = [g.renamed({**{x: x for x in g.axes}, names[0]: ("n", axis)}) for g in self.groups]
        groups = (Group(tuple(x[1] for x in g.axes), g.labels) for g in self.groups)
        return LabelledType(shape, tuple(_separated(g) for g in groups))


def _separated(group: Group) -> Group:
    """Undo a tag: an axis that only tells the tags apart is the inert axis that was flattened in, alone again."""
    tags = tag_of(group.labels)
    for p in range(len(group.axes)) if tags.any() else ():
        slices = np.moveaxis(tags, p, 0).reshape(tags.shape[p], -1)  # [d, rest]
        labels = np.moveaxis(label_of(group.labels), p, 0)
        alone = (slices == slices[:, :1]).all() and len(np.unique(slices[:, 0])) == len(slices)
        if alone and (labels == labels[0]).all():
            return Group(group.axes[:p] + group.axes[p + 1 :], labels[0])
    return group
