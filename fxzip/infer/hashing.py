"""Vectorised 64-bit hashing (splitmix64): colours and edge types are hashes, compared for equality only."""

from __future__ import annotations

import numpy as np

U64 = np.uint64


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, element-wise on uint64."""
    x = x.astype(U64, copy=True)
    x ^= x >> U64(30)
    x *= U64(0xBF58476D1CE4E5B9)
    x ^= x >> U64(27)
    x *= U64(0x94D049BB133111EB)
    x ^= x >> U64(31)
    return x


def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hash of an ordered pair, element-wise."""
    return mix(a * U64(0x9E3779B97F4A7C15) + mix(b + U64(0x632BE59BD9B4E019)))


def multiset(owner: np.ndarray, items: np.ndarray, count: int) -> np.ndarray:
    """uint64 [count]: for every owner a hash of the multiset of its items, independent of their order."""
    total = np.zeros(count, U64)
    np.add.at(total, owner, items)
    return total
