"""A layer's fit against dense least squares: its rows, its target behind the layer, its start, and what is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip.solve import CHUNK, Settings
from fxzip.solve.fit import _single
from fxzip.solve.refine import refine
from fxzip.solve.ridge import Fit, Gram

torch.set_num_threads(1)
IMAGES = torch.randn(2 * CHUNK, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # two chunks
LAM = 0.05


class Net(nn.Module):
    """stem -> layer, with something affine behind it -> a function -> head. `last` is where the target is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(8, 3), nn.Identity()
        self.parts()

    def parts(self) -> None:
        self.layer = nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.behind(torch.tanh(self.stem(x)))).relu().mean((2, 3)))

    def behind(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def undone(self, target: Tensor, _: Net) -> Tensor:
        """What `layer` must make for `last` to be the target, in this network; norms and scales belong to it."""
        return target

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [o, p] and bias [o] of layer and what is folded into it."""
        return self.layer.weight.flatten(1), self.layer.bias


class Grouped(Net):
    def parts(self) -> None:
        self.layer = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)


class Wide(Net):
    """The data are narrower than the kernel: its outermost taps meet nothing but padding."""

    def parts(self) -> None:
        self.layer = nn.Conv2d(6, 8, (3, 9), padding=(1, 4))


class WideAndGrouped(Net):
    def parts(self) -> None:
        self.layer = nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 5), dilation=(1, 5), groups=2)


class WithoutBias(Net):
    def parts(self) -> None:
        self.layer = nn.Conv2d(6, 8, 3, bias=False)

    def folded(self) -> tuple[Tensor, Tensor]:
        return self.layer.weight.flatten(1), torch.zeros(8)


class Normed(Net):
    def parts(self) -> None:
        self.layer, self.norm = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-2)

    def behind(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        n = self.norm
        scale = n.weight / (n.running_var + n.eps).sqrt()
        bias = self.layer.bias if self.layer.bias is not None else 0
        return self.layer.weight.flatten(1) * scale[:, None], (bias - n.running_mean) * scale + n.bias


class NormedWithBias(Normed):
    def parts(self) -> None:
        super().parts()
        self.layer = nn.Conv2d(6, 8, 3)


class Scaled(Net):
    def parts(self) -> None:
        super().parts()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def behind(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale

    def folded(self) -> tuple[Tensor, Tensor]:
        return self.layer.weight.flatten(1) * self.scale.view(8, 1), self.layer.bias * self.scale.flatten()


class Added(Net):
    """The other branch has fewer columns, and comes first."""

    def parts(self) -> None:
        super().parts()
        self.other = nn.Conv2d(6, 8, 1)

    def behind(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.other(x[:, :, 1:-1, 1:-1])

    def undone(self, target: Tensor, merged: nn.Module) -> Tensor:
        return target - seen(merged, "other")[1]


class Subtracted(Added):
    def behind(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.other(x[:, :, 1:-1, 1:-1])

    def undone(self, target: Tensor, merged: nn.Module) -> Tensor:
        return target + seen(merged, "other")[1]


class TimesTwo(Net):
    def behind(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2.0

    def undone(self, target: Tensor, _: nn.Module) -> Tensor:
        return target / 2


class Linear(Net):
    """On tokens, moved to where an image has its features."""

    def parts(self) -> None:
        self.layer = nn.Linear(6, 8)

    def behind(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)

    def undone(self, target: Tensor, _: nn.Module) -> Tensor:
        return target.movedim(1, -1)


class Unread(Net):
    """Something reads the layer that no output depends on."""

    def behind(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.sum()
        return y


class NormedAndAdded(Normed):
    def parts(self) -> None:
        super().parts()
        self.other = nn.Conv2d(6, 8, 1)

    def behind(self, x: Tensor) -> Tensor:
        return super().behind(x) + self.other(x[:, :, 1:-1, 1:-1])

    def undone(self, target: Tensor, merged: nn.Module) -> Tensor:
        return target - seen(merged, "other")[1]


CASES = [Net, *(c for b in (Net, *Net.__subclasses__()) for c in b.__subclasses__())]
CASES = list(dict.fromkeys(CASES))


def seen(net: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """What a module of a network reads and makes on IMAGES."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _, x, y: found.append((x[0], y)))
    with torch.no_grad():
        net(IMAGES)
    handle.remove()
    return found[0]


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Design rows [r, g, p]: what each group of the layer's outputs is a linear function of."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [n, c*k, l]
    return patches.movedim(1, -1).reshape(-1, layer.groups, patches.shape[1] // layer.groups)


def targets_of(layer: nn.Module, t: Tensor) -> Tensor:
    """[r, g, o], for the same rows."""
    flat = t if isinstance(layer, nn.Linear) else t.movedim(1, -1)
    groups = getattr(layer, "groups", 1)
    return flat.reshape(-1, groups, flat.shape[-1] // groups)


def merged(make: Callable[[], Net], **settings: float) -> tuple[list[Net], nn.Module]:
    nets = [randomise(make(), seed).eval() for seed in range(2)]
    method = fxzip.Solve(fxzip.Average(), Settings(lam=LAM, plenty=10**6, **settings))  # features stay in place
    return nets, fxzip.merge(nets, IMAGES.split(128), method=method, progress=False, verify=False)


def problem(nets: list[Net], zipped: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [r, g, p + 1], targets [r, g, o], wanted values where the function reads them, and the folded start, of the
    mean of the models [g, o, p + 1]."""
    mean = randomise(type(nets[0])())
    mean.load_state_dict({k: (v + nets[1].state_dict()[k]) / 2 for k, v in nets[0].state_dict().items()})
    layer = nets[0].layer
    wanted = (seen(nets[0], "last")[1] + seen(nets[1], "last")[1]) / 2
    x, t = rows_of(layer, seen(zipped, "layer")[0]), targets_of(layer, nets[0].undone(wanted, zipped))
    full = wanted.movedim(1, -1).reshape(t.shape)
    with torch.no_grad():
        weight, bias = mean.folded()
    start = torch.cat([weight, bias[:, None]], 1).reshape(t.shape[1], t.shape[2], -1)
    return torch.cat([x, torch.ones_like(x[..., :1])], -1), t, full, start.double()


def found(net: nn.Module, zipped: nn.Module) -> Tensor:
    """Weight and bias of the merged layer with what is folded, [o, p + 1]."""
    made = type(net)()
    made.load_state_dict({k: zipped.state_dict().get(k, v) for k, v in made.state_dict().items()}, strict=False)
    with torch.no_grad():
        weight, bias = made.folded()
        return torch.cat([weight, bias[:, None]], 1).double()


@pytest.mark.parametrize("make", CASES)
def test_a_layer_is_the_ridge_solution_on_what_the_merged_network_has(make):
    nets, zipped = merged(make, sweeps=3 if make is TimesTwo else 0)  # behind a factor nothing is looked through
    x, t, _, start = problem(nets, zipped)
    if make is WithoutBias:
        x, start = x[..., :-1], start[..., :-1]
    wanted = []
    for g in range(t.shape[1]):
        a, b = x[:, g].double(), t[:, g].double()
        pull = (LAM * a.square().sum(0)).sqrt().diag()  # lam times the energy of every column, over all rows
        both = torch.cat([a, pull]), torch.cat([b, pull @ start[g].T])
        wanted.append(torch.linalg.lstsq(*both).solution.T)
    solution = torch.stack(wanted)  # [g, o, p (+ 1)]
    solution = torch.where(x.any(0).unsqueeze(1), solution, start)  # what the data does not determine stays
    got = found(nets[0], zipped)[:, : x.shape[-1]]
    torch.testing.assert_close(got, solution.flatten(0, 1), atol=2e-4, rtol=2e-4)
    row = next(r for r in fxzip.report(zipped).layers if r.node == "layer")
    for error, weights in ((row.before, start), (row.after, solution)):
        residual = t.double() - torch.einsum("gop,rgp->rgo", weights, x.double())
        assert error == pytest.approx(float(residual.square().sum() / t.double().square().sum()), rel=1e-3)


@pytest.mark.parametrize("make", [Net, Normed, Added, Subtracted, Linear, Unread, Wide, WideAndGrouped])
def test_the_function_behind_a_layer_is_looked_through(make):
    nets, zipped = merged(make, sweeps=3)
    x, t, full, start = problem(nets, zipped)
    gram = Gram()
    gram.add(x, t)
    fit = refine(gram, start, LAM, 3, [(x, t, full)], torch.relu, each=len(x) // 2)
    torch.testing.assert_close(found(nets[0], zipped), fit.weights.flatten(0, 1), atol=5e-4, rtol=5e-4)
    row = next(r for r in fxzip.report(zipped).layers if r.node == "layer")
    assert (row.before, row.after) == pytest.approx((fit.before, fit.after), rel=1e-3)


@pytest.mark.parametrize("make", [Normed, NormedWithBias])
def test_a_folded_norm_has_the_statistics_of_what_it_reads(make):
    _, zipped = merged(make)
    read = seen(zipped, "norm")[0].double()
    norm = zipped.get_submodule("norm")
    torch.testing.assert_close(norm.running_mean.double(), read.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(norm.running_var.double(), read.var((0, 2, 3), unbiased=False), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(norm.weight, (norm.running_var + norm.eps).sqrt(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (Settings(rows=2, least=700), 702),  # 351 of 768 rows in each of two chunks: one more than half
        (Settings(rows=20, least=100), 1082),  # 20 for each of 54 columns
    ],
)
def test_rows_are_dealt_over_the_chunks(settings, rows, monkeypatch):
    """The re-targeting looks at all that is fitted."""
    fits: list[tuple[int, int]] = []

    def spied(gram: Gram, start: Tensor, lam: float, sweeps: int, kept: list, *rest: object) -> Fit:
        fits.append((gram.rows, sum(len(x) for x, _, _ in kept)))
        return refine(gram, start, lam, sweeps, kept, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("fxzip.solve.fit.refine", spied)
    nets = [randomise(Net(), seed).eval() for seed in range(2)]
    method = fxzip.Solve(fxzip.Average(), settings)
    fxzip.merge(nets, IMAGES.split(128), method=method, progress=False, verify=False)
    assert fits[1] == (rows, rows)  # behind the stem


@pytest.mark.parametrize(("make", "columns"), [(Net, 54), (Grouped, 18), (Wide, 6 * 3 * 7), (WideAndGrouped, 3 * 3)])
def test_taps_that_meet_padding_alone_are_not_fitted(make, columns, monkeypatch):
    """Of a kernel of 9 on 4 pixels 7 taps meet data; of one of 3, five apart, one."""
    fits: list[int] = []

    def spied(gram: Gram, start: Tensor, *rest: object) -> Fit:
        fits.append(gram.second.shape[-1] - 1)
        return refine(gram, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("fxzip.solve.fit.refine", spied)
    merged(make, sweeps=1)
    assert fits[1] == columns


def test_a_kernel_that_meets_no_data_at_all_is_no_error():
    """Its output is its bias; what is beside it has the data."""

    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.stem, self.blind, self.head = nn.Linear(3, 8), nn.Conv2d(8, 8, 1, 2, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head(x + self.blind(x[:, :, None, None])[:, :, 0, 0])

    x = torch.randn(4, 3)
    for seeds in ((0, 1), (0, 0)):
        nets = [Net(s).eval() for s in seeds]
        made = fxzip.merge(nets, [torch.randn(64, 3)], progress=False)(x)
        assert all(y.isfinite().all() for y in made)
    assert all(torch.allclose(y, net(x), atol=1e-4) for y, net in zip(made, nets, strict=True))  # of copies, exactly


@pytest.mark.parametrize(("given", "made"), [("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_products_are_not_summed_in_half_precision(given, made):
    assert _single(torch.ones(2, dtype=getattr(torch, given))).dtype == getattr(torch, made)


def test_a_folded_scale_is_one():
    assert torch.equal(merged(Scaled)[1].get_parameter("scale"), torch.ones(8, 1, 1))
