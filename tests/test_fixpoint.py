"""The solver of inference by itself: on small statements about labels, what it calls interchangeable is so.

Whatever it finds must keep every statement (soundness, on random statements); on those of known symmetry it must find
all of it, which networkx enumerates.
"""

from __future__ import annotations

from collections import Counter

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxzip.errors import SpaceError
from fxzip.infer import solver
from fxzip.infer.relations import Relations
from fxzip.infer.sampling import broken_families, lift
from fxzip.infer.solver import Solution, solve


def statements(r: Relations) -> nx.DiGraph:
    """Labels with their homes and marks, and typed edges."""
    graph = nx.DiGraph()
    for first, count, kind in r.homes:
        graph.add_nodes_from(range(first, first + count), home=kind)
    marks = Counter((int(x), int(k)) for labels, keys in r.marks for x, k in zip(labels, keys, strict=True))
    for x in graph:
        graph.nodes[x]["marks"] = sorted(((k, c) for (y, k), c in marks.items() if y == x))
    for sort, edges in (("one", r.one), ("many", r.many)):
        for u, v, kinds in edges:
            for a, b, k in zip(u.tolist(), v.tolist(), kinds.tolist(), strict=True):
                graph.add_edge(a, b)
                graph[a][b].setdefault("said", []).append((sort, k))
    for _, _, facts in graph.edges(data=True):
        facts["said"].sort()
    return graph


def orbits(graph: nx.DiGraph) -> np.ndarray:
    """Which pairs of labels can take each other's places, by trying."""
    matcher = nx.algorithms.isomorphism.DiGraphMatcher(graph, graph, lambda a, b: a == b, lambda a, b: a == b)
    return of_pairs([[image[x] for x in range(len(graph))] for image in matcher.isomorphisms_iter()])


def of_pairs(images: list[list[int]]) -> np.ndarray:
    """[n, n]: the first of the pairs that these permutations carry into one another. Two sets that only move together
    differ in it from two that move alone, single labels do not."""
    moved = np.array(images)
    n = moved.shape[1]
    to = (moved[:, :, None] * n + moved[:, None, :]).ravel()
    graph = coo_matrix((np.ones(len(to), bool), (np.tile(np.arange(n * n), len(moved)), to)), shape=(n * n, n * n))
    component = connected_components(graph, directed=False)[1]
    return np.unique(component, return_index=True)[1][component].reshape(n, n)


def element(solution: Solution, rng: np.random.Generator) -> dict[int, int]:
    """label -> label: a random element of the group that was found."""
    image = np.arange(len(solution.family))
    for family in solution.order:
        atoms, parents = solution.table(family)
        rows = lift(parents, image[parents], rng)
        assert rows is not None
        image[atoms] = atoms[rows]
    place = {(int(a), int(c)): x for x, (a, c) in enumerate(zip(solution.atom, solution.colour, strict=True))}
    assert len(place) == len(solution.atom)  # no atom has a role twice
    return {x: place[int(image[a]), int(solution.colour[x])] for x, a in enumerate(solution.atom)}


def claimed(r: Relations, draws: int = 60) -> np.ndarray:
    """Orbits of pairs by what the solver found, each element of which must keep every statement."""
    graph, solution = statements(r), solve(r)
    members = [m.tolist() for m in solution.members]
    assert all(members) and sorted(x for m in members for x in m) == list(range(len(solution.family)))
    assert all((solution.family[m] == f).all() for f, m in enumerate(solution.members))
    placed: set[int] = set()
    for family in solution.order:
        _, parents = solution.table(family)
        assert set(solution.family[parents].ravel().tolist()) <= placed
        placed.add(family)
    rng, images = np.random.default_rng(0), []
    for _ in range(draws):
        image = {x: y for x, y in element(solution, rng).items() if x in graph}
        assert all(graph.nodes[x] == graph.nodes[y] for x, y in image.items())
        assert all(graph.get_edge_data(image[a], image[b]) == graph[a][b] for a, b in graph.edges)
        images.append([image[x] for x in range(len(graph))])
    return of_pairs(images)


