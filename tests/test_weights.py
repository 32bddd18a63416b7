"""Matching by weights: Git Re-Basin and MuDSC, against brute force, and what may be asked of them."""

from __future__ import annotations

import inspect
from itertools import permutations

import numpy as np
import pytest
import torch
from merging import STRUCTURES, far, outputs, scrambled
from oracles import slots_of, two
from torch import nn
from toys import Residual, image, randomise

import fxzip
from fxzip import C2M3, InputError, MuDSC, Permute, Rebasin, Select, Zip
from fxzip.infer import analyse
from fxzip.match import Weights, match, similarity
from fxzip.match.matching import Affinity
from fxzip.measure.moments import SpaceMoments
from fxzip.trace import bind, trace

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def mlp(seed: int, width: int = 4) -> nn.Module:
    layers = nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    return randomise(nn.Sequential(*layers), seed)


def merge(models, method, loader=None, **options):
    return fxzip.merge(models, loader, method=method, progress=False, verify=False, **options)


def seen(models, args):
    """(spaces, Weights) of models of one graph."""
    args = bind(args, inspect.signature(models[0].forward))
    spaces = analyse(trace(models[0], args).graph_module, args)
    return list(spaces), Weights.of([dict(m.named_parameters()) for m in models], list(spaces))


def closeness(a: nn.Module, b: nn.Module, p, q) -> float:
    """Inner product of the hidden layers' weights, b's units in the order p (first layer) and q (second)."""
    (w1, b1, w2, b2, w3, _), (v1, c1, v2, c2, v3, _) = ([t.detach() for t in m.parameters()] for m in (a, b))
    p, q = list(p), list(q)
    pairs = (w1, v1[p]), (b1, c1[p]), (w2, v2[q][:, p]), (b2, c2[q]), (w3, v3[:, q])
    return sum(float((x * y).sum()) for x, y in pairs)


def orders(found, spaces):
    """The order in which model 1's units stand in the merged network, per space."""
    return [np.argsort(slots_of(found[s.name], 1)) for s in spaces]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("start", ["sorted", "order"])
def test_rebasin_stops_where_no_space_can_be_ordered_better(seed, start):
    """Brute force over the orders of every single space, as coordinate descent promises; and the figure is right."""
    a, b = mlp(2 * seed), mlp(2 * seed + 1)
    spaces, weights = seen([a, b], X)
    found = match(spaces, {}, Rebasin(start=start), weights=weights)
    p, q = orders(found, spaces)
    best = closeness(a, b, p, q)
    assert weights.agreement(found) == pytest.approx(best, rel=1e-5)
    every = [list(r) for r in permutations(range(4))]
    assert best >= max(*(closeness(a, b, r, q) for r in every), *(closeness(a, b, p, r) for r in every)) - 1e-5


def test_both_starts_come_near_the_best_of_all_orders():
    """Over all pairs of orders of both layers: how far the two starts get on unrelated networks."""
    every = [list(r) for r in permutations(range(4))]
    share = {"sorted": [], "order": []}
    for seed in range(6):
        a, b = mlp(2 * seed), mlp(2 * seed + 1)
        spaces, weights = seen([a, b], X)
        most = max(closeness(a, b, p, q) for p in every for q in every)
        for start, got in share.items():
            got.append(weights.agreement(match(spaces, {}, Rebasin(start=start), weights=weights)) / most)
            assert got[-1] <= 1 + 1e-6
    assert min(np.mean(share["sorted"]), np.mean(share["order"])) > 0.85


@pytest.mark.parametrize("example", STRUCTURES, ids=str)
def test_a_scrambled_copy_is_recovered_without_data(example):
    model, twin, batches = scrambled(example)
    two_rows = tuple(x[:2] for x in batches[0])
    for method in (Rebasin(), Rebasin(start="order"), C2M3()):
        zipped = merge([model, twin], method, example_inputs=two_rows)
        for output in outputs(zipped, *batches[0]):
            assert far(output, outputs(model, *batches[0])) < 1e-5, f"{method}\n{fxzip.report(zipped)}"


@pytest.mark.parametrize("method", ["rebasin", "c2m3"])
def test_three_copies_are_recovered_without_data_in_any_order(method):
    model = randomise(Residual()).eval()
    x = image()[0]
    copies = [model, fxzip.scramble(model, x, seed=1), fxzip.scramble(model, x, seed=2)]
    for order in ([0, 1, 2], [2, 0, 1]):
        zipped = merge([copies[i] for i in order], method, example_inputs=x)
        assert all(far(output, outputs(model, x)) < 1e-5 for output in outputs(zipped, x))


