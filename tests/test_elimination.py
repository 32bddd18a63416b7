"""Choosing features: the swept matrix against its definition, exchanges against brute force, the metric of readers."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import fxzip
from fxzip.infer.spaces import FeatureSpace, Segment
from fxzip.match import Read, Select, Suited, Zip, reading
from fxzip.match.elimination import Elimination
from fxzip.measure.moments import SpaceMoments


def problem(n, seed, rank=None):
    """A covariance with features of very different size, and a metric of lower rank."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * n, rank or n)) @ rng.normal(size=(rank or n, n)) * np.exp(rng.normal(size=n))
    reads = rng.normal(size=(n, max(1, n // 3)))
    return np.cov(x.T), reads @ reads.T


def unexplained(covariance, metric, kept):
    """tr(G R), and R, from their definition."""
    kept = list(kept)
    rebuilt = covariance[:, kept] @ np.linalg.inv(covariance[np.ix_(kept, kept)]) @ covariance[kept]
    return float(((covariance - rebuilt) * metric).sum()), covariance - rebuilt


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_swept_is_what_is_defined(seed, block):
    covariance, metric = problem(24, seed)
    before = covariance.copy(), metric.copy()
    search = Elimination(covariance, metric)
    search.fill(9, block)
    search.exchange(4)
    kept = np.array(search.kept)
    rest = np.setdiff1d(np.arange(24), kept)
    inverse = np.linalg.inv(covariance[np.ix_(kept, kept)])
    left, residual = unexplained(covariance, metric, kept)
    assert len(set(kept.tolist())) == 9
    np.testing.assert_allclose(search.left, left, rtol=1e-9)
    np.testing.assert_allclose(search.swept[np.ix_(kept, kept)], -inverse, rtol=1e-6, atol=1e-9 * abs(inverse).max())
    np.testing.assert_allclose(search.swept[np.ix_(kept, rest)], (inverse @ covariance[kept])[:, rest], atol=1e-8)
    np.testing.assert_allclose(search.swept[rest][:, rest], residual[rest][:, rest], atol=1e-9 * residual.max())
    rows = search._rows(np.arange(24))
    np.testing.assert_allclose(search.power, np.einsum("ij,ij->i", rows @ metric, rows), rtol=1e-7)
    assert np.array_equal(covariance, before[0]) and np.array_equal(metric, before[1])


@pytest.mark.parametrize("seed", range(4))
def test_each_step_keeps_the_feature_that_explains_most(seed):
    covariance, metric = problem(14, seed)
    chosen: list[int] = []
    for _ in range(6):
        rest = [j for j in range(14) if j not in chosen]
        chosen.append(min(rest, key=lambda j: unexplained(covariance, metric, [*chosen, j])[0]))
    assert Elimination(covariance, metric).fill(6) == chosen


def test_a_metric_in_blocks_is_the_metric():
    covariance, _ = problem(14, 0)
    blocks = [problem(n, seed)[1] for seed, n in enumerate((5, 8, 1))]
    whole, parted = (Elimination(covariance, m) for m in (scipy.linalg.block_diag(*blocks), blocks))
    for search in (whole, parted):
        search.fill(6, 2)
        search.exchange(2)
    assert whole.kept == parted.kept and len(whole.kept) == 6
    np.testing.assert_allclose(parted.power, whole.power)


def test_select_takes_a_metric_across_models_whole():
    """`Read` says that there is none, but who makes one of their own is not given another."""
    covariance, metric = problem(8, 1)
    moments = Read((4, 4), 100.0, torch.zeros(8).double(), torch.from_numpy(covariance), torch.from_numpy(metric))
    apart = replace(moments, metric=torch.block_diag(moments.metric[:4, :4], moments.metric[4:, 4:]))
    assert [len(Select()._metric(m)) for m in (moments, apart)] == [1, 2]
    for seen, made in ((moments, Select()._metric(moments)), (apart, Select()._metric(apart))):
        scale = seen.covariance().diagonal().sqrt().numpy()
        cost = float((seen.metric * seen.covariance()).sum())
        wanted = 0.7 / cost * seen.metric.numpy() * np.outer(scale, scale) + 0.3 / 8 * np.eye(8)
        np.testing.assert_allclose(scipy.linalg.block_diag(*made), wanted)


def test_exchanges_mend_what_greed_got_wrong():
    gains = 0
    for seed in range(12):
        covariance, metric = problem(10, seed)
        covariance = covariance + 20 * np.outer(covariance[0], covariance[0]) / covariance[0, 0]
        search = Elimination(covariance, metric)
        search.fill(4)
        greedy = search.left
        search.exchange(2)
        best = min(unexplained(covariance, metric, k)[0] for k in combinations(range(10), 4))
        assert best - 1e-9 * greedy <= search.left <= greedy
        gains += search.left < greedy * (1 - 1e-6)
    assert gains >= 2


def test_stops_when_all_is_explained():
    covariance, metric = problem(12, 0, rank=3)
    search = Elimination(covariance, metric)
    assert len(search.fill(8, 2)) == 3 and abs(search.left) < 1e-6 * np.trace(covariance @ metric)
    search.exchange(2)
    assert len(search.kept) == 3


def test_the_metric_is_the_readers_relative_error():
    """Linear and convolutional readers, packed in one space: e^T G e is what their outputs lose."""
    g = torch.Generator().manual_seed(0)
    linear, conv = torch.randn(5, 8, generator=g), torch.randn(3, 4, 1, 1, generator=g)
    space = FeatureSpace("s0", 4, segments=(
        Segment("linear", 1, np.arange(4), frozenset({"consume"})),  # four features at two pixels each
        Segment("linear", 1, np.arange(4, 8), frozenset({"consume"})),
        Segment("conv", 1, np.arange(4), frozenset({"consume"})),
        Segment("bias", 0, np.arange(4), frozenset({"vector"})),
    ))  # fmt: skip
    f = torch.randn(1000, 4, generator=g).double()
    moments = SpaceMoments((4,), 1000.0, f.mean(0), f.T @ f / 1000)
    found = reading(space, moments, [{"linear": linear, "conv": conv, "bias": torch.ones(4)}])
    assert isinstance(found, Read)
    covariance, e = moments.covariance(), torch.randn(4, generator=g).double()
    w = torch.stack([linear[:, :4], linear[:, 4:]]).double()
    taps = torch.einsum("toi,ij,toj->o", w, covariance, w)
    want = ((w @ e).square().sum(0) / taps).mean()
    c = conv.flatten(1).double()
    want = want + ((c @ e).square() / torch.einsum("oi,ij,oj->o", c, covariance, c)).mean()
    torch.testing.assert_close(e @ found.metric @ e, want)
    part = found.restrict([np.array([2, 0])])
    torch.testing.assert_close(part.metric, found.metric[[2, 0]][:, [2, 0]])


def test_keeps_what_is_read():
    """Model b's reader looks at half of its features only; in their own variance all count alike."""
    f = torch.randn(4000, 8, generator=torch.Generator().manual_seed(3)).double()
    seen = SpaceMoments((4, 4), 4000.0, f.mean(0), f.T @ f / 4000)
    space = FeatureSpace("s0", 4, segments=(Segment("w", 1, np.arange(4), frozenset({"consume"})),))
    weights = [{"w": torch.eye(4)}, {"w": torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0])) * 5}]
    kept = Select()(reading(space, seen, weights), 6).merge.argmax(1)
    assert sorted(kept.tolist()) == [0, 1, 2, 3, 4, 6]


