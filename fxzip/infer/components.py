"""Connected components, of arrays: SciPy has them, but half a second of import with them."""

from __future__ import annotations

import numpy as np


def components(count: int, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, int]:
    """(component of each of `count` nodes, how many there are) of the undirected edges left[k] - right[k].

    Numbered by their first nodes. Roots hook onto the smallest root next to them, paths are halved until flat: a few
    rounds, each over the edges that are left.

    >>> components(5, np.array([3, 1]), np.array([1, 4]))
    (array([0, 1, 2, 1, 1]), 3)
    """
    root = np.arange(count)
    while len(left):
        one, other = root[left], root[right]
        open_ = one != other
        left, right, one, other = left[open_], right[open_], one[open_], other[open_]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while (root != (further := root[root])).any():
            root = further
    firsts, component = np.unique(root, return_inverse=True)
    return component.reshape(-1), len(firsts)
