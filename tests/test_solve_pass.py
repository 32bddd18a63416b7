"""The whole pass of solve: errors that it reports, ranks, files, settings."""

from __future__ import annotations

import pytest
import torch
from helpers import solved
from ranks import in_ranks
from test_solve_fit import IMAGES, Net
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip import InputError, solve
from fxzip.processes import Processes
from fxzip.solve import CHUNK, Settings, Solve

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")


class Tied(nn.Module):
    """A decoder that is its model's own is tied to the embedding, which is shared; more of its own follows."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.dec = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.dec.weight, self.head = self.emb.weight, nn.Linear(20, 3)

    def forward(self, i: Tensor) -> Tensor:
        x = self.emb(i)
        x = x + torch.relu(self.mid(x))
        return self.head(torch.relu(self.dec(x)).mean(1))


class Block(nn.Module):
    """A residual stream, with one block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.down(torch.relu(self.up(x)))))


TOKENS = torch.randint(20, (512, 6), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))


def errors(zipped: nn.Module, nets: list[nn.Module], x: Tensor) -> list[float]:
    """E|y - y'|^2 / E|y|^2 of every model's output."""
    with torch.no_grad():
        pairs = [(n(x).double(), y.double()) for n, y in zip(nets, zipped(x), strict=True)]
    return [float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in pairs]


@pytest.mark.parametrize(
    "make, x, count, options",
    [(Tied, TOKENS, 2, {}), (Block, ROWS, 3, {"model_weights": [1, 2, 3]}), (Block, ROWS, 2, {"until": "up"}),
     (Block, ROWS[:200], 2, {"budget": 1.4}), (Block, ROWS[:200], 2, {})],
    ids=["tied", "three", "cut", "wider", "some"],
)  # fmt: skip
def test_the_error_that_is_reported_of_a_head_is_that_of_the_network(make, x, count, options):
    nets = [randomise(make(), seed).eval() for seed in range(count)]
    zipped = fxzip.merge(nets, [x], progress=False, verify=False, **options)
    reported = [row.after for row in fxzip.report(zipped).layers if row.node == "head"]
    assert reported == pytest.approx(errors(zipped, nets, x[: len(x) // CHUNK * CHUNK]), rel=1e-3)
    assert not any("solve" in n for n in fxzip.report(zipped).notices)


FEW = Settings(rows=1, least=64)


def test_ranks_fit_what_one_process_fits():
    nets, batches = [randomise(Block(), seed).eval() for seed in range(2)], [ROWS[:384]]
    one = solved(nets, batches, FEW)
    for other in in_ranks(lambda processes: solved(nets, batches, FEW, processes=processes)):
        assert list(other.shared) == list(one.shared) and not other.notices
        for name, value in one.shared.items():
            torch.testing.assert_close(other.shared[name], value, rtol=1e-4, atol=1e-5)
        for a, b in zip(other.heads.states, one.heads.states, strict=True):
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_fewer_chunks_than_processes_are_solved_in_each():
    nets = [randomise(Block(), seed).eval() for seed in range(2)]
    one, other = (solved(nets, [ROWS[:300]], FEW, processes=p) for p in (Processes(), Processes(2, 3)))
    text = "solve: 2 chunks of 128 samples do not go round 3 processes, so every process solved on all of them"
    assert other.notices == (text,)
    assert all(torch.equal(one.shared[n], other.shared[n]) for n in one.shared)


def test_files_that_nobody_asked_for_are_told():
    nets = [randomise(Block(), seed).eval() for seed in range(2)]
    free, capped = (solved(nets, [ROWS], FEW, memory=m) for m in (None, 0.0))
    assert not free.notices and not capped.notices and capped.peak < free.peak
    assert all(torch.equal(free.shared[n], capped.shared[n]) for n in free.shared)
    (text,) = solved(nets, [ROWS], Settings(memory=0)).notices
    assert text == ("solve kept 0.0 GB of activations in temporary files: they would take over 0.0 GB of memory; "
                    "memory= allows more")  # fmt: skip


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_of_very_many_activations_none_stay_in_memory(times, monkeypatch):
    """Not the ones for which there is room either; the result is the same."""
    nets = [randomise(Block(), seed).eval() for seed in range(2)]
    one = solved(nets, [ROWS], FEW)
    found: list[int] = []
    count = solve._activations
    monkeypatch.setattr(solve, "_activations", lambda *given: found.append(count(*given)) or found[-1])
    solved(nets, [ROWS], FEW)
    monkeypatch.setattr(solve, "MANY", times * found[0] / FEW.memory)
    other = solved(nets, [ROWS], FEW)
    assert one.peak > 0 and (other.peak == 0) == (times < 1)
    assert all(torch.equal(one.shared[n], other.shared[n]) for n in one.shared)
    assert found[0] >= 3 * 512 * 4 * (12 + 16), "bytes of two values of three networks"


class Beside(nn.Module):
    """Features beside what is none, under one norm; an argument of which a part is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out, self.head = nn.Linear(4, 6), nn.LayerNorm(10), nn.Linear(10, 8), nn.Linear(8, 2)

    def forward(self, pair: tuple[Tensor, int]) -> Tensor:
        x = self.norm(torch.cat([self.fc(pair[0]).relu(), pair[0]], 1))
        return self.head(self.out(x).relu() * pair[1])


def test_models_count_alike_and_settings_are_the_usual_ones_unless_told():
    nets, batches = [randomise(Beside(), seed).eval() for seed in range(2)], [((ROWS[:, :4], 3),)]
    plain, same, *others = (solved(nets, batches, settings, shares=shares).shared for settings, shares in (
        (None, None), (Settings(), [0.5, 0.5]), (Settings(lam=0.1), None), (None, [0.3, 0.7])))  # fmt: skip
    ridge, shares = ({n for n, x in plain.items() if not torch.equal(x, other[n])} for other in others)
    assert all(torch.equal(x, same[n]) for n, x in plain.items())
    assert ridge == set(plain) and {"norm.weight", "out.weight"} <= shares  # the features of no space are averaged


def test_more_models_are_matched_in_larger_groups():
    matchers = [Solve().matcher_for(n) for n in (2, 3)]
    assert [m.otherwise for m in matchers] == [fxzip.Zip(beta=1.0), fxzip.Zip(alpha=1.0, beta=1.0)]
    assert Solve(fxzip.Pair()).matcher_for(3) == fxzip.Pair()


def test_settings_at_their_bounds():
    Settings(lam=0, rows=1, least=1, sweeps=0, memory=0)
    for name, value in (("lam", -1e-9), ("rows", 0), ("least", 0), ("sweeps", -1), ("memory", -1), ("lam", torch.nan)):
        with pytest.raises(InputError, match=f"{name} must be at least"):
            Settings(**{name: value})


class Everything(Net):
    """Layers, norms that they take along and norms that they do not."""

    def parts(self) -> None:
        self.layer, self.norm = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.tail = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(8), nn.Tanh(), nn.GroupNorm(2, 8))

    def behind(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(self.layer(x)))


def test_ranks_solve_what_one_process_solves():
    """Three chunks for two, and fewer rows than there are: the draws must agree."""
    nets = [randomise(Everything(), seed).eval() for seed in range(2)]
    batches, few = list(torch.cat([IMAGES, IMAGES[:128].flip(1)]).split(128)), Settings(rows=1, least=256)
    one = solved(nets, batches, few).shared
    for other in in_ranks(lambda processes: solved(nets, batches, few, processes=processes).shared):
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-4)
