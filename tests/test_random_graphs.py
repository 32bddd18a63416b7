"""Random networks: spaces are proven, scrambled copies merge back, wrong rules are caught. Thousands of them:
benchmarks/trust.py."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from graph_laws import caught, far, judge
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from planted import PLANTED, planted
from random_graphs import build, seeded
from torch import Tensor, nn
from toys import randomise

import fxzip

torch.set_num_threads(1)
CI = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def nets(draw, size: int = 6):
    """Draws shrink towards few steps, small widths and the first kind of everything."""
    return build(lambda n: draw(st.integers(0, n - 1)), size)


def test_random_networks_are_sound_and_recovered():
    """Some may be refused, or nothing proven of them; most are not."""
    found: list[str] = []

    @CI
    @given(nets())
    def fuzz(net):
        note(str(net))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = judge(net)
        found.append(verdict.split(":")[0])
        assert found[-1] in ("sound", "refused", "inconclusive"), verdict

    fuzz()
    assert found.count("sound") > 0.8 * len(found), found


@pytest.mark.parametrize("name, ops, wrong", PLANTED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_planted_wrong_rule_is_caught(name, ops, wrong):
    """Within a hundred graphs; each takes fewer than twenty."""
    with planted(ops, wrong):
        assert any(caught(seeded(seed)) for seed in range(100))


def test_a_seed_is_a_network():
    a, b = seeded(7), seeded(7)
    x = a.inputs(3)
    assert str(a) == str(b) and torch.equal(a(x), b(x))


class TokenMixer(nn.Module):
    """Channels and hidden tokens cross: along either, the other model's samples are in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens = nn.Linear(6, 8), nn.Linear(5, 7)
        self.mid, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.stem(x).transpose(1, 2)).transpose(1, 2)
        return self.head(F.gelu(self.mid(x)).mean(1))


@pytest.mark.parametrize("method", ["permute", "zip", "select"])
def test_features_are_compared_only_where_samples_correspond(method):
    model = randomise(TokenMixer()).double().eval()
    data = torch.randn(64, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    other = fxzip.scramble(model, data[:2], seed=1)
    zipped = fxzip.merge([model, other], [data], method=method, progress=False)
    qualities = [s.quality for s in fxzip.report(zipped).spaces if s.quality is not None]
    assert min(qualities) > 0.99 or method == "select"
    with torch.no_grad():
        assert all(far(y, model(data)) < 1e-3 for y in zipped(data))


class Padded(nn.Module):
    """Two features are zero until a norm's bias tells them apart; nothing before it does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(F.pad(self.stem(x), (0, 2))))


@pytest.mark.parametrize("method", ["permute", "zip", "select"])
@pytest.mark.parametrize("seed", range(4))
def test_features_that_are_one_constant_before_a_norm_are_told_apart_behind_it(method, seed):
    model = randomise(Padded()).double().eval()
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).double()
    other = fxzip.scramble(model, data[:2], seed=seed)
    zipped = fxzip.merge([model, other], [data], method=method, progress=False)
    with torch.no_grad():
        assert all(far(y, model(data)) < 1e-3 for y in zipped(data))


@pytest.mark.parametrize("seed", [682, 1410])
def test_networks_that_were_once_merged_wrongly(seed):
    """Of benchmarks/trust.py's: padding before norms and scales, as above."""
    assert judge(seeded(seed)) == "sound"


def test_a_space_of_one_use_needs_no_control():
    """Tied weights, once forward and once transposed: to leave out the only use is no change."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(6, 8, bias=False), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.up(x).tanh(), self.up.weight.t()))

    found = fxzip.verify(randomise(Tied()).eval(), torch.randn(2, 6))
    assert found.ok and found.spaces == 1 and not found.controls
