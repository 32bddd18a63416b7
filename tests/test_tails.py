"""Networks on one trunk that end differently: one segments, one classifies."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import randomise

import fxzip
from fxzip import passes
from fxzip.prepare import prepare
from fxzip.prepared import Clock

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Trunk(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.down, self.up = nn.Conv2d(width, 10, 3, stride=2, padding=1), nn.Conv2d(10, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return x + F.interpolate(self.up(self.down(x).relu()), scale_factor=2.0)


def masks(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, classes, 1))


def label(classes: int) -> nn.Module:
    return nn.Sequential(nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


class Net(nn.Module):
    def __init__(self, head: nn.Module, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.head, self.unused = trunk or Trunk(), head, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


MAKE = {"segment": lambda: Net(masks()), "classify": lambda: Net(label(4)), "name": lambda: Net(label(5))}
ORDERS = [("segment", "classify"), ("classify", "segment"), ("name", "segment", "classify")]


def networks(*tasks: str) -> dict[str, nn.Module]:
    return {task: randomise(MAKE[task](), seed=i).eval() for i, task in enumerate(tasks)}


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """The same function from another order of features."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(fxzip.scramble(model, IMAGES[:2], seed=seed).state_dict())
    return twin.eval()


@pytest.mark.parametrize("tasks", ORDERS, ids="-".join)
@pytest.mark.parametrize("method", ["permute", "select", "solve"])
def test_trunks_that_agree_are_found_to(method, tasks):
    """Every trunk is the first one's, scrambled together with a head of another kind."""
    first = networks(tasks[0])[tasks[0]]
    models = {t: scrambled(Net(MAKE[t]().head, copy.deepcopy(first.trunk)).eval(), seed=i) for i, t in enumerate(tasks)}
    zipped = fxzip.merge(models, IMAGES.split(16), until="head", method=method, progress=False)
    with torch.no_grad():
        out = zipped(IMAGES)
        assert list(out) == list(tasks)
        for task, model in models.items():
            torch.testing.assert_close(out[task], model(IMAGES), atol=1e-4, rtol=1e-3)


