"""CCA, optimal transport and optimal pairing, against closed forms and brute force; greedy soups."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from oracles import features, moments_of, onehot, random_correlation, slots_of, two
from scipy.optimize import linprog
from torch import nn

import fxzip
from fxzip import CCA, InputError, Pair, Permute, Transport, Unmerge, Zip, greedy_soup
from fxzip.match.matching import Affinity
from fxzip.match.pair import pairing
from fxzip.match.transport import sinkhorn

# --- CCA


def test_cca_undoes_any_invertible_map():
    x = features(6, 1, relu=False).double()
    turn = (torch.randn(6, 6, generator=torch.Generator().manual_seed(2)) + 3 * torch.eye(6)).double()
    found = CCA(ridge=0.0)(moments_of(x, x @ turn.T), 6)
    torch.testing.assert_close(found.blocks_merge(1) * 2, turn.double().inverse(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.blocks_unmerge(1), turn.double(), atol=1e-4, rtol=1e-4)
    assert found.quality == pytest.approx(1, abs=1e-6) and found.baseline < 0.99


def test_cca_equals_the_papers_formula():
    """T = P_0^-T P_1^T with the canonical directions from the generalised eigenproblem."""
    m = two(5, 3)
    s = m.covariance()
    a, b, ab = s[:5, :5], s[5:, 5:], s[:5, 5:]
    values, left = torch.linalg.eig(torch.linalg.solve(a, ab @ torch.linalg.solve(b, ab.T)))
    order = values.real.argsort(descending=True)
    left = left.real[:, order]
    left = left / torch.sqrt((left * (a @ left)).sum(0))  # P_0: P^T S_0 P = 1
    right = torch.linalg.solve(b, ab.T @ left)
    right = right / torch.sqrt((right * (b @ right)).sum(0))
    expected = torch.linalg.inv(left).T @ right.T
    torch.testing.assert_close(CCA(ridge=0.0)(m, 5).blocks_merge(1) * 2, expected, atol=1e-7, rtol=1e-7)


def test_cca_of_identical_models_is_their_average():
    x = features(6, 1)
    found = CCA()(moments_of(x, x, x), 6)
    torch.testing.assert_close(found.merge, torch.eye(6).double().repeat(1, 3) / 3, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.unmerge, torch.eye(6).double().repeat(3, 1), atol=1e-9, rtol=0)
    assert np.isnan(CCA()(moments_of(x), 6).quality)


# --- optimal transport


@pytest.mark.parametrize("regularise", [0.1, 0.5])
def test_sinkhorn_is_the_optimal_soft_coupling(regularise):
    """Its marginals are right, and log T - score / regularise is a sum of a row and a column term (KKT)."""
    score = random_correlation(8, 1)[:4, 4:]
    t = sinkhorn(score, regularise)
    np.testing.assert_allclose(t.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(t.sum(1), 1, atol=1e-6)
    with np.errstate(divide="ignore"):
        rest = np.log(t) - score / regularise
    np.testing.assert_allclose(rest - rest[:1] - rest[:, :1] + rest[0, 0], 0, atol=1e-6)


def test_with_little_regularisation_transport_solves_the_linear_program():
    score = random_correlation(8, 5)[:4, 4:]
    rows = np.concatenate([np.kron(np.eye(4), np.ones(4)), np.kron(np.ones(4), np.eye(4))])
    best = linprog(-score.reshape(-1), A_eq=rows, b_eq=np.ones(8))
    assert (sinkhorn(score, 2e-3) * score).sum() == pytest.approx(-best.fun, abs=5e-3)


def test_transport_of_a_permuted_copy_is_nearly_the_permutation():
    x = features(9, 2, relu=False)
    p = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    found = Transport(1e-3)(moments_of(x, x[:, p]), 9)
    torch.testing.assert_close(found.blocks_unmerge(1), onehot(p, 9), atol=1e-6, rtol=0)
    soft = Transport(0.3)(moments_of(x, x[:, p]), 9)
    torch.testing.assert_close(soft.merge.sum(1), torch.ones(9).double())
    assert 0.2 < float(soft.blocks_unmerge(1)[onehot(p, 9) > 0].mean()) < 0.99
    assert np.isnan(Transport()(moments_of(x), 9).quality)


# --- optimal pairing


def best_pairing(score, alone):
    """The largest sum over all ways to pair, by trying all."""
    n = len(score)
    return max(
        sum(score[p[2 * k], p[2 * k + 1]] for k in range((n - alone) // 2)) for p in permutations(range(n))
    )


@pytest.mark.parametrize("n, alone", [(2, 0), (4, 0), (6, 0), (6, 2), (5, 1), (5, 3), (4, 4)])
def test_pairing_equals_brute_force(n, alone):
    for seed in range(4):
        score = random_correlation(n, seed)
        pairs = pairing(score, alone, n)
        assert len(pairs) == (n - alone) // 2 and len({f for p in pairs for f in p}) == n - alone
        assert sum(score[a, b] for a, b in pairs) == pytest.approx(best_pairing(score, alone))


def test_pairing_takes_two_features_of_one_model():
    score = np.eye(4)
    score[0, 1] = score[1, 0] = score[2, 3] = score[3, 2] = 0.9
    found = Pair()(Affinity((2, 2), score), 2)
    assert found.unmerge.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_pairing_gains_on_permutations_and_loses_little_with_few_neighbours():
    m = two(24, 4)
    found = {k: Pair(k)(m, 24) for k in (6, 48)}
    total = {k: float(torch.trace(f.merge @ m.correlation() @ f.merge.T)) for k, f in found.items()}
    aligned = Permute()(m, 24)
    assert total[48] >= total[6] > 0.95 * total[48]
    assert total[48] > float(torch.trace(aligned.merge @ m.correlation() @ aligned.merge.T))


def test_pairing_of_widths():
    m = two(6)
    assert Pair()(m, 9).merge.shape == (9, 12) and torch.equal(Pair()(m, 12).merge, torch.eye(12).double())
    with pytest.raises(InputError, match=r"pair: the width must be in 1..12, not 0"):
        Pair()(m, 0)


def test_four_models_are_paired_in_rounds():
    x = features(5, 1, relu=False)
    found = Pair()(moments_of(x, x[:, [3, 1, 0, 4, 2]], x, x), 5)
    assert torch.equal(found.unmerge.sum(0), torch.full((5,), 4.0).double())
    assert found.blocks_unmerge(1).argmax(1).tolist() == [3, 1, 0, 4, 2] and found.quality == pytest.approx(1)


# --- any merge with the best unmerge


def test_the_best_unmerge_is_the_regression_on_the_merged_features():
    x, y = features(8, 1, relu=False), features(8, 2, relu=False)
    m = moments_of(x, y)
    both = torch.cat([x, y], 1)
    plain, found = Zip(beta=1.0)(m, 8), Unmerge(Zip(beta=1.0), ridge=0.0)(m, 8)
    assert torch.equal(found.merge, plain.merge) and not torch.equal(found.unmerge, plain.unmerge)
    centred = both - both.mean(0)
    oracle = torch.linalg.lstsq(centred @ plain.merge.T.to(both), centred).solution.T
    torch.testing.assert_close(found.unmerge, oracle.double(), atol=1e-5, rtol=1e-4)


def test_copies_are_unmerged_as_copies():
    x = features(6, 3)
    m = moments_of(x, x[:, [3, 1, 0, 5, 4, 2]])
    assert torch.equal(Unmerge(Permute())(m, 6).unmerge, Permute()(m, 6).unmerge)


@pytest.mark.parametrize("first", [True, False], ids=["narrow first", "wide first"])
def test_a_narrower_model_maps_into_the_widest(first):
    """Features that the narrow model shares with the wide one meet theirs, wherever it stands."""
    wide = features(7, 1)
    parts = [wide[:, [5, 0, 3, 6]], wide][:: 1 if first else -1]
    narrow, other = (0, 1) if first else (1, 0)
    for matcher in (CCA(ridge=1e-6), Transport(0.005)):
        found = matcher(moments_of(*parts), 7)
        assert found.sizes == tuple(p.shape[1] for p in parts)
        assert torch.equal(found.blocks_merge(other) * 2, torch.eye(7, dtype=torch.float64))
        assert found.blocks_unmerge(narrow).argmax(1).tolist() == [5, 0, 3, 6], matcher.name
        if isinstance(matcher, CCA):  # transport has to hand out the weight of the other three
            close = found.blocks_unmerge(narrow) @ wide.double().T - parts[narrow].double().T
            assert close.abs().max() < 1e-2


def test_the_best_unmerge_of_a_matcher_of_weights():
    """U is the regression on what MuDSC merged; M and everything else are its own."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in range(2)]
    x = torch.randn(256, 5)
    moments = fxzip.collect(nets, [x], progress=False)
    spaces = fxzip.inspect(nets[0], x[:2])
    weights = fxzip.match.Weights.of([n.state_dict() for n in nets], list(spaces))
    plain, found = (
        fxzip.match.match(spaces, moments, m, models=2, weights=weights)["s0"]
        for m in (fxzip.MuDSC(), Unmerge(fxzip.MuDSC(), ridge=0.0))
    )
    assert torch.equal(found.merge, plain.merge)
    torch.testing.assert_close(found.unmerge, fxzip.match.optimal_unmerge(plain.merge, moments["s0"], 0.0))


