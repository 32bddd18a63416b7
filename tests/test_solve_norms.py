"""Norms that no layer's fit absorbs: scale, shift, statistics and errors against dense least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip.solve import Settings

torch.set_num_threads(1)
IMAGES = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))
NORMS = {
    "layer": lambda: nn.LayerNorm(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "batch": lambda: nn.BatchNorm2d(6),
}


class Net(nn.Module):
    """A norm behind a function, so that no layer's fit can set it; another one in the head."""

    def __init__(self, kind: str, classes: int = 2) -> None:
        super().__init__()
        self.last = kind == "layer"
        self.conv, self.norm = nn.Conv2d(3, 6, 3), NORMS[kind]()
        self.mid, self.out, self.head = nn.Linear(6, 5), nn.LayerNorm(classes), nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.last else self.norm(x)
        return self.out(self.head(self.mid(x.tanh().mean((2, 3))).relu()))


def seen(net: nn.Module, name: str, what: str) -> Tensor:
    """What a module of a network reads ("input") or makes ("output") on IMAGES: [entries, features], float64."""
    found: list[Tensor] = []
    module = net.get_submodule(name)
    handle = module.register_forward_hook(lambda _, x, y: found.append(x[0] if what == "input" else y))
    with torch.no_grad():
        net(IMAGES)
    handle.remove()
    channels_last = isinstance(module, nn.LayerNorm)
    return (found[0] if channels_last else found[0].movedim(1, -1)).double().flatten(0, -2)


def plain(module: nn.Module, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows [entries, features] through the norm without scale and shift; batch statistics are those of the rows."""
    if isinstance(module, nn.BatchNorm2d):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + module.eps).sqrt()
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, x.shape[-1:], eps=module.eps)
    assert isinstance(module, nn.GroupNorm)
    image = x.unflatten(0, shape).movedim(-1, 1)
    return nn.functional.group_norm(image, module.num_groups, eps=module.eps).movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("lam", [1e-3, 0.5])
def test_a_norm_is_the_ridge_solution_on_what_the_merged_network_has(kind, lam):
    nets = [randomise(Net(kind), seed).eval() for seed in range(2)]
    method = fxzip.Solve(fxzip.Average(), Settings(lam=lam))  # features stay in place: targets are means
    zipped = fxzip.merge(nets, IMAGES.split(8), method=method, progress=False, verify=False)
    module = zipped.get_submodule("norm")
    x = plain(module, seen(zipped, "norm", "input"), (40, 3, 3))
    t = sum(seen(n, "norm", "output") for n in nets) / 2
    start = [sum(getattr(n.norm, p).double() for n in nets) / 2 for p in ("weight", "bias")]
    wanted = torch.stack([_ridge(x[:, k], t[:, k], float(start[0][k]), lam) for k in range(6)])
    torch.testing.assert_close(module.weight.double(), wanted[:, 0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(module.bias.double(), wanted[:, 1], atol=2e-4, rtol=2e-4)
    row = next(r for r in fxzip.report(zipped).layers if r.node == "norm")
    for error, (scale, shift) in ((row.before, start), (row.after, wanted.T)):
        expected = float((t - x * scale - shift).square().sum() / t.square().sum())
        assert error == pytest.approx(expected, rel=1e-4) and row.task == ""


def _ridge(x: Tensor, t: Tensor, start: float, lam: float) -> Tensor:
    """Scale and shift that minimise the squares of t - scale x - shift, plus lam var(x) (scale - start)^2 per row."""
    pull = (lam * len(x) * x.var(unbiased=False)).sqrt()
    rows = torch.stack([torch.cat([x, pull[None]]), torch.cat([torch.ones_like(x), pull.new_zeros(1)])], 1)
    return torch.linalg.lstsq(rows, torch.cat([t, pull[None] * start])[:, None]).solution[:, 0]


def test_norms_of_heads_are_fitted_to_their_own_model():
    nets = {"one": randomise(Net("group", 4), 0).eval(), "two": randomise(Net("group", 5), 1).eval()}
    zipped = fxzip.merge(nets, IMAGES.split(8), progress=False, verify=False)
    rows = {r.task: r for r in fxzip.report(zipped).layers if r.node == "out"}
    assert sorted(rows) == ["one", "two"]
    with torch.no_grad():
        outputs = zipped(IMAGES)
        for task, net in nets.items():
            t = net(IMAGES)
            error = float((t - outputs[task]).square().sum() / t.square().sum())
            assert rows[task].after == pytest.approx(error, rel=1e-3) and rows[task].before > rows[task].after


@pytest.mark.parametrize("change", ["no shift", "batch statistics", "instance", "scale of two axes"])
def test_norms_that_are_left_as_matched(change):
    def net(seed: int) -> nn.Module:
        made = randomise(Net("layer" if change == "scale of two axes" else "batch"), seed).eval()
        if change == "no shift":
            made.norm.bias = None  # type: ignore[assignment]
        elif change == "batch statistics":
            made.norm = randomise(nn.BatchNorm2d(6, track_running_stats=False), seed).eval()
        elif change == "instance":
            made.norm = randomise(nn.InstanceNorm2d(6, affine=True), seed).eval()
        else:
            made.norm = randomise(nn.LayerNorm([3, 6]), seed)
        return made

    zipped = fxzip.merge([net(0), net(1)], IMAGES.split(8), method=fxzip.Solve(fxzip.Average()), progress=False)
    expected = (net(0).norm.weight + net(1).norm.weight) / 2
    torch.testing.assert_close(zipped.get_submodule("norm").weight, expected)
    assert "norm" not in {r.node for r in fxzip.report(zipped).layers}


class Conditioned(nn.Module):
    """A layer norm of what is the same in every calibration sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.u, self.norm = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.head((self.a(x) + self.u(self.norm(self.t(condition)).relu())).relu())


def test_scales_of_what_does_not_vary_stay_small():
    """As small as the models', and not what rounding makes of a variance of nothing."""
    nets = [randomise(Conditioned(), seed).eval() for seed in range(2)]
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.randn(512, 6, generator=generator), torch.randn(1, 3, generator=generator).expand(512, 3)
    batches = list(zip(x.split(128), condition.split(128), strict=True))
    zipped = fxzip.merge(nets, batches, progress=False)
    largest = max(float(n.norm.weight.detach().abs().max()) for n in nets)
    assert float(zipped.get_submodule("norm").weight.detach().abs().max()) <= 1.5 * largest
    near = [zipped(x, condition + shift)[0] for shift in (0, 0.01)]
    assert (near[0] - near[1]).square().mean() < 0.01 * near[0].square().mean()