def test_it_is_the_merge_of_networks_that_have_both_heads():
    models = networks("segment", "classify")

    class Both(nn.Module):
        def __init__(self, trunk: nn.Module) -> None:
            super().__init__()
            self.trunk, self.head = trunk, nn.ModuleList(models[t].head for t in models)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.trunk(x)
            return tuple(head(x.clone()) for head in self.head)

    both = {t: Both(m.trunk).eval() for t, m in models.items()}
    slow = fxzip.merge(both, IMAGES.split(16), until="head", method="zip", progress=False)(IMAGES)
    fast = fxzip.merge(models, IMAGES.split(16), until="head", method="zip", progress=False)(IMAGES)
    torch.testing.assert_close(fast["segment"], slow["segment"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast["classify"], slow["classify"][1], atol=1e-5, rtol=1e-4)


def test_what_is_behind_the_cut_is_measured_in_what_it_reads():
    p = prepare(networks("segment", "classify"), IMAGES.split(16), until="head", clock=Clock(), call="test")
    assert p.cut.boundary == ("add",)
    assert any(a.node in {n.name for n in p.spaces.lowered.values["add"]} for a in p.merged_spaces()[0].anchors)


@pytest.mark.parametrize("tasks", ORDERS, ids="-".join)
def test_saved_loaded_extracted_and_pickled(tasks, tmp_path):
    models = networks(*tasks)
    before = {t: copy.deepcopy(m.state_dict()) for t, m in models.items()}
    zipped = fxzip.merge(models, IMAGES.split(16), until="head", method="zip", progress=False)
    assert all(torch.equal(before[t][n], v) for t, m in models.items() for n, v in m.state_dict().items())
    out = zipped(IMAGES)
    fxzip.save(zipped, tmp_path)
    for again in (fxzip.load(tmp_path, MAKE), pickle.loads(pickle.dumps(zipped))):
        assert all(torch.equal(y, out[t]) for t, y in again(IMAGES).items())
        for task in tasks:
            alone = MAKE[task]()
            alone.load_state_dict(fxzip.extract(again, task).state_dict())
            torch.testing.assert_close(alone.eval()(IMAGES), out[task])
            assert torch.equal(alone.unused.weight, models[task].unused.weight)
    with pytest.raises(fxzip.InputError, match="model_fn builds another network"):
        fxzip.load(tmp_path, {t: MAKE["segment"] for t in tasks})


def test_a_trunk_once_and_every_head_once():
    models = networks("segment", "classify")
    found = fxzip.report(fxzip.merge(models, IMAGES.split(16), until="head", progress=False))
    sizes = {s.name: s.parameters for s in found.inputs}
    used = {t: sum(p.numel() for n, p in m.named_parameters() if "unused" not in n) for t, m in models.items()}
    assert sizes == used
    heads = sum(p.numel() for m in models.values() for p in m.head.parameters())
    assert found.result.parameters == heads + sum(p.numel() for p in models["segment"].trunk.parameters())
    assert {row.task for row in found.layers} == {"", "segment", "classify"}
    assert len(found.layers) == 3 + 2 + 1  # convolutions of the trunk, of the masks, and the linear layer


@pytest.mark.parametrize("tasks", ORDERS, ids="-".join)
def test_distilling_goes_for_outputs_that_somebody_gets(tasks):
    models, seen = networks(*tasks), IMAGES[:32]
    zipped = fxzip.merge(models, [seen], until="head", method=fxzip.Distill(features=0), progress=False)
    told = next(n for n in fxzip.report(zipped).notices if n.startswith("distill"))
    with torch.no_grad():
        out, wanted = zipped(seen), {t: m(seen) for t, m in models.items()}
    errors = [(out[t] - y).square().mean() / (y - y.mean(0)).square().mean() for t, y in wanted.items()]
    assert f"-> {sum(errors) / len(errors):.4f}, of features" in told
    assert float(re.findall(r"outputs (\S+) ->", told)[0]) > 1.05 * float(sum(errors) / len(errors))


def test_a_plan_counts_every_tail_once():
    models = networks("name", "segment", "classify")
    found = fxzip.plan(models, IMAGES.split(16), until="head").solving
    assert [f.copies for f in found.fits] == [1] * (3 + 1 + 2 + 1)


class Plain(Net):
    """Its head is a layer; and the name that this layer would get beside another network's is taken."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 2, 1))
        self.head_0 = self.head_1 = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head_0(self.head(self.trunk(x)))


@pytest.mark.parametrize("makers", [(Plain, MAKE["name"]), (MAKE["name"], Plain), (MAKE["segment"], Plain)])
def test_a_layer_beside_a_stack_of_layers_of_the_same_name(makers, tmp_path):
    """Their targets, `head` and `head.1`, cannot both be in one graph; once, looking for another never ended."""
    models = {task: randomise(make(), seed=i).eval() for i, (task, make) in enumerate(zip("ab", makers, strict=True))}
    for model in models.values():
        model.trunk.load_state_dict(models["a"].trunk.state_dict())
    zipped = fxzip.merge(models, IMAGES.split(16), method="permute", until="head", progress=False)
    fxzip.save(zipped, tmp_path)
    again = fxzip.load(tmp_path, [make() for make in makers])
    for task, model in models.items():
        assert torch.allclose(zipped(IMAGES)[task], model(IMAGES), atol=1e-5)
        assert torch.equal(zipped(IMAGES)[task], again(IMAGES)[task])


def test_within_a_budget():
    models = networks("segment", "classify")
    zipped = fxzip.merge(models, IMAGES.split(16), until="head", method="zip", budget=1.5, progress=False)
    out = zipped(IMAGES)
    assert [tuple(y.shape[1:]) for y in out.values()] == [(3, 8, 8), (4,)]
    assert zipped.get_submodule("trunk.down").weight.shape[0] > 10


def test_by_passes():
    graph = passes.start(networks("segment", "classify"), IMAGES.split(16), until="head", progress=False)
    with pytest.raises(fxzip.InputError, match="EveryModel: these models end differently"):
        passes.EveryModel(lambda g: None)(graph)
    for stage in (passes.Infer(), passes.Cut("head"), passes.Read(), passes.Measure(), passes.Match("zip"),
                  passes.Average(), passes.Build(), passes.Calibrate(), passes.Describe()):  # fmt: skip
        graph = stage(graph).graph_module
    assert set(graph(IMAGES)) == {"segment", "classify"}


class Deep(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def wide() -> Net:
    return Net(nn.Conv2d(12, 4, 1), Trunk(12))


def tied() -> Net:
    """The head's weight is one of the trunk's."""
    net = Net(nn.ConvTranspose2d(8, 3, 3, bias=False))
    net.head.weight = net.trunk.stem.weight
    return net


UNLIKE = "are not the same architecture: classify lacks"
REFUSED = [
    (lambda: Net(nn.Sequential(nn.Conv2d(8, 4, 1))), None, "if these are other heads on one trunk, name the layer"),
    (lambda: Net(label(4)), "heads", 'until="heads" is no module or node'),
    (lambda: Net(label(4), Deep()), "head", UNLIKE),
    (wide, "head", UNLIKE),
    (tied, "head", UNLIKE),
]


@pytest.mark.parametrize("other, until, said", REFUSED, ids=["no cut", "no such cut", "above the cut", "wider", "tied"])
def test_refused(other, until, said):
    models = {"segment": Net(masks()).eval(), "classify": other().eval()}
    with pytest.raises(fxzip.InputError, match=re.escape(said)):
        fxzip.merge(models, IMAGES.split(16), until=until, progress=False)
