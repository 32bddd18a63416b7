"""Parts of measuring and matching against what they are by definition: sums in float64, all permutations tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fxzip.match.alignment import Layer, align
from fxzip.match.matching import Matching, from_slots, lossless, mean_correlation, model_of, optimal_unmerge
from fxzip.measure.gram import TILE, add_gram, gram, mirrored
from fxzip.measure.moments import SpaceMoments, balanced

torch.set_num_threads(1)


def rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count + width), dtype=torch.float64)
    return (x * torch.linspace(0.5, 2, width) + torch.linspace(-3, 3, width)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("count, width", [(300, 5), (10, 5), (0, 3), (200, TILE), (200, TILE + 3)])
def test_sums_of_products(count, width, dtype):
    parts = [rows(count, width, dtype), rows(count + 1, width, dtype)]
    total = torch.zeros(width, width, dtype=torch.float64)
    for x, weight in zip(parts, (0.5, 2.0), strict=True):
        before = x.clone()
        add_gram(total, x, weight)
        assert torch.equal(x, before)
    want = 0.5 * parts[0].double().T @ parts[0].double() + 2 * parts[1].double().T @ parts[1].double()
    torch.testing.assert_close(mirrored(total), want, rtol=1e-6, atol=2e-4)  # of sums of 400 squares of about 2


@pytest.mark.parametrize("width", [4, TILE, TILE + 1, 2 * TILE + 5])
def test_products_of_batches(width):
    x = torch.stack([rows(20, width, torch.float64), rows(20, width, torch.float64) ** 2])
    torch.testing.assert_close(gram(x), x.mT @ x)


@pytest.mark.parametrize("values", [1e16, 1e-18])
def test_what_float32_cannot_hold_is_multiplied_in_float64(values):
    x = rows(300, 3) * values
    total = torch.zeros(3, 3, dtype=torch.float64)
    add_gram(total, x)
    torch.testing.assert_close(total, x.double().T @ x.double(), rtol=1e-12, atol=0)


def test_a_backend_with_a_precision_of_its_own():
    """torch then refuses to say what the precision of float32 is."""
    matmul, x, total = torch.backends.cuda.matmul, rows(300, 3), torch.zeros(3, 3, dtype=torch.float64)
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        add_gram(total, x)
    finally:
        matmul.fp32_precision = before
    torch.testing.assert_close(total, x.double().T @ x.double(), rtol=1e-12, atol=1e-12)


def moments_of(x: torch.Tensor, sizes: tuple[int, ...]) -> SpaceMoments:
    return SpaceMoments(sizes, float(len(x)), x.mean(0), x.T @ x / len(x))


def test_moments_of_data_sets_count_alike():
    parts = [rows(n, 4, torch.float64) for n in (30, 50, 80)]
    found = balanced([moments_of(x, (2, 2)) for x in parts])
    want = sum(x.T @ x / len(x) for x in parts) / 3
    torch.testing.assert_close(found.second, want)
    torch.testing.assert_close(found.mean, torch.stack([x.mean(0) for x in parts]).mean(0))
    assert found.count == 160


@pytest.mark.parametrize("centred", [False, True])
def test_the_best_unmerge_is_that_of_least_squares(centred):
    x = rows(200, 6, torch.float64)
    merge = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = x - x.mean(0) if centred else x
    want = torch.linalg.lstsq(f @ merge.T, f).solution.T
    found = optimal_unmerge(merge, moments_of(x, (3, 3)), ridge=0.0, centred=centred)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_correlation_of_pairs():
    slots, sizes = np.array([0, 1, 1, 1, 2, 0, 1]), (3, 2, 2)
    correlation = np.corrcoef(rows(50, 7, torch.float64).numpy().T)
    model = model_of(sizes)
    pairs = [
        correlation[a, b]
        for a, b in itertools.combinations(range(7), 2)
        if slots[a] == slots[b] and model[a] != model[b]
    ]
    assert mean_correlation(slots, sizes, correlation) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("noise, lost", [(0.0, False), (1e-4, False), (1e-2, True)])
def test_lossless_is_what_the_data_say(noise, lost):
    x = rows(400, 4, torch.float64)
    x = torch.cat([x, x[:, [2, 0, 3, 1]]], 1) + noise * rows(401, 8, torch.float64)[1:]
    found = from_slots(np.array([0, 1, 2, 3, 2, 0, 3, 1]), 4, (4, 4), np.corrcoef(x.numpy().T))
    back = x @ found.merge.T @ found.unmerge.T
    assert (float((back - x).square().sum()) > 1e-6 * float(x.square().sum())) == lost
    assert lossless(found, moments_of(x, (4, 4))) != lost


def test_padded_matchings_come_back():
    torch.manual_seed(0)
    m = Matching(torch.randn(3, 5), torch.randn(5, 3), (2, 3), 0.5, 0.25)
    real = [np.array([3, 1]), np.array([0, 2, 3])]
    wide = m.expanded(real, 4)
    f = torch.randn(8, dtype=torch.float64)
    own = torch.cat([f[:4][real[0]], f[4:][real[1]]])
    torch.testing.assert_close(wide.merge @ f, m.merge @ own)
    back = wide.narrowed(real)
    assert torch.equal(back.merge, m.merge) and torch.equal(back.unmerge, m.unmerge) and back.sizes == (2, 3)
    assert (back.quality, back.baseline) == (0.5, 0.25)


# ---- alignment: every permutation that respects the blocks is tried


def value(layers: list[Layer], slots: dict[str, np.ndarray]) -> float:
    """The sum of correlations of paired features of two models, over all spaces."""
    found = 0.0
    for layer in layers:
        n = layer.width
        if layer.correlation is not None:
            found += float(layer.correlation[:n, n:][slots[layer.name], np.arange(n)].sum())
    return found


def respected(layers: list[Layer], slots: dict[str, np.ndarray]) -> bool:
    """Whether a feature lies in the blocks that its slot lies in, read in model 0's coordinates."""
    return all(
        np.array_equal(index[slots[layer.name]], slots[parent][index])
        for layer in layers
        for parent, index in layer.parents
    )


