"""The numbers of solve: least squares, re-targeting and design rows, against dense ones by other means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import in_ranks
from torch import Tensor, fx, nn

from fxzip.solve.design import design_of, pick
from fxzip.solve.refine import RELAX, _retargeting, refine
from fxzip.solve.ridge import Gram, Ridge, ridge
from fxzip.solve.slots import arguments
from fxzip.trace import lower

torch.set_num_threads(1)


def rows(r: int, g: int, *widths: int, seed: int = 0) -> list[Tensor]:
    """Random [r, g, width] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(r, g, n, generator=generator, dtype=torch.float64) for n in widths]


def summed(*chunks: tuple[Tensor, Tensor]) -> Gram:
    gram = Gram()
    for x, t in chunks:
        gram.add(x, t)
    return gram


def dense(x: Tensor, t: Tensor, start: Tensor, lam: float) -> Tensor:
    """argmin E|t - W x|^2 + lam E|(W - start) x|^2 of independent columns, by a QR of the rows. [g, o, p]"""
    found = []
    for g in range(x.shape[1]):
        anchor = (lam * (x[:, g] ** 2).sum(0)).sqrt().diag()  # one more row for each column
        left, right = (torch.cat(each) / len(x) ** 0.5 for each in ((x[:, g], anchor), (t[:, g], anchor @ start[g].T)))
        found.append(torch.linalg.lstsq(left, right).solution.T)
    return torch.stack(found)