def features(*sizes: int):
    """Relations, and labels without any statement."""
    r = Relations()
    return r, *(r.fresh((n,)) for n in sizes)


def equal():
    r, a, b = features(3, 3)
    r.one_to_one(a, b, r.types())
    return r


def one_pinned():
    r, a, b = features(3, 3)
    r.one_to_one(a, b, r.types())
    r.mark(a[:1], r.types())
    return r


def blocks():
    """Nine features in three blocks, and one block is told apart."""
    r, a, p = features(9, 3)
    r.many_to_one(a, np.repeat(p, 3), r.types())
    r.mark(p[:1], r.types())
    return r


def one_each():
    """A statement of belonging that is one-to-one."""
    r, a, p, q = features(4, 4, 2)
    r.many_to_one(a, p, r.types())
    r.many_to_one(p, np.repeat(q, 2), r.types())
    return r


def one_each_among_others():
    """Of one type: those that are told apart are alone with their parents, the others are not."""
    r, a, p = features(6, 4)
    r.many_to_one(a, p[[0, 1, 2, 2, 3, 3]], r.types())
    r.mark(a[:2], r.types())
    return r


def grid():
    """Features of two partitions that cross in blocks: 2 x 2 x 2."""
    r, a, p, q = features(8, 4, 4)
    g, i, j = np.unravel_index(np.arange(8), (2, 2, 2))
    r.many_to_one(a, p[2 * g + i], r.types())
    r.many_to_one(a, q[2 * g + j], r.types())
    return r


def two_grids():
    """Two of them with partitions of their own; their blocks are other blocks."""
    r, *parts = features(8, 4, 4, 8, 4, 4)
    g, i, j = np.unravel_index(np.arange(8), (2, 2, 2))
    for a, p, q in (parts[:3], parts[3:]):
        r.many_to_one(a, p[2 * g + i], r.types())
        r.many_to_one(a, q[2 * g + j], r.types())
    return r


def nested():
    r, a, p, q = features(8, 4, 2)
    r.many_to_one(a, np.repeat(p, 2), r.types())
    r.many_to_one(a, np.repeat(q, 4), r.types())
    return r


def named_twice():
    """One partition by two names, and each name is told apart once."""
    r, a, p, q = features(6, 3, 3)
    r.many_to_one(a, np.repeat(p, 2), r.types())
    r.many_to_one(a, np.repeat(q, 2), r.types())
    r.mark(p[:1], r.types())
    return r


def swapped():
    """Pairs that are each other's image: no feature, pinned."""
    r, a = features(4)
    r.one_to_one(a, a[[1, 0, 3, 2]], r.types())
    return r


def swapped_with_a_third():
    """The same, where each pair has a label more, which belongs somewhere, too: tables would be of unequal length."""
    r, a, b, p, q = features(8, 4, 2, 2)
    r.one_to_one(a, a[[1, 0, 3, 2, 5, 4, 7, 6]], r.types())
    r.one_to_one(np.repeat(b, 2), a, r.types())
    r.many_to_one(a, np.repeat(p, 4), r.types())
    r.many_to_one(b, np.repeat(q, 2), r.types())
    return r


def of_one_block():
    """All belong to one label: that says nothing."""
    r, a, p = features(4, 1)
    r.many_to_one(a, np.repeat(p, 4), r.types())
    return r


def apart():
    """Two sets without a statement are not each other."""
    r, _, _ = features(2, 3)
    return r


def along_a_chain():
    """Colours travel: what is told apart at one end is at the other."""
    r, *sets = features(3, 3, 3, 3, 3)
    for a, b in zip(sets, sets[1:], strict=False):
        r.one_to_one(a, b, r.types())
    r.mark(sets[-1][2:], r.types())
    return r


