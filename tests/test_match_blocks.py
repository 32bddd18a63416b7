from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from oracles import (
    features,
    moments_of,
    onehot,
    slots_of,
    two,
)

from fxzip.errors import InputError, SpaceError
from fxzip.infer.spaces import FeatureSpace, Parent
from fxzip.match import Average, Permute, Select, Zip, match
from fxzip.match.alignment import Layer, align
from fxzip.match.matching import similarity
from fxzip.measure.moments import SpaceMoments


def space(name, size, *parents, **more):
    return FeatureSpace(name, size, tuple(Parent(p, np.asarray(i)) for p, i in parents), **more)


def scrambled(spaces, seed):
    """A random element of the group: space -> p, where the copy's feature k is the original's p[k]."""
    rng = np.random.default_rng(seed)
    while (element := _scrambled(spaces, rng)) is None:
        pass
    return element


def _scrambled(spaces, rng):
    element = {}
    for s in spaces:
        p = np.empty(s.size, np.int64)
        key = [tuple(int(q.index[k]) for q in s.parents) for k in range(s.size)]
        want = [tuple(int(element[q.space][q.index[k]]) for q in s.parents) for k in range(s.size)]
        for block in set(want):
            here = [k for k in range(s.size) if want[k] == block]
            there = [k for k in range(s.size) if key[k] == block]
            if len(here) != len(there):  # blocks of different sizes
                return None
            p[here] = rng.permutation(there)
        element[s.name] = p
    return element


def copies(spaces, element, without=()):
    result = {}
    for seed, s in enumerate(spaces):
        if s.name not in without:
            x = features(s.size, seed)
            result[s.name] = moments_of(x, x[:, element[s.name]])
    return result