def start_of(g: int, o: int, p: int) -> Tensor:
    return torch.randn(g, o, p, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


# -- Gram matrices and the ridge ---------------------------------------------------------------------


def test_moments_are_sums_over_all_rows():
    x, t = rows(50, 2, 4, 3)
    gram = summed((x[:20], t[:20]), (x[20:], t[20:]))
    assert gram.rows == 50
    torch.testing.assert_close(gram.second, torch.einsum("rgp,rgq->gpq", x, x))
    torch.testing.assert_close(gram.cross, torch.einsum("rgo,rgp->gop", t, x))
    torch.testing.assert_close(gram.energy, torch.einsum("rgo,rgo->go", t, t))


def test_moments_of_ranks_are_those_of_all_rows():
    x, t = rows(50, 2, 4, 3)

    def work(processes) -> Gram:
        part = slice(0, 20) if processes.rank == 0 else slice(20, None)
        gram = summed((x[part], t[part]))
        gram.reduce(processes)
        return gram

    whole = summed((x, t))
    for gram in in_ranks(work):
        assert gram.rows == 50
        for name in ("second", "cross", "energy"):
            torch.testing.assert_close(getattr(gram, name), getattr(whole, name))


@pytest.mark.parametrize("lam", [1e-6, 1e-2, 0.5])
def test_the_ridge_is_the_dense_one(lam):
    x, t = rows(40, 2, 4, 3)
    x[..., 1] *= 5
    start = start_of(2, 3, 4)
    fit = ridge(summed((x, t)), start, lam)
    torch.testing.assert_close(fit.weights, dense(x, t, start, lam), rtol=1e-6, atol=1e-8)
    for weights, error in ((start, fit.before), (fit.weights, fit.after)):
        residual = t - torch.einsum("gop,rgp->rgo", weights, x)
        assert error == pytest.approx(float((residual**2).sum() / (t**2).sum()), rel=1e-9)


def test_a_ridge_solves_for_other_targets_too():
    x, t, other = rows(40, 2, 4, 3, 3)
    start, weights = start_of(2, 3, 4), rows(2, 3, 4, seed=5)[0]
    gap = other - torch.einsum("gop,rgp->rgo", weights, x)
    found = Ridge(summed((x, t)), start, 0.1).moved(weights, summed((x, gap)).cross / 40)
    torch.testing.assert_close(found, dense(x, other, start, 0.1), rtol=1e-6, atol=1e-8)


def test_no_error_of_no_target():
    x, t = rows(40, 1, 4, 3)
    assert Ridge(summed((x, 0 * t)), 0 * start_of(1, 3, 4), 0.1).error(0 * start_of(1, 3, 4)) == 0


def test_each_group_has_a_floor_of_its_own():
    """What the data do not determine stays, in a group a million times larger than another as in that."""
    x, t = rows(40, 2, 4, 3)
    x[:, 0] *= 1e6
    x[..., 3] = 0  # never active
    start = start_of(2, 3, 4)
    fit = ridge(summed((x, t)), start, 0.0)
    torch.testing.assert_close(fit.weights[..., :3], dense(x[..., :3], t, start[..., :3], 0.0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fit.weights[..., 3], start[..., 3])


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_without_a_ridge_too_what_the_data_do_not_determine_stays(scale):
    """Columns that are sums of others: the solution nearest to the start, each column in units of its own."""
    x, t = rows(300, 2, 6, 3)
    x = torch.cat([x, x[..., :3] - 2 * x[..., 3:], torch.zeros(300, 2, 1)], -1)  # of 10 columns 6 count
    x[..., 4] *= scale
    start = start_of(2, 3, 10)
    start[..., 4] /= scale
    with pytest.warns(RuntimeWarning, match="ill-conditioned") as warned:
        problem = Ridge(summed((x.float(), t.float())), start, 0.0)
        found = problem.solve()
        odd = problem.moved(start, F.pad(start_of(2, 3, 9), (0, 1)))  # which no target gives
    assert [w.filename for w in warned] == [__file__] * 2
    size = (x**2).mean(0).sqrt().clamp(min=1e-12)[:, None]  # [g, 1, p]
    for g in range(2):
        units, target = x[:, g] / size[g], t[:, g] - x[:, g] @ start[g].T
        nearest = torch.linalg.lstsq(units, target, driver="gelsd", rcond=1e-6).solution.T / size[g] + start[g]
        torch.testing.assert_close(found[g] * size[g], nearest * size[g], rtol=1e-4, atol=1e-4)
        unseen = torch.linalg.svd(units).Vh[6:]
        assert ((odd[g] - start[g]) * size[g] @ unseen.T).abs().max() < 1e-4


# -- re-targeting ------------------------------------------------------------------------------------


def projected(y: Tensor, t: Tensor) -> Tensor:
    """The nearest to y of all that a ReLU makes the same of as of t."""
    return torch.where(t > 0, t, y.clamp(max=0))


def refined(x: Tensor, t: Tensor, full: Tensor, start: Tensor, lam: float, sweeps: int) -> Tensor:
    """Alternating projections behind a ReLU, over-relaxed, by dense least squares."""
    weights = dense(x, t, start, lam)
    for _ in range(sweeps):
        y = torch.einsum("gop,rgp->rgo", weights, x)
        wanted = projected(y + full - t, full) - (full - t)
        weights = weights + RELAX * (dense(x, wanted, start, lam) - weights)
    return weights


@pytest.mark.parametrize("sweeps", [0, 1, 2, 3])
def test_refinement_is_alternating_projection(sweeps):
    """Of so few rows there are two sweeps at most."""
    x, t, shift = rows(60, 2, 4, 3, 3)
    start, full = start_of(2, 3, 4), t + 0.5 * shift
    for kept in ([(x, t, full)], [(x[:25], t[:25], full[:25]), (x[25:], t[25:], full[25:])]):
        fit = refine(summed((x, t)), start, 0.01, sweeps, kept, torch.relu)
        torch.testing.assert_close(fit.weights, refined(x, t, full, start, 0.01, min(sweeps, 2)), rtol=1e-2, atol=1e-3)
        for weights, error in ((start, fit.before), (fit.weights, fit.after)):
            y = torch.einsum("gop,rgp->rgo", weights, x) + full - t
            expected = ((y.relu() - full.relu()) ** 2).sum() / (full.relu() ** 2).sum()
            assert error == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("count", "parts"), [(79, (1, 1)), (120, (3, 3, 1)), (199, (3, 3, 1)), (200, (5, 3, 1))])
def test_only_the_last_sweep_looks_at_all_of_many_rows(count, parts):
    """Ten rows per column are enough for a part, and there are four columns; without parts there are two sweeps."""
    x, t = rows(count, 2, 4, 3)
    seen: list[int] = []

    def watched(y: Tensor) -> Tensor:
        seen.append(len(y))
        return y.relu()

    refine(summed((x, t)), start_of(2, 3, 4), 0.01, 3, [(x, t, t)], watched)
    steps = [n for n in seen[4:-2:4]]  # two for an error (of the start, without sweeps, after), four for each sweep
    assert steps == [len(range(0, count, every)) for every in parts]


def test_a_part_has_the_same_rows_however_chunks_are_joined():
    """Chunks of 50 rows: in one tensor, in two, and dealt to ranks they give one fit; not known, they do not."""
    x, t = rows(300, 1, 4, 3)
    whole, start = [(x, t, t)], start_of(1, 3, 4)
    parted = [(x[:100], t[:100], t[:100]), (x[100:], t[100:], t[100:])]
    one, two, other = (
        refine(summed((x, t)), start, 0.01, 3, kept, torch.relu, each=each).weights
        for kept, each in ((whole, 50), (parted, 50), (parted, 0))
    )
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert (one - other).abs().max() > 1e-5


def test_re_targeting_on_some_rows_moves_what_all_rows_say():
    """The sum over all rows stays; what is added is a mean over the kept ones."""
    x, t = rows(60, 2, 4, 3)
    start, kept, lam = start_of(2, 3, 4), (x[:20], t[:20], t[:20]), 0.01
    first = dense(x, t, start, lam)
    y = torch.einsum("gop,rgp->rgo", first, x)
    step = projected(y[:20], t[:20]) - y[:20]  # as if y + 3 step were aimed at there, and y elsewhere
    aim = torch.cat([y[:20] + 3 * step, y[20:]])
    expected = first + RELAX * (dense(x, aim, start, lam) - first)
    found = refine(summed((x, t)), start, lam, 1, [kept], torch.relu).weights
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_refinement_of_ranks_is_that_of_all_rows():
    x, t = rows(60, 2, 4, 3)
    start, gram = start_of(2, 3, 4), summed((x, t))

    def work(processes):
        part = slice(0, 25) if processes.rank == 0 else slice(25, None)
        return refine(gram, start, 0.01, 3, [(x[part], t[part], t[part])], torch.relu, processes)

    whole = refine(gram, start, 0.01, 3, [(x, t, t)], torch.relu)
    for fit in in_ranks(work):
        torch.testing.assert_close(fit.weights, whole.weights)
        assert (fit.before, fit.after) == pytest.approx((whole.before, whole.after))


def test_where_nothing_passes_nothing_is_wrong():
    x, t = rows(60, 1, 4, 3)
    t = -t.abs()
    assert refine(summed((x, t)), torch.zeros(1, 3, 4), 0.01, 0, [(x, t, t)], torch.relu).before == 0


@pytest.mark.parametrize("slope", [0.25, 3.0])
def test_a_target_moves_by_the_slope_and_never_further_than_wanted(slope):
    now, wanted = rows(20, 1, 3, 3)
    moved = _retargeting(now, wanted, torch.zeros(1), lambda x: slope * x, 1e-3)
    torch.testing.assert_close(moved, min(slope, 1) * (wanted - now))


def test_where_nothing_is_missing_nothing_moves():
    for now in (rows(20, 1, 3)[0], torch.ones(4, 1, 1)):  # of which the deviation is zero
        assert not _retargeting(now, now, torch.zeros(1), torch.relu, 1e-3).any()


# -- design rows -------------------------------------------------------------------------------------


class Product(nn.Module):
    """x @ W (+ b): the weight is [in, out]."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


CASES = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "addmm": (lambda: Product(True), (7, 6)),
    "mm": (lambda: Product(False), (7, 6)),
    "1d": (lambda: nn.Conv1d(6, 4, 3, 2, 1), (3, 6, 9)),
    "2d": (lambda: nn.Conv2d(6, 4, (3, 2), (1, 2), (2, 1), (2, 1)), (3, 6, 7, 5)),
    "3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), 1, (0, 1, 2)), (2, 2, 3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (3, 6, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (3, 6, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, (3, 2), 2, 1, 1, 2, True, 1), (3, 6, 5, 4)),
    "spread": (lambda: nn.ConvTranspose2d(6, 4, (3, 2), (2, 1), (0, 3), (1, 0), 1, False, (1, 2)), (3, 6, 5, 6)),
    "transposed, 1d": (lambda: nn.ConvTranspose1d(6, 9, 3, 3, 2, 2, 3), (3, 6, 4)),
    "transposed, 3d": (lambda: nn.ConvTranspose3d(2, 4, (1, 2, 3), 1, (0, 1, 2)), (2, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_are_regressions(case):
    """Design rows times the weight's matrix are what the op computes there; the matrix goes back to the weight."""
    make, shape = CASES[case]
    layer, x = make().double(), torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    node = contraction(layer, x)
    design = design_of(node)
    assert design is not None
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    y = layer(x).detach() - (layer(0 * x).detach() if design.bias else 0)
    matrix = design.matrix(weight, groups)
    assert matrix.shape[0] == groups and torch.equal(design.operand(matrix, weight.shape), weight)
    every, few = (design.rows(arguments(node) | {design.data: x, design.weight: weight}, count,
                              torch.Generator().manual_seed(0)) for count in (10**4, 5))  # fmt: skip
    assert every.of == few.of == len(every.x) == y.numel() // matrix.shape[:2].numel() and len(few.x) == 5
    for each in (every, few):
        torch.testing.assert_close(torch.einsum("rgp,gop->rgo", each.x, matrix), each.y(y))
    assert sorted(every.y(y).flatten().tolist()) == sorted(y.flatten().tolist()), "every position, once"
    assert len({tuple(r) for r in few.y(y).flatten(1).tolist()}) > 1


def contraction(layer: nn.Module, x: Tensor) -> fx.Node:
    """The one node of a lowered layer that solve can regress."""
    (node,) = [n for n in lower(fx.symbolic_trace(nn.Sequential(layer)).eval(), (x,)).graph.nodes
               if n.op == "call_function" and design_of(n) is not None]  # fmt: skip
    return node


def test_one_number_for_all_axes():
    """torch.convolution takes `[2]` for `[2, 2]`."""
    x, layer = rows(3, 6, 49)[0].reshape(3, 6, 7, 7), nn.Conv2d(6, 4, 3, 2, 1, 1, bias=False).double()
    node = contraction(layer, x)
    given, design = arguments(node) | {"input": x, "weight": layer.weight.detach()}, design_of(node)
    found = [design.rows(given | {k: n * [v] for k, v in (("stride", 2), ("padding", 1), ("dilation", 1))}, 10**4,
                         torch.Generator()).x for n in (1, 2)]  # fmt: skip
    assert torch.equal(*found)


def test_rows_are_drawn_when_there_are_more():
    cpu = torch.device("cpu")
    assert pick(5, 5, torch.Generator(), cpu).tolist() == pick(5, 9, torch.Generator(), cpu).tolist() == [0, 1, 2, 3, 4]
    one, two = (pick(1000, 999, torch.Generator().manual_seed(0), cpu) for _ in range(2))
    assert len(one) == 999 and torch.equal(one, two) and int(one.min()) >= 0 and 900 < int(one.max()) < 1000


def test_what_is_no_contraction_has_no_design():
    found = lower(fx.symbolic_trace(nn.Sequential(nn.ReLU())).eval(), (torch.ones(2, 3),)).graph.nodes
    assert [design_of(n) for n in found if n.op == "call_function"] == [None]
