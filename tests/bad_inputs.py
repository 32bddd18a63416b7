"""A table of wrong, odd and hostile calls of `merge`: what is given, and the line that must come back.

Every case is tried by tests/test_bad_input.py and counted by benchmarks/trust.py. `works` says that the call is odd but
right; all others must be refused, with the text that bad_inputs.txt has for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bad_loaders import IMAGES, TOKENS, Rows, Stream, X, Y, endless, failing, with_value
from bad_models import (
    Branches,
    Constant,
    Counts,
    CustomGradient,
    Cyclic,
    CyclicModules,
    Drifts,
    DropsAlways,
    Empty,
    Fixed,
    Images,
    InPlaceInput,
    InPlaceViews,
    Keyword,
    Lazy,
    Net,
    Noisy,
    NoOutput,
    NotCopied,
    Number,
    Overflows,
    Refuses,
    Remembers,
    Sparse,
    Tokens,
    TwoInputs,
)
from spoiled_models import (
    buffer_hook,
    complex_weights,
    failing_weight,
    fill,
    frozen,
    grown,
    half_meta,
    hooked,
    noisy_weight,
    old_weight_norm,
    on_meta,
    other_order,
    pruned,
    quantised,
    recording_hook,
    sharded,
    to,
    variance,
    weight_normed,
    zeroed,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxzip
from fxzip.solve import Settings, Solve


@dataclass(frozen=True)
class Case:
    """call: () -> (models, loader, further arguments of merge); works: see above."""

    name: str
    call: Callable[[], tuple[Any, Any, dict[str, Any]]]
    works: bool = False

    def __str__(self) -> str:
        return self.name


def pair(kind: Callable[[], nn.Module] = Net) -> list[nn.Module]:
    return [kind(), kind()]


def nets(kind: Callable[[], nn.Module] = Net, loader: Any = None, **options: Any) -> Callable[[], tuple]:
    """Two fresh models of a kind, with a good loader unless another is given."""
    return lambda: (pair(kind), [X] if loader is None else loader() if callable(loader) else loader, options)


def spoiled(
    spoil: Callable[[nn.Module], Any], kind: Callable[[], nn.Module] = Net, data: Any = X
) -> Callable[[], tuple]:
    """As `nets`; something is done to the second model."""

    def call() -> tuple:
        models = pair(kind)
        with torch.no_grad():
            models[1] = spoil(models[1]) or models[1]
        return models, [data], {}

    return call


CASES = [
    # types
    Case("a single model", lambda: (Net(), [X], {})),
    Case("models is None", lambda: (None, [X], {})),
    Case("models is a generator", lambda: ((Net() for _ in range(2)), [X], {})),
    Case("models is a set", lambda: (set(pair()), [X], {})),
    Case("a state_dict", lambda: ([Net(), Net().state_dict()], [X], {})),
    Case("a class", lambda: ([Net(), Net], [X], {})),
    Case("a path", lambda: ([Net(), "model.pt"], [X], {})),
    Case("a None among models", lambda: ([Net(), None], [X], {})),
    Case("an optimiser", lambda: ([Net(), torch.optim.SGD(Net().parameters())], [X], {})),
    Case("a bound method", lambda: ([Net(), Net().forward], [X], {})),
    Case("one model twice", lambda: ([m := Net().eval(), m], [X], {}), works=True),
    Case("a task name with a dot", lambda: ({"a.b": Net(), "c": Net()}, [X], {})),
    Case("a task name that is no string", lambda: ({1: Net(), 2: Net()}, [X], {})),
    Case("a task named forward", lambda: ({"forward": Net().eval(), "training": Net().eval()}, [X], {}), works=True),
    Case("a task named class", lambda: ({"class": Net().eval(), "import": Net().eval()}, [X], {}), works=True),
    Case("an empty task name", lambda: ({"": Net(), "b": Net()}, [X], {})),
    # options
    Case("unknown method", nets(method="zap")),
    Case("method is None", nets(method=None)),
    Case("method is a class", nets(method=nn.Linear)),
    Case("calibration 0", nets(calibration=0)),
    Case("calibration is a float", nets(calibration=1e3)),
    Case("budget below 0", nets(budget=-1.0)),
    Case("budget NaN", nets(budget=float("nan"))),
    Case("budget is text", nets(budget="1.3")),
    Case("budget is huge", nets(budget=1e9), works=True),
    Case("budget of widths that are none", nets(budget={"s0": 0, "s1": 2.5})),
    Case("budget of no widths", nets(budget={})),
    Case("widths that do not fit", nets(budget={"s99": 4, "s0": 10**6})),
    Case("widths of a space that has them", nets(budget={"s0": 8}), works=True),
    Case("budget is a tensor", nets(budget=torch.ones(2))),
    Case("round_to 0", nets(budget=1.5, round_to=0)),
    Case("a budget for one to one matching", nets(budget=1.5, method="permute")),
    Case("heads misspelt", nets(heads="seperate")),
    Case("until of no module", nets(until="layer9")),
    Case("until is a number", nets(until=3)),
    Case("seed is a float", nets(seed=1.5)),
    Case("seed is negative", nets(seed=-1)),
    Case("seed is None", nets(seed=None)),
    Case("memory is no size", nets(memory="much")),
    Case("memory is far too little", nets(method="zip", memory=1000)),
    Case("memory is plenty", nets(method="zip", memory="4GB"), works=True),
    Case("device is unknown", nets(device="gpu")),
    Case("device is meta", nets(device="meta")),
    Case("device that is not there", nets(device="cuda:7")),
    Case("forward_fn is no function", nets(forward_fn="logits")),
    Case("forward_fn without the model", nets(forward_fn=lambda: None)),
    Case("moments is a dict", nets(moments={"s0": 1})),
    Case("verify misspelt", nets(verify="reprot")),
    Case("no data at all", lambda: (pair(), None, {})),
    # loaders
    Case("an empty list", nets(loader=[])),
    Case("an exhausted generator", nets(loader=lambda: iter(()))),
    Case("a number", nets(loader=5)),
    Case("a tensor", nets(loader=lambda: X)),
    Case("a dataset", nets(loader=TensorDataset(X, Y))),
    Case("a stream of samples", nets(loader=Stream())),
    Case("a path as loader", nets(loader="data/train")),
    Case("a function", nets(loader=lambda: (lambda: X))),
    Case("an endless generator", nets(loader=endless), works=True),
    Case("a loader that raises half-way", nets(loader=failing)),
    Case("a loader that raises at once", nets(loader=lambda: (1 / 0 for _ in range(3)))),
    Case("a DataLoader that raises half-way", nets(loader=lambda: DataLoader(Rows(), 8))),
    Case("batches of changing size", nets(loader=[X[:7], X[7:8], X[8:]]), works=True),
    Case("batches of one sample", nets(loader=lambda: [x[None] for x in X]), works=True),
    Case("one sample in all", nets(loader=[X[:1]]), works=True),
    Case("a batch of no samples first", nets(loader=[X[:0], X])),
    Case("only batches of no samples", nets(loader=[X[:0]])),
    Case("a batch of no samples later", nets(loader=[X, X[:0]])),
    Case("samples without a batch axis", nets(loader=lambda: list(X))),
    Case("later batches of another width", nets(loader=[X, torch.randn(4, 5)])),
    Case("later batches of another dtype", nets(loader=[X, X.double()])),
    Case("later batches of another form", nets(loader=[X, {"x": X}]), works=True),
    Case("a None among batches", nets(loader=[X, None])),
    Case("text batches", nets(loader=["a cat", "a dog"])),
    Case("numpy batches", nets(loader=lambda: [X.numpy()])),
    Case("numpy batches with labels", nets(loader=lambda: [(X.numpy(), Y.numpy())])),
    Case("labels only", nets(loader=[Y])),
    Case("labels first", nets(loader=[(Y, X)])),
    Case("integer images", nets(Images, [(IMAGES * 50).to(torch.uint8)])),
    Case("images with channels last", nets(Images, [IMAGES.permute(0, 2, 3, 1)])),
    Case("images of changing size", nets(Images, [IMAGES, IMAGES[..., :6, :6]])),
    Case("double data", nets(loader=[X.double()])),
    Case("half data", nets(loader=[X.half()])),
    Case("complex data", nets(loader=[X.to(torch.complex64)])),
    Case("sparse data", nets(loader=lambda: [X.to_sparse()])),
    Case("data on meta", nets(loader=lambda: [X.to("meta")])),
    Case("data that wants gradients", nets(loader=lambda: [X.clone().requires_grad_()]), works=True),
    Case("wrong keys", nets(loader=[{"images": X}])),
    Case("keys of the wrong tasks", nets(loader={"cats": [X], "dogs": [X]})),
    Case("one task's loader is empty", nets(loader={"task0": [X], "task1": []})),
    Case("too few inputs", nets(TwoInputs, [X])),
    Case("NaN in the first batch", nets(loader=lambda: with_value(float("nan")))),
    Case("NaN in a later batch", nets(loader=lambda: with_value(float("nan"), 1))),
    Case("Inf in a later batch", nets(loader=lambda: with_value(float("inf"), 1))),
    Case("NaN in data, method without activations", nets(loader=lambda: with_value(float("nan"), 1), method="rebasin")),
    Case("constant data", nets(loader=[torch.ones(24, 6)]), works=True),
    Case("token ids out of range", nets(Tokens, [torch.full((4, 5), 12)])),
    Case("token ids out of range later", nets(Tokens, [TOKENS, TOKENS + 5])),
    Case("token ids as floats", nets(Tokens, [TOKENS.float()])),
    # weights
    Case("NaN in a weight", spoiled(fill("fc1.weight", float("nan")))),
    Case("Inf in a bias", spoiled(fill("head.bias", float("-inf")))),
    Case("NaN in a buffer", spoiled(lambda m: variance(m, float("nan")), Images, IMAGES)),
    Case("negative variance in a buffer", spoiled(lambda m: variance(m, -1.0), Images, IMAGES)),
    Case("weights that overflow", spoiled(fill("fc1.weight", 3e38))),
    Case("a model on meta", spoiled(on_meta)),
    Case("a layer on meta", spoiled(half_meta)),
    Case("one model in double", spoiled(to(torch.float64))),
    Case("one model in half", spoiled(to(torch.float16))),
    Case("both models in half, float data", nets(lambda: Net().half(), [X])),
    Case("both models in half", nets(lambda: Net().half(), [X.half()]), works=True),
    Case("both models in bfloat16", nets(lambda: Net().bfloat16(), [X.bfloat16()]), works=True),
    Case("complex weights", spoiled(complex_weights)),
    Case("other widths", spoiled(grown), works=True),
    Case("another architecture", spoiled(other_order)),
    Case("no parameters", nets(Empty)),
    Case("frozen parameters", spoiled(frozen), works=True),
    Case("zero weights", spoiled(zeroed), works=True),
    # models
    Case("activations overflow", nets(Overflows)),
    Case("a forward that counts calls", nets(Counts), works=True),
    Case("a forward that changes a weight", nets(Drifts)),
    Case("a forward that remembers", nets(Remembers)),
    Case("noise in eval", nets(Noisy)),
    Case("dropout in eval", nets(DropsAlways)),
    Case("in-place views", nets(InPlaceViews), works=True),
    Case("a forward that overwrites its input", nets(InPlaceInput)),
    Case("a custom autograd function", nets(CustomGradient), works=True),
    Case("a branch on values", nets(Branches)),
    Case("a fixed batch size", nets(Fixed)),
    Case("a reference to itself", nets(Cyclic), works=True),
    Case("a cycle of modules", nets(CyclicModules)),
    Case("lazy modules", nets(Lazy)),
    Case("no output", nets(NoOutput)),
    Case("a number as output", nets(Number)),
    Case("a constant output", nets(Constant)),
    Case("a forward that raises", nets(Refuses)),
    Case("a model that cannot be copied", nets(NotCopied)),
    Case("keyword-only inputs", nets(Keyword)),
    Case("keyword-only inputs by name", nets(Keyword, [{"x": X}])),
    Case("a sparse buffer", nets(Sparse)),
    Case("a scripted model", nets(lambda: torch.jit.script(Net()))),
    Case("a traced model", nets(lambda: torch.jit.trace(Net(), X))),
    Case("a compiled model", nets(lambda: torch.compile(Net())), works=True),
    Case("a data-parallel model", nets(lambda: nn.DataParallel(Net())), works=True),
    Case("a quantised model", spoiled(quantised)),
    Case("quantised models", nets(lambda: quantised(Net()))),
    Case("sharded parameters", spoiled(sharded)),
    Case("a forward hook that changes the output", spoiled(hooked)),
    Case("a forward pre-hook that changes the input", spoiled(buffer_hook)),
    Case("a forward hook that only looks on", spoiled(recording_hook), works=True),
    Case("a parametrization", spoiled(weight_normed), works=True),
    Case("weight norm as a hook", spoiled(old_weight_norm), works=True),
    Case("a random parametrization", spoiled(noisy_weight)),
    Case("a parametrization that fails", spoiled(failing_weight)),
    Case("a pruned layer", spoiled(pruned)),
    Case("a model without forward", nets(nn.Module)),
    Case("training mode", nets(lambda: Net().train()), works=True),
    # several at once
    Case("no memory at all", nets(method=Solve(settings=Settings(memory=0))), works=True),
    Case("NaN data and batch norms alone", nets(Images, lambda: [IMAGES, IMAGES * float("nan")], method="rebasin")),
    Case("infinite data and batch norms alone", nets(Images, lambda: [IMAGES * float("inf")], method="rebasin")),
    Case("several problems", lambda: ([Net(), 3], [], {"calibration": 0, "method": "zap", "budget": -1})),
]


def outcome(case: Case, **more: Any) -> str:
    """What `merge` says: "works", or the class and text of its error. Other exceptions than fxzip's pass through.

    What torch or the machine words is cut, and so are line numbers of this file.
    """
    models, loader, options = case.call()
    try:
        fxzip.merge(models, loader, **{"progress": False, **options, **more})
    except fxzip.FxzipError as error:
        return f"{type(error).__name__}: {plain(str(error))}"
    return "works"


def plain(text: str) -> str:
    text = re.sub(r"(RuntimeError|TypeError|IndexError|GuardOnDataDependentSymNode|used here): .*", r"\1: ...", text)
    return re.sub(r"(\w+\.py):\d+", r"\1:LINE", text)
