"""Labels: the type of a tensor says, for every index of every axis group, which feature it is.

A tensor's type is a set of disjoint *axis groups*, each an int64 array of labels over those axes
jointly. Axes in no group are inert: nobody may reorder them. Shape operations act on label arrays
exactly as they act on data, so a `view` that splits heads needs no rule about attention.

A label may carry a *tag* in its upper bits: the index of an inert axis that was flattened together
with the labelled one (C*H*W). `label | tag << TAG_SHIFT` keeps one node per feature, not per pixel.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TAG_SHIFT = 36
_LABEL_MASK = (1 << TAG_SHIFT) - 1

Name = Hashable  # an axis number, or an einsum name


def label_of(array: np.ndarray) -> np.ndarray:
    """The labels without their tags."""
    return array & _LABEL_MASK


def tag_of(array: np.ndarray) -> np.ndarray:
    """The tags: which index of a flattened inert axis each entry stands for (0 where there is none)."""
    return array >> TAG_SHIFT


class Group(NamedTuple):
    """Axes labelled jointly: `labels` has one dimension per entry of `axes`, in that order."""

    axes: tuple
    labels: np.ndarray  # int64

    def aligned(self, names: Sequence[Name]) -> np.ndarray:
        """The labels with dimensions in the order of `names`, 1 where a name is not of this group."""
        order = [self.axes.index(n) for n in names if n in self.axes]
        sizes = [self.labels.shape[self.axes.index(n)] if n in self.axes else 1 for n in names]
        return self.labels.transpose(order).reshape(sizes)

    def renamed(self, mapping: Mapping | Sequence) -> Group:
        return Group(tuple(mapping[a] for a in self.axes), self.labels)


def _contiguous(group: Group) -> Group:
    return Group(tuple(group[0]), np.ascontiguousarray(group[1]))


@dataclass(frozen=True)
class LabelledType:
    """Shape and axis groups of one tensor; groups of a single element are dropped (nothing to reorder). Groups are
    disjoint, but those of the weight of one einsum, which may be (g, o) and (g, c).

    >>> t = LabelledType((2, 4), (Group((1,), np.arange(4)),))
    >>> t.group_of(1).labels.tolist(), t.group_of(0)
    ([0, 1, 2, 3], None)
    """

    shape: tuple[int, ...]
    groups: tuple[Group, ...] = ()
    foreign: bool = False  # inert axes are no places in an input: numbers in the code, features kept in order

    def __post_init__(self) -> None:
        shape = tuple(int(d) for d in self.shape)
        groups = tuple(_contiguous(Group(*g)) for g in self.groups if g[1].size > 1)
        for axes, labels in groups:
            if labels.shape != tuple(shape[a] for a in axes):
                raise ValueError(f"labels {labels.shape} do not fit axes {axes} of a tensor {shape}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "groups", groups)

    def group_of(self, axis: int) -> Group | None:
        """The group that holds `axis`, None when the axis is inert."""
        return next((g for g in self.groups if axis in g.axes), None)

    def mapped(self, shape: Sequence[int], mapping: Mapping[int, int]) -> LabelledType:
        """The same labels on a tensor of `shape` whose axis `mapping[a]` was axis a.

        Axes that `mapping` leaves out must have size 1 in their group and are dropped from it.
        """
        groups = []
        for group in self.groups:
            kept = [a for a in group.axes if a in mapping]
            lost = [group.labels.shape[i] for i, a in enumerate(group.axes) if a not in mapping]
            if any(d != 1 for d in lost):
                raise ValueError(f"axes {group.axes} are labelled jointly; {mapping} drops one of them")
            labels = group.labels.reshape(
                [d for a, d in zip(group.axes, group.labels.shape, strict=True) if a in mapping]
            )
            groups.append(Group(tuple(mapping[a] for a in kept), labels))
        return LabelledType(tuple(shape), tuple(groups))


def inert(shape: Sequence[int]) -> LabelledType:
    """A type without labels."""
    return LabelledType(tuple(shape))
