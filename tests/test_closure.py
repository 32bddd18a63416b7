"""Two partitions of one family's features: what follows does not depend on which of them comes first."""

from __future__ import annotations

import numpy as np
import pytest

from fxzip.infer.closure import Closure, Table
from fxzip.infer.components import components
from fxzip.infer.hashing import U64

# Features (g, a, b) of 2 x 2 x 2 are the labels 0..7; parents by (g, a) 8..11, by (g, b) 12..15; two labels of g are
# 16, 17, and two more 18, 19. Every label is an atom of its own; families in this order.
FAMILY = np.repeat([0, 1, 2, 3, 4], [8, 4, 4, 2, 2])
G, A, B = np.unravel_index(np.arange(8), (2, 2, 2))
BY_A, BY_B = 8 + 2 * G + A, 12 + 2 * G + B


def closed(*columns: np.ndarray, **tables: np.ndarray) -> tuple[set, set, list]:
    """(one-to-one pairs, child-parent pairs, sizes of new blocks). tables: a family's letter and its parents."""
    first = {"p": (1, 8), "q": (2, 12)}
    made = {0: Table(np.arange(8), [(U64(k), c) for k, c in enumerate(columns)])}
    for k, (name, parents) in enumerate(tables.items()):
        family, start = first[name]
        made[family] = Table(np.arange(start, start + 4), [(U64(100 + k), parents)])
    closure = Closure(np.arange(20), FAMILY, made, 20)
    closure.run()
    assert closure.changed == bool(closure.one or closure.many)  # a block comes with its edges
    one = {(int(min(x)), int(max(x))) for u, v, _ in closure.one for x in zip(u, v, strict=True)}
    many = {(int(a), int(b)) for u, v, _ in closure.many for a, b in zip(u, v, strict=True)}
    return one, many, closure.blocks


BLOCK, OTHER = np.array([16, 16, 17, 17]), np.array([18, 18, 19, 19])
P_IN_BLOCK = {(8, 16), (9, 16), (10, 17), (11, 17)}
Q_IN_BLOCK = {(12, 16), (13, 16), (14, 17), (15, 17)}
NEW = {(8, 20), (9, 20), (10, 21), (11, 21), (12, 20), (13, 20), (14, 21), (15, 21)}


@pytest.mark.parametrize("columns", [(BY_A, BY_B), (BY_B, BY_A)], ids=["p, q", "q, p"])
@pytest.mark.parametrize(
    "tables, wanted",
    [
        ({}, (set(), NEW, [2])),
        ({"p": BLOCK}, (set(), Q_IN_BLOCK, [])),
        ({"q": BLOCK}, (set(), P_IN_BLOCK, [])),
        ({"p": BLOCK, "q": BLOCK}, (set(), set(), [])),
        ({"p": BLOCK, "q": OTHER}, ({(16, 18), (17, 19)}, set(), [])),
    ],
    ids=["no block yet", "of p", "of q", "of both", "two names"],
)
def test_crossing_partitions_have_one_block_above_both(columns, tables, wanted):
    assert closed(*columns, **tables) == wanted


@pytest.mark.parametrize("exchanged", [False, True])
def test_nested_equal_and_independent_partitions(exchanged):
    def found(a: np.ndarray, b: np.ndarray, **tables: np.ndarray) -> tuple[set, set, list]:
        return closed(*((b, a) if exchanged else (a, b)), **tables)

    assert found(BY_A, 16 + G) == (set(), P_IN_BLOCK, [])
    assert found(BY_A, 16 + G, p=BLOCK) == (set(), set(), [])
    assert found(BY_A, 16 + G, p=OTHER) == ({(16, 18), (17, 19)}, set(), [])
    assert found(BY_A, BY_A + 4) == ({(8, 12), (9, 13), (10, 14), (11, 15)}, set(), [])
    assert found(16 + G, 18 + A) == (set(), set(), [])


def test_two_families_get_blocks_of_their_own():
    atoms = np.arange(40)
    family = np.concatenate([FAMILY, 5 + FAMILY])
    columns = [(U64(0), BY_A), (U64(1), BY_B)], [(U64(2), 20 + BY_A), (U64(3), 20 + BY_B)]
    closure = Closure(atoms, family, {0: Table(atoms[:8], columns[0]), 5: Table(20 + atoms[:8], columns[1])}, 40)
    closure.run()
    parents = [set(v.tolist()) for _, v, _ in closure.many]
    assert closure.blocks == [2, 2] and parents == [{40, 41}, {40, 41}, {42, 43}, {42, 43}]
    kinds = [set(k.tolist()) for _, _, k in closure.many]
    assert kinds[0] != kinds[1] and all(len(k) == 1 for k in kinds)


@pytest.mark.parametrize("count, edges", [(1, 0), (7, 3), (60, 40), (60, 400), (2000, 1500), (2000, 2500)])
def test_components_are_numbered_as_scipy_numbers_them(count, edges):
    csgraph, sparse = pytest.importorskip("scipy.sparse.csgraph"), pytest.importorskip("scipy.sparse")
    for seed in range(5):
        left, right = np.random.default_rng(seed).integers(0, count, (2, edges))
        matrix = sparse.coo_matrix((np.ones(edges), (left, right)), shape=(count, count))
        expected, labels = csgraph.connected_components(matrix, directed=False)
        found, number = components(count, left, right)
        assert number == expected and np.array_equal(found, labels)


def test_a_path_in_any_order_is_one_component():
    path = np.random.default_rng(0).permutation(5000)
    assert components(5000, path[:-1], path[1:])[1] == 1