def test_settings_are_refused():
    with pytest.raises(InputError, match="Unmerge: ridge must be 0 or more, not -1"):
        Unmerge(ridge=-1)
    with pytest.raises(InputError, match="CCA: ridge must be 0 or more, not -1"):
        CCA(-1)
    with pytest.raises(InputError, match="Transport: regularise must be above 0, not 0; use 'permute'"):
        Transport(0)
    with pytest.raises(InputError, match="Pair: neighbours must be 1 or more, not 0"):
        Pair(0)


def test_mudsc_takes_them_where_similarities_will_do():
    m = two(6, 1)
    for matcher in (Pair(), Transport()):
        mixed = fxzip.MuDSC(0.5, matcher).affinity(two(6, 2), m)
        assert fxzip.MuDSC(0.5, matcher)(mixed, 6).width == 6  # type: ignore[arg-type]
    slots_of(fxzip.Rebasin()(m, 6), 1)


# --- soups


def linear(*weights: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(weights)[:, None])
        net[1].weight.fill_(1)
    return net


def test_a_greedy_soup_keeps_what_helps():
    """The function is the sum of the first layer's weights: 2 is wanted; 1.7 + 2.3 help each other, 5 does not."""
    nets = [linear(5, 0, 0), linear(1.7, 0, 0), linear(0, 2.4, 0)]
    x = torch.ones(4, 1)
    seen = []

    def score(net: nn.Module) -> float:
        seen.append(float(net(x).detach().mean()))
        return -abs(seen[-1] - 2)

    soup, kept = greedy_soup(nets, score, iter([x]), verify=False)  # what can be read once is kept
    assert kept == (1, 2) and float(soup(x).detach().mean()) == pytest.approx(2.05, abs=1e-5)
    assert len(seen) == 3 + 2  # every model, then every trial


def test_a_greedy_soup_is_refused_without_models_or_with_heads():
    with pytest.raises(InputError, match="greedy_soup: no models; pass a list of networks for one task"):
        greedy_soup([], lambda m: 0.0)
    with pytest.raises(InputError, match="heads= is always 'average' here"):
        greedy_soup([linear(1, 1, 1)], lambda m: 0.0, heads="separate")
