"""REPAIR and RESCALE: what the statistics are afterwards, where they are written, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from merging import STRUCTURES, far, outputs, scrambled
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip import Average, InputError, Permute, Repair, Zip
from fxzip.demo import digits
from fxzip.rewrite import recompute_statistics

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Two hidden layers, a layer norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def hidden(self, x: Tensor) -> list[Tensor]:
        a = self.fc1(x)
        b = self.norm(F.relu(a))
        return [a, b, self.fc2(b)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(x)[-1]))


def strangers() -> list[nn.Module]:
    return [randomise(Plain(), seed).eval() for seed in (1, 2)]


def merge(models, method, loader=(X,), **options):
    return fxzip.merge(models, loader, method=method, progress=False, verify=False, **options)


def features(zipped: nn.Module) -> list[Tensor]:
    """The merged network's hidden values."""
    plain = Plain()
    plain.load_state_dict(fxzip.extract(zipped, "task0").state_dict())
    return plain.hidden(X)


@pytest.mark.parametrize("shift", [True, False], ids=["repair", "rescale"])
def test_every_feature_gets_the_average_mean_and_deviation(shift):
    """The definition, feature by feature (the order of features is model 0's, so average needs no matching)."""
    models = strangers()
    with torch.no_grad():
        hidden = list(zip(*(m.hidden(X) for m in models), strict=True))
        found = features(merge(models, Repair(Average(), shift)))
        plain = features(merge(models, "average"))
        for pair, z, before in zip(hidden, found, plain, strict=True):
            deviation = torch.stack([p.std(0, correction=0) for p in pair]).mean(0)
            mean = torch.stack([p.mean(0) for p in pair]).mean(0)
            torch.testing.assert_close(z.std(0, correction=0), deviation, rtol=1e-3, atol=1e-4)
            if shift:
                torch.testing.assert_close(z.mean(0), mean, rtol=1e-3, atol=1e-3)
            assert (before.std(0) - deviation).abs().max() > 0.1  # so that there was something to repair


def test_repair_follows_the_matching():
    model = strangers()[0]
    other = fxzip.scramble(model, X[:2])
    zipped = merge([model, other], "permute+repair")
    assert far(outputs(zipped, X)[1], outputs(model, X)) < 1e-4


@pytest.mark.parametrize("example", STRUCTURES[::3], ids=str)
def test_a_repaired_copy_is_the_model(example):
    model, twin, batches = scrambled(example)
    zipped = merge([model, twin], "permute+repair", batches)
    wanted = outputs(model, *batches[0])
    norms = any(n.endswith("running_var") for n in model.state_dict())  # of them, variances are averaged over batches
    for output in outputs(zipped, *batches[0]):
        assert far(output, wanted) < (2e-2 if norms else 1e-4), str(fxzip.report(zipped))


@pytest.mark.parametrize("method", ["permute+repair", "zip+rescale"])
def test_models_that_agree_are_not_repaired_to_the_data(method):
    """Norms keep the statistics of training there; rescaled to other data, they would compute something else."""
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), 0).eval()
    zipped = merge([model, copy.deepcopy(model)], method, [2 * X + 1])
    assert far(outputs(zipped, X)[0], outputs(model, X)) < 1e-6
    assert fxzip.report(zipped).method == method


def test_batch_norms_hold_the_models_statistics():
    """Of a network with batch norms repair leaves ordinary statistics: recomputing them changes nothing."""
    nets = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    for seed, net in enumerate(nets):
        randomise(net, seed)
        recompute_statistics(net, [X], lambda x: (x,))
    zipped = merge(nets, Repair(Average()))
    with torch.no_grad():
        normed = fxzip.extract(zipped, "task0").get_submodule("1")(zipped.get_submodule("0")(X))
        wanted = torch.stack([net[:2](X) for net in nets])
    torch.testing.assert_close(normed.mean(0), wanted.mean((0, 1)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(normed.std(0), wanted.std(1).mean(0), rtol=1e-2, atol=1e-3)
    before = outputs(zipped, X)[0]
    recompute_statistics(zipped, [X], lambda x: (x,))
    assert far(outputs(zipped, X)[0], before) < 1e-5


def test_nothing_stays_in_the_graph_and_the_models_stay_as_they_were():
    models = strangers()
    with unchanged(models):
        zipped = merge(models, "permute+repair")
    plain = merge(models, "permute")
    assert [str(n.target) for n in zipped.graph.nodes] == [str(n.target) for n in plain.graph.nodes]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in zipped.modules())
    assert {n: t.shape for n, t in zipped.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}


def test_the_report_says_what_was_done():
    zipped = merge(strangers(), Repair(Zip(), shift=False))
    assert fxzip.report(zipped).method == "zip+rescale"
    assert "repair: 3 layers rescaled" in fxzip.report(zipped).notices
    layers = (nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    bare = [randomise(nn.Sequential(*map(copy.deepcopy, layers)), seed) for seed in range(2)]
    notices = fxzip.report(merge(bare, "permute+repair")).notices
    assert "repair: 1 layers rescaled; 1 without a bias of their own keep their scale" in notices


def test_constant_features_do_no_harm():
    models = strangers()
    with torch.no_grad():
        models[0].fc1.weight[3] = 0
        models[1].fc1.weight.zero_()
    assert all(o.isfinite().all() for o in outputs(merge(models, "average+repair"), X))


def test_repair_helps_trained_networks_without_norms():
    """Two plain networks for one task: averaging shrinks their features, layer by layer; repair undoes it."""
    data = digits(0)
    images, labels = data.train
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        hidden = [f for n in (64, 48, 48, 48, 48) for f in (nn.Linear(n, 48), nn.ReLU())]
        nets.append(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(48, 10)))
        optimiser = torch.optim.Adam(nets[-1].parameters(), 3e-3)
        for _ in range(15):
            for pick in torch.randperm(len(images)).split(100):
                optimiser.zero_grad()
                F.cross_entropy(nets[-1](images[pick]), labels[pick]).backward()
                optimiser.step()
    right = {}
    for method in ("permute", "permute+rescale", "permute+repair"):
        zipped = merge(nets, method, [data.calibration], heads="average")
        right[method] = float((outputs(zipped, data.test[0]).argmax(1) == data.test[1]).float().mean())
    assert right["permute+repair"] > right["permute"] + 0.03, right


def test_what_makes_no_sense_is_refused():
    models = strangers()
    with pytest.raises(InputError, match="unknown modifier 'repiar' in .*; modifiers: repair, rescale"):
        merge(models, "zip+repiar")
    with pytest.raises(InputError, match="solve fits means and deviations itself; use method='solve'"):
        merge(models, "solve+repair")
    with pytest.raises(InputError, match="unknown method 'zpi'; did you mean 'zip'"):
        merge(models, "zpi+repair")
    with pytest.raises(InputError, match="zip\\+repair keeps the models' widths: leave out budget="):
        merge(models, Repair(Zip()), budget=1.2)
    with pytest.raises(InputError, match="loader is missing: this method reads batches"):
        merge(models, Repair(Permute()), None, example_inputs=X[:2])
