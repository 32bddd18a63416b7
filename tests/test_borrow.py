"""A model is in memory once: its traced copy holds the model's own parameters, and nobody writes to them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers import unchanged
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from toys import randomise

import fxzip
from fxzip import passes
from fxzip.trace import borrow, own, trace

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")


class Tied(nn.Module):
    """A parameter with two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x))) + self.shift))


class Counts(nn.Module):
    """Writes to a buffer whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.head(torch.relu(self.body(x)))


def places(module: nn.Module) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in module.named_parameters(remove_duplicate=False)}


def test_equal_parameters_are_the_models_own_and_buffers_are_not():
    model = randomise(Tied()).eval()
    graph = trace(model, X[:2]).graph_module
    assert not set(places(graph).values()) & set(places(model).values())
    borrow(graph, model)
    assert places(graph) == places(model)
    assert graph.get_parameter("first.weight") is graph.get_parameter("second.weight"), "still tied"
    assert graph.get_buffer("shift").data_ptr() != model.shift.data_ptr()
    own(graph)
    assert not set(places(graph).values()) & set(places(model).values())
    assert graph.get_parameter("first.weight") is graph.get_parameter("second.weight")
    assert torch.equal(graph(X), model(X))


def test_what_differs_in_a_bit_is_not_borrowed():
    model = randomise(Tied()).eval()
    graph = trace(model, X[:2]).graph_module
    with torch.no_grad():
        model.head.weight[0, 0] *= 1 + 1e-6
        model.head.bias[0] = torch.nan
    model.first.bias = nn.Parameter(model.first.bias.double())
    before = places(graph)
    borrow(graph, model)
    own_still = {"head.weight", "head.bias", "first.bias"}
    assert {n for n, place in places(graph).items() if place == before[n]} == own_still


def test_a_model_whose_weights_are_computed_is_left_alone():
    """Of it there is a copy with plain weights already, and that lends them."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12))
    model = nn.Sequential(normed, nn.ReLU(), nn.Linear(12, 3)).eval()
    with unchanged(model):
        graph = passes.start([model, copy.deepcopy(model)], [X], copies=False, progress=False)
        assert not set(places(graph).values()) & set(places(model).values())
        assert places(graph) == places(passes.job(graph).models[0])


def test_merge_takes_no_copy_of_the_models(monkeypatch):
    models, seen = [randomise(Tied(), k).eval() for k in (0, 1)], []
    infer = passes.Infer.run

    def look(self, graph, now):
        seen.append([places(g) for g in now.prepared.graph_modules])
        return infer(self, graph, now)

    monkeypatch.setattr(passes.Infer, "run", look)
    with unchanged(models):
        fxzip.merge(models, [X], method="zip", progress=False)
    assert seen == [[places(m) for m in models]]


@pytest.mark.parametrize("options", [{}, {"until": "head"}, {"heads": "average"}, {"budget": 1.4}])
def test_a_model_that_counts_its_calls_does_not_count_ours(options):
    models = [randomise(Counts(), k).eval() for k in (0, 1)]
    options = {} if "since" in options else options
    with unchanged(models):
        zipped = fxzip.merge(models, [X], progress=False, **options)
    kept = [copy.deepcopy(m.state_dict()) for m in models]
    with torch.no_grad():
        for tensor in (*zipped.parameters(), *zipped.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(v, old[k]) for m, old in zip(models, kept, strict=True) for k, v in m.state_dict().items())


def test_a_users_pass_writes_to_copies():
    def negative(graph_module: fx.GraphModule) -> None:
        with torch.no_grad():
            for p in graph_module.parameters():
                p.neg_()

    models = [randomise(Tied(), k).eval() for k in (0, 1)]
    for copies in (True, False):
        with unchanged(models):
            graph = passes.start(models, [X], progress=False, copies=copies)
            found = PassManager([passes.EveryModel(negative)])(graph).graph_module
        for model, written in zip(models, passes.job(found).prepared.graph_modules, strict=True):
            assert torch.equal(written.get_parameter("head.weight"), -model.head.weight)


class Cyclic(nn.Module):
    """Modules that know each other, as those of transformers do: nothing of them is freed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 97), nn.Linear(97, 3)
        self.above = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def test_tracing_leaves_one_copy_behind_and_borrowing_none():
    model = Cyclic().eval()

    def copies() -> int:
        found = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.shape == (97, 6)]
        return len({t.data_ptr() for t in found}) - 1

    gc.collect()
    gc.disable()
    try:
        graph = trace(model, X[:2]).graph_module
        assert copies() == 1
        borrow(graph, model)
        assert copies() == 0
    finally:
        gc.enable()
    assert torch.equal(graph(X), model(X))