HEADS, DIMS = 3, 4
VIT = (
    space("s0", 10),
    space("s1", HEADS),
    space("s2", HEADS * DIMS, ("s1", np.repeat(range(HEADS), DIMS)), orthogonal_only=True),
    space("s3", HEADS * DIMS, ("s1", np.tile(range(HEADS), DIMS))),  # interleaved heads
)
GROUPED = (
    space("s0", 3),
    space("s1", 4),
    space("s2", 12, ("s0", np.repeat(range(3), 4)), ("s1", np.tile(range(4), 3))),
    space("s3", 6, ("s0", np.repeat(range(3), 2))),
)
NESTED = (
    space("s0", 2),
    space("s1", 6, ("s0", np.repeat(range(2), 3))),
    space("s2", 4),
    space("s3", 24, ("s1", np.repeat(range(6), 4)), ("s2", np.tile(range(4), 6))),
    space("s4", 18, ("s1", np.tile(range(6), 3))),
    space("s5", 12, ("s0", np.repeat(range(2), 6)), ("s1", np.repeat(range(6), 2))),
)
UNEVEN = (
    space("s0", 4),
    space("s1", 11, ("s0", [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])),
)
CASES = {
    "heads": (VIT, ("s1",)),
    "grouped": (GROUPED, ("s0", "s1")),
    "grouped, all measured": (GROUPED, ()),
    "nested": (NESTED, ("s0", "s2")),
    "nested, leaves alone measured": (NESTED, ("s0", "s1", "s2")),
    "uneven": (UNEVEN, ("s0",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("matcher", [Permute(), Zip()], ids=lambda m: m.name)
def test_a_scrambled_copy_is_recovered_exactly(case, seed, matcher):
    spaces, without = CASES[case]
    element = scrambled(spaces, seed)
    found = match(spaces, copies(spaces, element, without), matcher)
    assert list(found) == [s.name for s in spaces]
    for s in spaces:
        assert torch.equal(found[s.name].blocks_merge(0), torch.eye(s.size).double() / 2), s.name
        assert torch.equal(found[s.name].blocks_unmerge(1), onehot(element[s.name], s.size)), s.name
        assert np.isnan(found[s.name].quality) == (s.name in without)


@pytest.mark.parametrize("case", CASES)
def test_average_is_the_identity_everywhere(case):
    spaces, without = CASES[case]
    found = match(spaces, copies(spaces, scrambled(spaces, 1), without), Average())
    for s in spaces:
        assert torch.equal(found[s.name].unmerge, torch.eye(s.size).double().repeat(2, 1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_permute_stays_in_the_group_on_unrelated_models(case, count, seed):
    spaces, without = CASES[case]
    moments = {}
    for k, s in enumerate(spaces):
        if s.name not in without:
            x = features(s.size * count, 100 * seed + k)
            moments[s.name] = moments_of(*x.split(s.size, 1))
    found = match(spaces, moments, Permute())
    for model in range(count):
        slots = {s.name: slots_of(found[s.name], model) for s in spaces}
        if model == 0:
            assert all(np.array_equal(p, np.arange(len(p))) for p in slots.values())
        for s in spaces:
            for parent in s.parents:
                assert np.array_equal(parent.index[slots[s.name]], slots[parent.space][parent.index])


def test_three_scrambled_copies_are_recovered():
    elements = [scrambled(VIT, seed) for seed in (1, 2)]
    moments = {}
    for k, s in enumerate(VIT):
        if s.name != "s1":
            x = features(s.size, k)
            moments[s.name] = moments_of(x, *(x[:, e[s.name]] for e in elements))
    found = match(VIT, moments, Permute())
    for model, element in enumerate(elements, 1):
        for s in VIT:
            assert np.array_equal(slots_of(found[s.name], model), element[s.name])


def test_the_second_parent_is_matched_under_the_first():
    across = np.eye(4) / 2  # features (group, channel) of model 0 against model 1: all stay in place ...
    across[[0, 1, 2, 3], [3, 2, 1, 0]] = (
        0.9  # ... but channels alone would rather swap, with the groups crossed
    )
    both = np.block([[np.eye(4), across], [across.T, np.eye(4)]])
    layers = [
        Layer("g", 2, (2, 2), correlation=np.tile(np.eye(2), (2, 2))),
        Layer("c", 2, (2, 2)),
        Layer("gc", 4, (4, 4), (("g", np.array([0, 0, 1, 1])), ("c", np.array([0, 1, 0, 1]))), both),
    ]
    assert {name: p.tolist() for name, p in align(layers)[1].items()} == {
        "g": [0, 1],
        "c": [0, 1],
        "gc": [0, 1, 2, 3],
    }


@pytest.mark.parametrize("matcher", [Zip(), Select()], ids=lambda m: m.name)
def test_free_matchers_stay_within_matched_blocks(matcher):
    moments = {}
    for k, s in enumerate(VIT):
        if s.name != "s1":
            moments[s.name] = two(s.size, k)
    found = match(VIT, moments, matcher)
    heads = np.concatenate([slots_of(found["s1"], i) for i in range(2)])
    block = VIT[3].parents[0].index
    allowed = torch.from_numpy(block[:, None] == heads[np.concatenate([block, block + HEADS])][None, :])
    assert not found["s3"].merge[~allowed].any() and not found["s3"].unmerge[~allowed.T].any()
    assert torch.linalg.matrix_rank(found["s3"].merge) == HEADS * DIMS
    slots_of(found["s2"], 1)  # orthogonal_only: still a permutation
    assert torch.equal(found["s0"].merge, matcher(moments["s0"], 10).merge)


def test_widths():
    spaces = (VIT[0], VIT[1], VIT[2], space("s3", 12, ("s1", np.repeat(range(3), 4))))
    moments = {s.name: two(s.size, k) for k, s in enumerate(spaces) if s.name != "s1"}
    found = match(spaces, moments, Zip(), {"s0": 13, "s3": 18})
    assert found["s0"].merge.shape == (13, 20) and found["s3"].merge.shape == (18, 24)
    head = slots_of(found["s1"], 1)
    for a in range(3):
        touched = found["s3"].blocks_merge(1)[6 * a : 6 * a + 6].abs().sum(0).nonzero().flatten() // 4
        assert {int(head[t]) for t in touched} == {a}
    for name, width, message in [
        ("s1", 4, "s1: its width 3 cannot become 4: it groups other features"),
        ("s2", 15, "s2: its width 12 cannot become 15: only permutations fit here"),
        ("s3", 14, "s3: 3 x 4 cannot get width 14: .* multiple of 3"),
        ("s0", 21, "s0: zip: the width must be in 1..20, not 21"),
    ]:
        with pytest.raises(SpaceError, match=message):
            match(spaces, moments, Zip(), {name: width})
    with pytest.raises(SpaceError, match="s3: 3 x 4 cannot get width 15: that takes contiguous blocks"):
        match(VIT, moments, Zip(), {"s3": 15})
    with pytest.raises(InputError, match="no space 's9'; there are"):
        match(spaces, moments, Zip(), {"s9": 1})


def test_spaces_without_moments_keep_the_identity():
    found = match((space("s0", 3), *GROUPED[1:2]), {}, Zip(), models=2)
    for m in found.values():
        assert torch.equal(m.unmerge, torch.eye(m.width).double().repeat(2, 1)) and np.isnan(m.quality)
    with pytest.raises(InputError, match="the number of models must come from"):
        match((space("s0", 3),), {}, Zip())
    with pytest.raises(SpaceError, match="s0: without moments its width 3 cannot become 4"):
        match((space("s0", 3),), {}, Zip(), {"s0": 4}, models=2)


def test_orthogonal_roots_are_permuted_and_unequal_blocks_refused():
    x = features(14, 0)
    found = match((space("s0", 7, orthogonal_only=True),), {"s0": moments_of(x[:, :7], x[:, 7:])}, Zip())
    slots_of(found["s0"], 1)
    moments = {"s1": SpaceMoments((11, 12), 1.0, torch.zeros(23), torch.eye(23))}
    with pytest.raises(SpaceError, match=r"s1: the models have \(11, 12\) features here, .* needs 11"):
        match(UNEVEN, moments, Permute())


def test_of_a_family_one_similarity_is_held_at_a_time(monkeypatch):
    """Of wide grouped convolutions each takes gigabytes."""
    made: list[weakref.ref] = []
    held: list[int] = []

    def watched(seen):
        held.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(value := similarity(seen)))
        return value

    monkeypatch.setattr("fxzip.match.blocks.similarity", watched)
    spaces = (space("g", 4), *(space(n, 16, ("g", np.arange(16) // 4)) for n in "ab"))
    element = scrambled(spaces, 0)
    found = match(spaces, copies(spaces, element, without=("g",)), Permute())
    assert len(held) >= 2 and max(held) == 0
    for name, p in element.items():
        assert slots_of(found[name], 1).tolist() == p.tolist()