@pytest.mark.parametrize("models", [2, 3])
def test_sweeps_never_lower_the_agreement(models):
    nets = [randomise(Residual(), seed) for seed in range(models)]
    spaces, weights = seen(nets, image()[0])
    runs = [match(spaces, {}, Rebasin(sweeps=k, start="order"), weights=weights, seed=3) for k in range(1, 8)]
    value = [weights.agreement(m) for m in runs]
    assert value == sorted(value) and value[-1] > value[0]
    assert "not settled (sweeps=1)" in runs[0].notices[0] and "not settled" not in runs[-1].notices[0]
    assert weights.agreement(runs[-1]) <= weights.scale()


def test_the_report_says_how_it_went():
    a, b = mlp(0, 16), mlp(1, 16)
    report = fxzip.report(merge([a, b], "rebasin", example_inputs=X))
    assert all(-1 <= row.baseline < row.quality < 1 for row in report.spaces)
    notes = report.notices
    assert any(n.startswith("rebasin: weights agree to 0.") and n.endswith(" sweeps") for n in notes)


def test_the_seed_is_for_the_order_of_sweeps_alone():
    """With a single space there is nothing to order; with two, some seed goes another way."""

    def kinds(nets: list[nn.Module]) -> int:
        seeds = (merge(nets, Rebasin(start="order"), example_inputs=X, seed=s).state_dict() for s in range(4))
        return len({b"".join(t.numpy().tobytes() for t in state.values()) for state in seeds})

    single = [randomise(nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)), seed) for seed in (0, 1)]
    assert kinds(single) == 1 < kinds([mlp(0, 16), mlp(1, 16)])


def test_c2m3_comes_near_the_best_of_all_orders_and_says_how_it_went():
    every = [list(r) for r in permutations(range(4))]
    share = []
    for seed in range(5):
        a, b = mlp(2 * seed), mlp(2 * seed + 1)
        spaces, weights = seen([a, b], X)
        found = match(spaces, {}, C2M3(), weights=weights)
        p, q = orders(found, spaces)
        assert weights.agreement(found) == pytest.approx(closeness(a, b, p, q), rel=1e-5)
        share.append(weights.agreement(found) / max(closeness(a, b, p, q) for p in every for q in every))
    assert max(share) <= 1 + 1e-6 and np.mean(share) > 0.85
    assert found.notices[0].startswith("c2m3: weights agree to 0.") and found.notices[0].endswith(" rounds")
    assert "not settled (rounds=1)" in match(spaces, {}, C2M3(1), weights=weights).notices[0]


def test_c2m3_gains_with_every_round():
    nets = [randomise(Residual(), seed) for seed in range(3)]
    spaces, weights = seen(nets, image()[0])
    notes = [match(spaces, {}, C2M3(k), weights=weights).notices[0] for k in (1, 2, 4)]
    relaxed = [float(n.split("relaxed ")[1][:6]) for n in notes]
    assert relaxed == sorted(relaxed) and relaxed[-1] > relaxed[0]


# --- weights as features see them


def test_moments_do_not_depend_on_the_order_of_what_is_not_placed():
    model = randomise(Residual()).eval()
    spaces, weights = seen([model, fxzip.scramble(model, image()[0], seed=1)], image()[0])
    for space in spaces:
        moments = weights.moments(space, {})
        assert moments is not None
        power = moments.second.diagonal().reshape(2, -1).sort(1).values
        torch.testing.assert_close(power[0], power[1])
        assert similarity(moments)[: space.size, space.size :].max(1) == pytest.approx(1)


def test_neighbours_are_read_in_merged_coordinates():
    """By hand: rows of a hidden layer, the columns of model 1 in model 0's order."""
    a, b = mlp(0), mlp(1)
    spaces, weights = seen([a, b], X)
    found = match(spaces, {}, Rebasin(), weights=weights)
    p, _ = orders(found, spaces)
    second = spaces[1]
    moments = weights.moments(second, found)
    assert moments is not None
    rows = [
        torch.cat([m[2].weight[:, o], m[2].bias[:, None], m[4].weight.T], 1).double().detach()  # type: ignore[index]
        for m, o in ((a, range(4)), (b, p))
    ]
    both = torch.cat(rows)
    torch.testing.assert_close(moments.second * moments.count, both @ both.T)
    torch.testing.assert_close(moments.mean * moments.count, both.sum(1))


def test_weights_of_several_shapes_are_refused():
    with pytest.raises(InputError, match=r"0.weight: shapes \[\[4, 5\], \[8, 5\]\] differ"):
        spaces, _ = seen([mlp(0), mlp(0)], X)
        Weights.of([dict(m.named_parameters()) for m in (mlp(0), mlp(0, 8))], spaces)


