"""Widths within a budget: what many layers read is worth more, and nothing is gained by one more exchange."""

from itertools import product

import numpy as np
import pytest
import torch

from fxzip.infer.spaces import FeatureSpace, Segment
from fxzip.measure.moments import Moments, SpaceMoments
from fxzip.widths import Term, allocate, flops

N = 16


def space(name: str, readers: int) -> FeatureSpace:
    every = np.arange(N)
    made = Segment(f"{name}.made", 0, every, frozenset({"produce"}))
    read = [Segment(f"{name}.read{k}", 1, every, frozenset({"consume"})) for k in range(readers)]
    return FeatureSpace(name, N, segments=(made, *read))


def moments(names, fall: float = 0.9) -> Moments:
    """Independent features whose variance falls, in a random basis: directions matter, features alike."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        basis = torch.linalg.qr(torch.randn(2 * N, 2 * N, generator=generator, dtype=torch.float64))[0]
        second = (basis * fall ** torch.arange(2 * N)) @ basis.T
        found[name] = SpaceMoments((N, N), 100.0, torch.zeros(2 * N, dtype=torch.float64), second)
    return Moments(found)


def loss(spaces, seen, widths) -> float:
    total = 0.0
    for s in spaces:
        values = torch.linalg.eigvalsh(seen[s.name].correlation()).flip(0).clamp(min=0)
        kept = float(values[: widths[s.name]].sum() / values.sum())
        total += sum("consume" in g.roles for g in s.segments) * (1 - kept) / kept
    return total


@pytest.mark.parametrize("budget", [0.5, 1.0, 1.33])
def test_what_many_layers_read_becomes_wider(budget):
    spaces, names = [space("stream", 5), space("inner", 1)], ["stream", "inner"]
    terms = [Term(100.0, ("stream", "inner"))]
    widths = allocate(terms, spaces, moments(names), names, budget, round_to=2)
    assert widths["stream"] > 1.2 * widths["inner"]
    assert 0.9 * budget < flops(terms, {s: w / N for s, w in widths.items()}) / 100 <= budget


@pytest.mark.parametrize("budget", [0.6, 1.0, 1.5])
def test_no_other_widths_that_cost_as_little_lose_much_less(budget):
    spaces = [space("a", 1), space("b", 3), space("c", 2)]
    names, terms = ["a", "b", "c"], [Term(300.0, ("a", "b")), Term(40.0, ("b", "c")), Term(120.0, ("c",))]
    seen = moments(names)
    found = allocate(terms, spaces, seen, names, budget, round_to=4)
    every = [dict(zip(names, w, strict=True)) for w in product(range(4, 2 * N + 1, 4), repeat=3)]
    fitting = [w for w in every if flops(terms, {s: m / N for s, m in w.items()}) <= budget * 460]
    best = min(loss(spaces, seen, w) for w in fitting)
    assert found in fitting
    assert loss(spaces, seen, found) < 1.1 * best


def test_more_is_never_narrower_in_all_and_everything_fits_at_the_most():
    spaces, names = [space("a", 2), space("b", 1)], ["a", "b"]
    terms, seen = [Term(100.0, ("a", "b"))], moments(names)
    losses = [loss(spaces, seen, allocate(terms, spaces, seen, names, b, round_to=2)) for b in (0.3, 0.7, 1.0, 2.0)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4
    assert allocate(terms, spaces, seen, names, 4.0, round_to=2) == {"a": 2 * N, "b": 2 * N}
