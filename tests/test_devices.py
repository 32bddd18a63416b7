"""Models, batches and the work on another device than the CPU: a pretended one, see `pretend.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from test_tails import IMAGES as SHOTS
from test_tails import networks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from toys import randomise

import fxzip
from examples import EXAMPLES
from fxzip.solve import Settings, Solve

IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = [*fxzip.METHODS, "solve+distill", "permute+repair"]
QUICK = Settings(rows=1, least=64)
SOME = (
    "dense block", "grouped bottleneck", "residual with a zero-padded shortcut", "conv3d then conv1d", "u-net",
    "grouped-query attention", "tied decoder", "vision transformer", "shifted windows",
)  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.m = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x)).relu()
        return self.head((x + self.m(self.b(x))).relu().mean((2, 3)))


def nets(count: int = 2) -> list[nn.Module]:
    return [randomise(Net(), seed=i).eval() for i in range(count)]


def close(found, wanted) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


@pytest.mark.parametrize("method", dict.fromkeys(METHODS))
def test_models_on_the_cpu_are_merged_there(method, device):
    """The default where there is a GPU. What comes back is on the CPU, as the models are."""
    models = nets()
    zipped = fxzip.merge(models, IMAGES.split(32), method=method, device=device, progress=False)
    assert all(t.device.type == "cpu" for t in (*zipped.state_dict().values(), *models[0].state_dict().values()))
    close(zipped(IMAGES), fxzip.merge(models, IMAGES.split(32), method=method, progress=False)(IMAGES))


@pytest.mark.parametrize("options", [
    {}, {"until": "b"}, {"since": "b"}, {"budget": 1.5}, {"heads": "joint"}, {"heads": "concat"}, {"memory": "1GB"},
    {"model_weights": [1, 3]}, {"method": fxzip.Distill(views=[lambda x: x.flip(-1)], epochs=1), "until": "b"},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
def test_models_there_take_batches_from_the_cpu(options, device):
    models = nets()
    wanted = fxzip.merge(models, IMAGES.split(32), progress=False, **options)(IMAGES)
    there = [copy.deepcopy(m).to(device) for m in models]
    for loader in (IMAGES.split(32), IMAGES.to(device).split(32)):
        zipped = fxzip.merge(there, loader, progress=False, **options)
        assert {t.device.type for t in zipped.state_dict().values()} == {device}
        close(zipped(IMAGES.to(device)), wanted)


def test_some_there_and_some_here(device):
    models = nets(3)
    wanted = fxzip.merge(models, IMAGES.split(32), progress=False)(IMAGES)
    models[1].to(device)
    close(fxzip.merge(models, IMAGES.split(32), device=device, progress=False)(IMAGES), wanted)


def test_networks_that_end_differently(device):
    models = networks("name", "segment", "classify")
    wanted = fxzip.merge(models, SHOTS.split(16), until="head", progress=False)(SHOTS)
    there = {t: m.to(device) for t, m in models.items()}
    close(fxzip.merge(there, SHOTS.split(16), until="head", progress=False)(SHOTS.to(device)), wanted)


def test_all_else_that_takes_models(device, tmp_path):
    here, there = nets(), [m.to(device) for m in nets()]
    assert str(fxzip.inspect(there[0], IMAGES[:2])) == str(fxzip.inspect(here[0], IMAGES[:2]))
    assert fxzip.verify(there[0], IMAGES[:2]).ok
    other = fxzip.scramble(there[0], IMAGES[:2])
    close(other(IMAGES.to(device)), here[0](IMAGES))
    seen = fxzip.collect(there, IMAGES.split(32), progress=False)
    zipped = fxzip.merge(dict(zip("ab", there, strict=True)), IMAGES.split(32), moments=seen, progress=False)
    assert fxzip.plan(there, IMAGES.split(32)).solving is not None
    tried = fxzip.frontier(there, IMAGES.split(16), [1, 1.5], untils=["b"], calibration=64, holdout=32, progress=False)
    assert len(str(tried).splitlines()) == 2 + 4
    close(fxzip.extract(zipped, "a")(IMAGES.to(device)), zipped(IMAGES.to(device))["a"].cpu())
    fxzip.save(zipped, tmp_path)
    close(fxzip.load(tmp_path, Net)(IMAGES), {t: y.cpu() for t, y in zipped(IMAGES.to(device)).items()})
    reset, wanted = (fxzip.reset_statistics(z, IMAGES.split(32)) for z in (zipped, fxzip.load(tmp_path, Net)))
    close(reset(IMAGES.to(device)), wanted(IMAGES))


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name in SOME], ids=str)
def test_other_operators(example, device):
    model, inputs = example.make(), example.inputs()
    data = tuple(torch.cat([v + 0.1 * k if v.is_floating_point() else v for k in range(8)]) for v in inputs)
    merged = [
        fxzip.merge([model, model], [data], method=Solve(settings=QUICK), device=d, progress=False, verify=False)
        for d in ("cpu", device)
    ]
    close(merged[1](*data), merged[0](*data))


def test_the_pretended_device_refuses_what_a_gpu_would(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"add: \(3,\) is on the CPU, others are on lazy"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="index_select"):
        x.index_select(1, torch.tensor([0]))
    assert x[:, torch.tensor([0])].device.type == device and float((x + 1).sum()) == 12