def best(layers: list[Layer]) -> float:
    every = [list(map(np.array, itertools.permutations(range(layer.width)))) for layer in layers]
    names = [layer.name for layer in layers]
    tried = (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*every))
    return max(value(layers, slots) for slots in tried if respected(layers, slots))


def correlation(width: int, seed: int) -> np.ndarray:
    c = np.random.default_rng(seed).uniform(-1, 1, (2 * width, 2 * width))
    return (c + c.T) / 2


FORESTS = {
    "alone": [("a", 5, ())],
    "pairs": [("h", 3, ()), ("d", 6, (("h", [0, 0, 1, 1, 2, 2]),))],
    "interleaved": [("h", 3, ()), ("d", 6, (("h", [0, 1, 2, 0, 1, 2]),))],
    "triples": [("h", 2, ()), ("d", 6, (("h", [0, 0, 0, 1, 1, 1]),))],
    "uneven": [("h", 3, ()), ("d", 5, (("h", [0, 1, 1, 2, 2]),))],
    "two children": [("h", 2, ()), ("d", 4, (("h", [0, 0, 1, 1]),)), ("e", 4, (("h", [0, 1, 0, 1]),))],
    "one for one": [("h", 3, ()), ("d", 3, (("h", [2, 0, 1]),)), ("e", 3, (("h", [0, 1, 2]),))],
}


@pytest.mark.parametrize("known", [True, False], ids=["parents measured", "parents not"])
@pytest.mark.parametrize("forest", FORESTS)
def test_two_models_are_aligned_as_well_as_can_be(forest, known):
    for seed in range(3):
        layers = [
            Layer(
                name, width, (width, width), tuple((p, np.array(i)) for p, i in parents),
                correlation(width, seed + 10 * k) if known or parents or forest == "alone" else None,
            )
            for k, (name, width, parents) in enumerate(FORESTS[forest])
        ]  # fmt: skip
        found = align(layers)
        assert all(np.array_equal(s, np.arange(len(s))) for s in found[0].values())
        assert respected(layers, found[1])
        assert value(layers, found[1]) == pytest.approx(best(layers))