def test_readers_of_a_narrower_model_are_those_of_its_own_features():
    space = FeatureSpace("s0", 3, segments=(Segment("w", 1, np.arange(3), frozenset({"consume"})),))
    seen = SpaceMoments((3, 2), 10.0, torch.zeros(5), torch.eye(5))
    weights = [{"w": torch.diag(torch.tensor([1.0, 2.0, 3.0]))}, {"w": torch.diag(torch.tensor([4.0, 0.0, 5.0]))}]
    found = reading(space, seen, weights, {"s0": (np.arange(3), np.array([2, 0]))})
    assert isinstance(found, Read)
    assert found.metric.tolist() == (torch.eye(5).double() / 3).tolist()


@pytest.mark.parametrize("told", ["read", "behind a norm", "by none", "too many"])
def test_what_suits_a_space_is_what_is_known_of_its_readers(told):
    f = torch.randn(500, 12, generator=torch.Generator().manual_seed(1)).double()
    seen = SpaceMoments((6, 6), 500.0, f.mean(0), f.T @ f / 500)
    acts = frozenset({"layer_norm"}) if told == "behind a norm" else frozenset()
    reads = () if told == "by none" else (Segment("w", 1, np.arange(6), frozenset({"consume"})),)
    weights = [{"w": torch.randn(3, 6, generator=torch.Generator().manual_seed(k))} for k in (2, 3)]
    found = reading(FeatureSpace("s0", 6, segments=reads, nonlinear=acts), seen, weights)
    made = Suited(most=11 if told == "too many" else 12)(found, 6).merge
    other = (Select(plain=0.1) if told == "read" else Zip(beta=1.0))(found, 6).merge
    assert torch.equal(made, other)
    assert not torch.equal(Select(plain=0.1)(found, 6).merge, Zip(beta=1.0)(found, 6).merge)
    assert not isinstance(found, Read) or torch.equal(found.restrict([np.arange(6)] * 2).metric, found.metric)
    assert getattr(found, "straight", None) == getattr(found.restrict([np.arange(6)] * 2), "straight", None)


def test_merge_hands_the_readers_over():
    """Heads of other widths read the last space, too: what no head reads is not kept."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, k)) for k in (3, 5)]
    with torch.no_grad():
        models[0][2].weight[:, :4] = 0
        models[1][2].weight[:, 4:] = 0
    batch = torch.randn(512, 6)
    zipped = fxzip.merge(models, [batch], method="select", progress=False)
    mine = torch.cat([zipped(batch)[k] - m(batch) for k, m in enumerate(models)], 1).square().mean()
    scale = torch.cat([m(batch) for m in models], 1).var()
    assert mine < 1e-6 * scale