# --- MuDSC


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_mudsc_mixes_the_two_similarities(balance):
    activations, weights = two(6, 1), two(6, 2)
    mixed = MuDSC(balance).affinity(weights, activations)
    assert mixed is not None
    expected = balance * similarity(activations) + (1 - balance) * similarity(weights)
    np.testing.assert_allclose(mixed.values, expected)
    assert torch.equal(MuDSC(balance)(mixed, 6).merge, Zip(beta=1.0)(Affinity((6, 6), expected), 6).merge)
    assert MuDSC().affinity(None, None) is None
    alone = MuDSC(balance).affinity(None, activations)
    assert alone is not None and np.array_equal(alone.values, similarity(activations))


@pytest.mark.parametrize("matcher", [Permute(), Zip(beta=1.0)], ids=lambda m: m.name)
def test_mudsc_with_all_weight_on_activations_is_its_matcher(matcher):
    models = [randomise(Residual(), seed).eval() for seed in (1, 2)]
    batch = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    one, other = (merge(models, m, [batch]).state_dict() for m in (MuDSC(1.0, matcher), matcher))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("matcher", [Permute(), Zip(beta=1.0)], ids=lambda m: m.name)
@pytest.mark.parametrize("example", STRUCTURES[1::6], ids=str)
def test_mudsc_recovers_a_scrambled_copy(example, matcher):
    model, twin, batches = scrambled(example)
    for balance in (0.0, 0.5):
        zipped = merge([model, twin], MuDSC(balance, matcher), batches)
        for output in outputs(zipped, *batches[0]):
            assert far(output, outputs(model, *batches[0])) < 1e-4, str(fxzip.report(zipped))


def test_the_report_says_how_mudsc_went():
    batch = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    nets = [randomise(Residual(), seed).eval() for seed in (1, 2)]
    notes = fxzip.report(merge(nets, MuDSC(sweeps=1), [batch])).notices
    assert notes[0].startswith("mudsc: merged features are alike by ") and "not settled (sweeps=1)" in notes[0]


def test_solve_takes_a_matching_by_weights():
    models = [randomise(Residual(), seed).eval() for seed in (1, 2)]
    batch = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    notices = fxzip.report(merge(models, fxzip.Solve(matcher=Rebasin()), [batch])).notices
    assert any(n.startswith("rebasin: weights agree") for n in notices)


# --- refusals


def test_settings_and_missing_weights_are_refused():
    with pytest.raises(InputError, match="rebasin compares weights; pass weights=Weights.of"):
        match([], {}, Rebasin())
    with pytest.raises(InputError, match="Rebasin: sweeps must be 1 or more, not 0"):
        Rebasin(sweeps=0)
    with pytest.raises(InputError, match="Rebasin: start must be one of .'sorted', 'order'., not 'random'"):
        Rebasin(start="random")
    with pytest.raises(InputError, match="C2M3: rounds must be 1 or more, not 0"):
        C2M3(0)
    with pytest.raises(InputError, match="match: c2m3 keeps the models' widths; leave out widths, or use 'zip'"):
        match([], {}, C2M3(), {"s0": 3}, weights=Weights({}, {}))
    with pytest.raises(InputError, match=r"MuDSC: balance must be in \[0, 1\], not 2"):
        MuDSC(balance=2)
    with pytest.raises(InputError, match="MuDSC: sweeps must be 1 or more, not -1"):
        MuDSC(sweeps=-1)
    with pytest.raises(InputError, match=r"must work on similarities, as Permute\(\) does, not Select"):
        MuDSC(matcher=Select())
    with pytest.raises(InputError, match="loader is missing: this method reads batches"):
        merge([mlp(0), mlp(1)], "mudsc", example_inputs=X)


@pytest.mark.parametrize("method", ["rebasin", "c2m3"])
def test_other_widths_are_refused(method):
    with pytest.raises(InputError, match=f"{method} keeps the models' widths and has no budget"):
        merge([mlp(0, 16), mlp(1, 16)], method, [X], budget=1.5)


def test_rebasin_of_one_space_maximises_inner_products():
    rows = torch.tensor([[1.0, 0], [0, 3.0], [0, 2.0], [1.0, 1.5]]).double()  # correlation would not choose so
    moments = SpaceMoments((2, 2), 2.0, rows.mean(1), rows @ rows.T / 2)
    assert slots_of(Rebasin()(moments, 2), 1).tolist() == [1, 0]
