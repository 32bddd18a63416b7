"""Parts of solve against what they are by definition; most were written because a mutant of theirs survived."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip.processes import ALONE
from fxzip.solve import Settings
from fxzip.solve.fit import wanted_rows
from fxzip.solve.refine import CLOSE, TOLD, _error, _retargeting, refine
from fxzip.solve.ridge import Gram, Ridge

torch.set_num_threads(1)
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_error_of_weights_is_that_of_their_residuals():
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(50, 2, n, generator=generator) for n in (4, 3))  # rows, groups, columns or outputs
    weights = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    gram = Gram()
    gram.add(x, t)
    residual = t.double() - torch.einsum("gop,rgp->rgo", weights, x.double())
    assert Ridge(gram, weights, 1e-3).error(weights) == pytest.approx(
        float((residual**2).sum() / (t.double() ** 2).sum()), rel=1e-5
    )


@pytest.mark.parametrize(
    "settings, groups, columns, rows",
    [
        (Settings(rows=8, least=1000), 1, 50, 1000),  # few columns
        (Settings(rows=8, least=1000, plenty=20), 1, 30, 600),  # very few
        (Settings(rows=8, least=1000, plenty=2), 1, 30, 240),
        (Settings(rows=8, least=1000), 1, 500, 4000),  # rows for each column
        (Settings(rows=8, least=1000, memory=4 * 10 * 600), 1, 10, 600),  # what has room
        (Settings(rows=8, least=1000, memory=4 * 10 * 600), 3, 10, 200),
        (Settings(rows=8, least=1000, memory=1), 1, 500, 500),  # never fewer than columns
    ],
)
def test_rows_of_a_fit(settings, groups, columns, rows):
    assert wanted_rows(settings, groups, columns) == rows


def test_a_part_of_many_rows_tells_the_error_and_all_are_counted():
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(4):
        x, t = (torch.randn(TOLD, 1, n, generator=generator) for n in (5, 3))
        kept.append((x, t, t))
    weights = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64)

    def exact(rows: list) -> float:
        x, t, _ = (torch.cat(v).double() for v in zip(*rows, strict=True))
        wrong = torch.einsum("gop,rgp->rgo", weights, x).relu() - t.relu()
        return float(wrong.square().sum() / t.relu().square().sum())

    told, count = _error(weights, kept, torch.relu, ALONE)
    assert count == 4 * TOLD
    assert told == pytest.approx(exact(kept), rel=0.05) and told != pytest.approx(exact(kept), rel=1e-6)
    few = [tuple(v[:100] for v in rows) for rows in kept]
    assert _error(weights, few, torch.relu, ALONE)[0] == pytest.approx(exact(few), rel=1e-5)


@pytest.mark.parametrize("noise, sweeps", [(0.01, False), (0.5, True)])
def test_a_fit_that_is_close_is_not_swept(noise, sweeps):
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(500, 1, n, generator=generator) for n in (5, 3))
    t = x @ torch.randn(5, 3, generator=generator) + noise * t
    gram, start = Gram(), torch.zeros(1, 3, 5, dtype=torch.float64)
    gram.add(x, t)
    fit = refine(gram, start, 1e-3, 3, [(x, t, t)], torch.relu)
    plain = Ridge(gram, start, 1e-3).solve()
    assert torch.equal(fit.weights, plain) != sweeps
    assert fit.after == pytest.approx(_error(fit.weights, [(x, t, t)], torch.relu, ALONE)[0])
    assert (fit.after < CLOSE) != sweeps and fit.after <= _error(plain, [(x, t, t)], torch.relu, ALONE)[0]


def test_targets_move_by_the_slope_or_by_the_secant():
    """Behind a ReLU a unit that should be alive moves all the way, one that should be dead only where it is not."""
    now, wanted = torch.tensor([[-3.0, 2.0, 2.0, -1.0]]), torch.tensor([[1.0, 3.0, -2.0, -4.0]])
    moved = _retargeting(now, wanted, torch.zeros(1, 4), torch.relu, 1e-3)
    torch.testing.assert_close(moved, torch.tensor([[4.0, 1.0, -2.0, 0.0]]), atol=1e-3, rtol=1e-3)
    gentle = _retargeting(now, wanted, torch.zeros(1, 4), lambda x: 0.25 * x, 1e-3)
    torch.testing.assert_close(gentle, 0.25 * (wanted - now), atol=1e-3, rtol=1e-3)


class Norms(nn.Module):
    """Batch norms of inputs, behind a convolution, and behind a function of that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.third, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.conv(self.first(x))).tanh()
        return self.head(self.third(x).relu().mean((2, 3)))