def types_differ():
    """Two statements of other types about two halves."""
    r, a, b = features(4, 4)
    r.one_to_one(a[:2], b[:2], r.types())
    r.one_to_one(a[2:], b[2:], r.types())
    return r


def there_and_back():
    """From a to b for one half, from b to a for the other, of one type."""
    r, a, b = features(4, 4)
    kind = r.types()
    r.one_to_one(a[:2], b[:2], kind)
    r.one_to_one(b[2:], a[2:], kind)
    return r


def marks_differ():
    r, a = features(6)
    kind = r.types(2)
    r.mark(a[:4], kind + np.array([0, 0, 1, 1]))
    return r


WHOLE = [equal, one_pinned, blocks, one_each, one_each_among_others, grid, two_grids, nested, named_twice, of_one_block,
         apart, along_a_chain, types_differ, there_and_back, marks_differ]  # fmt: skip


@pytest.mark.parametrize("made", WHOLE, ids=lambda f: f.__name__)
def test_all_symmetry_is_found(made):
    r = made()
    assert (claimed(r) == orbits(statements(r))).all()


@pytest.mark.parametrize("made", [swapped, swapped_with_a_third], ids=lambda f: f.__name__)
def test_a_feature_in_one_role_twice_is_pinned(made):
    r = made()
    found, n = claimed(r).diagonal(), 8 if made is swapped_with_a_third else 4  # of (x, x): of single labels
    assert all(list(found).count(x) == 1 for x in found[:n])


def test_nothing_is_nothing():
    solution = solve(Relations())
    assert (len(solution.atom), len(solution.family), solution.members, solution.order) == (0, 0, (), ())


def test_families_of_features_and_their_parents():
    solution = solve(blocks())
    sizes = {len(m): f for f, m in enumerate(solution.members)}
    assert sorted(sizes) == [1, 2, 3, 6]  # the block told apart and its three, the two others and their six
    atoms, parents = solution.table(sizes[6])
    assert parents.shape == (6, 1)
    assert Counter(parents[:, 0].tolist()) == dict.fromkeys(solution.members[sizes[2]].tolist(), 3)
    assert solution.table(sizes[2])[1].shape == (2, 0)
    assert sorted(atoms.tolist()) == solution.members[sizes[6]].tolist()


def test_it_refuses_where_it_finds_no_end(monkeypatch):
    monkeypatch.setattr(solver, "MAX_ROUNDS", 1)
    with pytest.raises(SpaceError, match="did not converge in 1 rounds on 18 labels; please report"):
        solve(grid())


@pytest.mark.parametrize("seed", range(60))
def test_random_statements_are_kept(seed):
    """Groups of labels with up to three axes, related as operators relate them; four statements of each."""
    rng = np.random.default_rng(seed)
    r = Relations()
    sets = [r.fresh((2, 2, 2)[: rng.integers(1, 4)]) for _ in range(rng.integers(2, 4))]
    made = 0
    while made < 4:
        a, b = (sets[k] for k in rng.integers(0, len(sets), 2))
        what = rng.integers(0, 5)
        made += 1
        if what == 0 and a.size == b.size and a is not b:
            r.one_to_one(a, b.reshape(a.shape), r.types())
        elif what == 1 and a.ndim > 1:
            axis = int(rng.integers(0, a.ndim))
            block = r.fresh((2,))
            sets.append(block)
            shape = [2 if k == axis else 1 for k in range(a.ndim)]
            r.many_to_one(a, np.broadcast_to(block.reshape(shape), a.shape), r.types())
        elif what == 2:
            r.mark(a.ravel()[: rng.integers(1, a.size + 1)], r.types())
        elif what == 3:
            sets.append(r.copies(a))
        elif what == 4 and a.ndim > b.ndim:
            r.many_to_one(a, np.broadcast_to(b, a.shape), r.types())
        else:
            made -= 1
    assert not broken_families(solve(r))
    claimed(r, 12)
