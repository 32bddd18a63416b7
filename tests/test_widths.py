"""Widths within a budget: what many layers read is worth more."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxzip
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


@pytest.mark.parametrize("budget", [1.33, 1.6])
def test_what_many_layers_read_becomes_wider(budget):
    spaces, names = [space("stream", 5), space("inner", 1)], ["stream", "inner"]
    terms = [Term(100.0, ("stream", "inner"))]
    widths = allocate(terms, spaces, moments(names), names, budget, round_to=2)
    assert widths["stream"] > 1.2 * widths["inner"] >= N
    assert 0.9 * budget < flops(terms, {s: w / N for s, w in widths.items()}) / 100 <= budget


def test_widths_start_from_the_models_and_all_fits_at_the_most():
    spaces, names, seen = [space("a", 2), space("b", 1)], ["a", "b"], moments(["a", "b"])
    terms = [Term(100.0, ("a", "b"))]
    assert allocate(terms, spaces, seen, names, 1.0, round_to=2) == {"a": N, "b": N}
    assert allocate(terms, spaces, seen, names, 4.0, round_to=2) == {"a": 2 * N, "b": 2 * N}


class Halves(nn.Module):
    """What it makes of the stream's width stops where the stream is wider than the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pair, self.out = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, width = x.shape
        one, other = self.pair(x).view(n, 2, width).unbind(1)
        x = x + self.out(one.sigmoid() * other)
        return self.head(x + self.down(self.up(x).relu()))


def test_trying_a_width_prints_nothing_where_the_network_stops(capsys):
    models = [Halves().eval(), Halves().eval()]
    zipped = fxzip.merge(models, [torch.randn(64, 6)], method="zip", budget=2.5, progress=False)
    widths = {s.name: s.width for s in fxzip.report(zipped).spaces}
    assert sorted(widths.values()) == [8, 8, 24], "the hidden layer alone grows"
    assert capsys.readouterr().err == ""