def test_statistics_of_norms_are_those_of_what_they_read():
    nets = [randomise(Norms(), seed).eval() for seed in range(2)]
    zipped = fxzip.merge(nets, IMAGES.split(8), progress=False)
    seen: dict[str, Tensor] = {}
    for name in ("second", "third"):  # the first reads the same in all models
        norm = zipped.get_submodule(name)
        norm.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].detach().double()}))
    zipped(IMAGES)
    for name, x in seen.items():
        norm = zipped.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), x.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(norm.running_var.double(), x.var((0, 2, 3), unbiased=False), atol=1e-3, rtol=1e-3)


def test_retargeting_looks_at_every_row_that_the_fit_draws():
    """Enough rows for all there are: then it is all one how many a column would have."""
    nets = [randomise(Norms(), seed).eval() for seed in range(2)]
    images = torch.randn(512, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    methods = (fxzip.Solve(settings=Settings(rows=rows, plenty=10**6)) for rows in (1, 1000))
    few, many = (fxzip.merge(nets, images.split(64), method=m, progress=False) for m in methods)
    for name, value in few.state_dict().items():
        assert torch.equal(value, many.state_dict()[name]), name


def test_scales_of_norms_that_differ_alone_become_their_mean():
    one = randomise(Norms(), 0).eval()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.third.weight *= torch.linspace(0.5, 2, 6)
    zipped = fxzip.merge([one, other], IMAGES.split(8), method=fxzip.Solve(fxzip.Average()), progress=False)
    spread = ((zipped.third.running_var + 1e-5) / (one.third.running_var + 1e-5)).sqrt()  # of the data, not of training
    start, lam = (one.third.weight + other.third.weight) / 2, Settings().lam
    torch.testing.assert_close(zipped.third.weight, start * (spread + lam) / (1 + lam), atol=1e-5, rtol=2e-3)


class ComputedBias(nn.Module):
    """A convolution that cannot be fitted whole: its bias is made of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.b, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(x, self.conv.weight, self.b.exp()).relu().mean((2, 3)))


class Same(nn.Module):
    """padding="same"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, (3, 2), padding="same"), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("make", [ComputedBias, Same])
def test_what_cannot_be_fitted_stays_right(make):
    net = randomise(make()).eval()
    twin = fxzip.scramble(net, IMAGES[:2], seed=1)
    for y in fxzip.merge([net, twin], IMAGES.split(8), progress=False)(IMAGES):
        torch.testing.assert_close(y, net(IMAGES), atol=1e-4, rtol=1e-3)


def test_a_ridge_without_end_leaves_the_zipped_weights():
    nets = [randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(),
                                    nn.Linear(5 * 16, 2)), seed).eval() for seed in range(2)]  # fmt: skip
    stiff = fxzip.Solve(fxzip.Zip(beta=1.0), Settings(lam=1e9, sweeps=0))
    made = [fxzip.merge(nets, IMAGES.split(8), method=m, progress=False) for m in (stiff, fxzip.Zip(beta=1.0), "solve")]
    found, wanted, free = (z.get_submodule("2").weight for z in made)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (free - wanted).abs().max() > 1e-2


class Twice(nn.Module):
    """A convolution that runs twice, before a norm of its own and an addition each: it is not fitted, the norms are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for norm in (self.first, self.second):
            x = (norm(self.conv(x)) + x).relu()
        return self.head(x.mean((2, 3)))


def test_norms_behind_a_layer_that_is_used_twice_are_fitted_by_themselves():
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Twice().eval())
    zipped = fxzip.merge(nets, [torch.randn(300, 3, 8, 8)], progress=False)
    kinds = [(row.node, row.kind) for row in fxzip.report(zipped).layers]
    assert ("first", "native_batch_norm") in kinds and ("second", "native_batch_norm") in kinds
    assert "conv" not in [node for node, _ in kinds]
