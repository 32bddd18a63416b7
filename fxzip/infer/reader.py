"""Lookups on a solved inference: which family, which feature, in which role, every label stands for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .engine import Inference
from .hashing import U64, pair
from .labels import label_of, tag_of
from .solver import Solution


@dataclass
class Reader:
    """Working tables shared by the steps below."""

    inference: Inference
    solution: Solution

    def __post_init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}  # family -> feature index of every atom (dense lookup)
        self.order: dict[int, np.ndarray] = {}  # family -> atoms in feature order
        self.lookup = np.full(len(self.solution.family), -1, np.int64)
        self.size = np.array([len(m) for m in self.solution.members])
        self.roles = role_bits(self.inference)

    def atoms(self, labels: np.ndarray) -> np.ndarray:
        return self.solution.atom[label_of(labels)]

    def place(self, family: int, atoms: np.ndarray) -> None:
        """Fix the feature order of a family: as its atoms first appear."""
        self.order[family] = atoms
        self.lookup[atoms] = np.arange(len(atoms))

    def split(self, labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(family, positions [n, t]) for every role a family of more than one plays in these flat labels."""
        solution = self.solution
        bare = label_of(labels)
        atoms, colours = solution.atom[bare], solution.colour[bare]
        families = solution.family[atoms]
        found = []
        for run in _by_value(pair(families.astype(U64), colours)):
            family = int(families[run[0]])
            if self.size[family] < 2:
                continue
            found.append((family, run))
        found.sort(key=lambda item: item[1][0])
        return found

    def positions(self, family: int, labels: np.ndarray, run: np.ndarray) -> np.ndarray | None:
        """int64 [n, t] for the entries `run` of `labels`; None when not every feature occurs equally often."""
        n = int(self.size[family])
        features = self.lookup[self.atoms(labels[run])]
        if len(run) % n or (np.bincount(features, minlength=n) != len(run) // n).any():
            return None
        order = np.lexsort((run, tag_of(labels[run]), features))
        return run[order].reshape(n, -1)


_BITS = {"produce": 1, "consume": 2, "tangled": 4}


def role_bits(inference: Inference) -> np.ndarray:
    """uint8 [labels]: the roles each label plays, those of derived labels passed on to what they stand for."""
    bits = np.zeros(inference.notes.relations.size, np.uint8)
    for labels, role in inference.notes.roles:
        bits[label_of(labels).ravel()] |= _BITS[role]
    for new, source in reversed(inference.notes.relations.derived):
        np.bitwise_or.at(bits, source, bits[label_of(new)])
    return bits


def roles_of(bits: np.ndarray) -> frozenset[str]:
    total = int(np.bitwise_or.reduce(bits))
    return frozenset(r for r, b in _BITS.items() if total & b) or frozenset({"vector"})


def _by_value(keys: np.ndarray) -> list[np.ndarray]:
    """Positions of equal keys, ascending."""
    if len(keys) and (keys == keys[0]).all():  # of most axes
        return [np.arange(len(keys))]
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
