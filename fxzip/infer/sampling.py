"""Random elements of the group that inference found: on atoms (does the structure hold together?) and
on feature spaces (permutations for every space, consistent with their parents)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..errors import SpaceError
from .solver import Solution
from .spaces import FeatureSpace

_TRIALS = 2


def broken_families(solution: Solution) -> list[int]:
    """Families that no group element extends to: on a cycle of parents, or with rows of parent atoms that a
    random permutation of the parents does not map onto themselves."""
    placed = set(solution.order)
    broken = {f for f, members in enumerate(solution.members) if f not in placed and len(members) > 1}
    for trial in range(_TRIALS):
        rng = np.random.default_rng(trial)
        image = np.arange(len(solution.family))
        for family in solution.order:
            atoms, parents = solution.table(family)
            if len(atoms) == 1 or family in broken:
                continue
            if not parents.shape[1]:
                image[atoms] = atoms[rng.permutation(len(atoms))]
                continue
            rows = lift(parents, image[parents], rng)
            if rows is None:
                broken.add(family)
            else:
                image[atoms] = atoms[rows]
    return sorted(broken)


def lift(parents: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """A random bijection of rows [n] with parents[lift[k]] == target[k]; None when there is none.

    parents, target: int [n, p]; target is `parents` after the parents were permuted.
    """
    n = len(parents)
    _, inverse = np.unique(np.concatenate([parents, target]), axis=0, return_inverse=True)
    have, want = inverse.reshape(-1)[:n], inverse.reshape(-1)[n:]
    shuffled = rng.permutation(n)
    source = shuffled[np.argsort(have[shuffled], kind="stable")]
    goal = np.argsort(want, kind="stable")
    if not np.array_equal(have[source], want[goal]):
        return None
    rows = np.empty(n, np.int64)
    rows[goal] = source
    return rows


def sample(spaces: Iterable[FeatureSpace], rng: np.random.Generator, draws: int = 1) -> dict[str, np.ndarray]:
    """space name -> permutation int64 [n]: new feature k is old feature permutation[k]. A uniformly random
    element of the wreath product: parents first, then freely inside blocks. draws: how often to draw a space that
    would stay as it is (two features do every second time). Raises SpaceError where the spaces are no group."""
    chosen: dict[str, np.ndarray] = {}
    for space in spaces:
        for _ in range(draws):
            chosen[space.name] = _one(space, chosen, rng)
            if (chosen[space.name] != np.arange(space.size)).any():
                break
    return chosen


def _one(space: FeatureSpace, chosen: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    if not space.parents:
        return rng.permutation(space.size)
    table = np.stack([p.index for p in space.parents], 1)  # [n, parents]
    target = np.stack([chosen[p.space][p.index] for p in space.parents], 1)
    rows = lift(table, target, rng)
    if rows is None:
        blocks, held = ", ".join(p.space for p in space.parents), ", ".join(space.parameters) or "no parameters"
        raise SpaceError(
            f"{space.name} ({held}): it cannot follow permutations of its blocks {blocks}, so inference is wrong about"
            " this graph; please report it, and merge a part of the model without these parameters"
        )
    return rows
