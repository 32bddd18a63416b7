"""Tracing: names, arguments, leaves, batch sizes, and what it refuses."""

import copy
import inspect
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import unchanged
from torch import nn

from fxzip.errors import InputError, TraceError
from fxzip.trace import trace

torch.set_num_threads(1)
X, Y = torch.randn(4, 3), torch.arange(4)


# ---------------------------------------------------------------------------------------------- trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.bn(self.conv(x)))
        return self.head(h.mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8)


def test_trace_keeps_names_and_leaves_the_model_alone():
    model = Net().train()
    with unchanged(model):
        traced = trace(model, (IMAGES, Y))
    gm = traced.graph_module
    assert traced.rung == "symbolic" and traced.notices == ()
    assert list(gm.state_dict()) == list(model.state_dict())
    assert not gm.training and model.training
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in gm.parameters()}
    assert not shared
    assert torch.allclose(gm(IMAGES), copy.deepcopy(model).eval()(IMAGES))
    gm.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "googlenet"])
def test_trace_torchvision(name):
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **more)
    gm = trace(model, torch.randn(1, 3, 64, 64)).graph_module
    assert list(gm.state_dict()) == list(model.state_dict())


def test_optional_arguments_are_fixed_at_their_defaults():
    class Masked(nn.Module):
        def forward(self, x, mask=None, scale=2.0, flip=False):
            if mask is not None:
                x = x * mask
            return (x.flip(0) if flip else x) * scale

    gm = trace(Masked(), X).graph_module
    assert list(inspect.signature(gm.forward).parameters) == ["x"]
    assert torch.equal(gm(X), 2 * X)
    gm = trace(Masked(), {"x": X, "mask": X}, concrete_args={"flip": True}).graph_module
    assert list(inspect.signature(gm.forward).parameters) == ["x", "mask"]
    assert torch.equal(gm(X, X), 2 * (X * X).flip(0))
    gm = trace(Masked(), (X, Y), concrete_args={"mask": torch.ones(3), "scale": 3.0}).graph_module
    assert torch.equal(gm(X), 3 * X)


def test_leaf_modules_by_name_and_class():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 1e9 else x * 3

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = Branch()

        def forward(self, x):
            return self.branch(x) + 1

    with pytest.raises(TraceError) as error:
        trace(Outer(), X)
    text = str(error.value)
    assert text.startswith("Outer could not be traced\n  symbolic: TraceError: symbolically traced variables")
    assert (
        "test_trace.py:" in text and "return x * 2 if x.sum() > 1e9 else x * 3 (in module 'branch')" in text
    )
    assert "Ways out: write what stops both in tensor operations; forward_fn=lambda model, x:" in text
    for leaf in ("branch", Branch):
        gm = trace(Outer(), X, leaf_modules=[leaf]).graph_module
        assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["branch"]
        assert torch.equal(gm(X), 3 * X + 1)
    with pytest.raises(InputError, match=r"no module is named 'brunch' \(did you mean 'branch'\?\)"):
        trace(Outer(), X, leaf_modules=["brunch"])
    with pytest.raises(InputError, match="takes module names and classes, not 3"):
        trace(Outer(), X, leaf_modules=[3])
    with pytest.raises(InputError, match=r"no parameter 'y'; it takes \(x\)"):
        trace(Outer(), X, concrete_args={"y": 1})


def test_second_batch_size_catches_a_frozen_shape():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = None

        def forward(self, x):
            if type(x) is not torch.Tensor:  # what tracing sees: a proxy, or a fake tensor
                return x.sum() / 4 + x * 0
            return x.mean(0).sum() + x * 0

    with pytest.raises(TraceError, match="does not compute the same at batch size 1: output 0 is off by"):
        trace(Frozen(), X)

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, 3) * 2

    traced = trace(Fixed(), X)
    assert traced.notices[0].startswith(
        "checked at batch size 4 only: the model itself fails at another (Runtime"
    )


def test_the_models_own_failure_is_named():
    with pytest.raises(InputError) as error:
        trace(Net(), torch.randn(2, 1, 8, 8))
    text = str(error.value)
    assert text.startswith(
        "Net fails on the example inputs (float32[2, 1, 8, 8]); forward takes (x): RuntimeError"
    )


def test_random_and_constant_forwards():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand(3) + random.random()

    model = Noise()
    with unchanged(model), pytest.raises(TraceError, match="Noise is random in eval mode: two passes"):
        trace(model, X)

    class Nothing(nn.Module):
        def forward(self, x):
            return 3

    with pytest.raises(TraceError, match="Nothing.forward returns no tensor"):
        trace(Nothing(), X)


def test_functional_dropout_is_noticed():
    class Drops(nn.Module):
        def forward(self, x):
            x = F.dropout(x, 0.5, training=self.training)
            return F.dropout(x, 0.1, self.training)

    (notice,) = trace(Drops(), X).notices
    assert notice.startswith("functional dropout is frozen in eval mode (2 calls, first at test_trace.py:")
    assert trace(nn.Sequential(nn.Dropout(0.5)), X).notices == ()


class NormAct(nn.BatchNorm2d):
    """A batch norm that calls the function in a forward of its own, with what follows it inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        return self.act(x)


def test_a_functional_batch_norm_is_a_module_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    traced = trace(model, x)
    assert traced.rung == "symbolic" and not traced.notices
    assert list(traced.graph_module.state_dict()) == list(model.state_dict())
    assert torch.equal(traced.graph_module.train()(x), model.train()(x))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in traced.graph_module.state_dict().items())


def test_nan_outputs_are_compared_as_such():
    class Log(nn.Module):
        def forward(self, x):
            return {"a": torch.log(x), "b": [x > 0, None]}

    assert trace(Log(), X).rung == "symbolic"


# -------------------------------------------------------------------------------------------- len of a batch


class Lengths(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.first(x))
        if self.kind == "loop":
            return torch.stack([self.last(h[i]) for i in range(len(x))])
        if self.kind == "features":
            return self.last(h.reshape(-1, len(h[0])))
        h = h.reshape(len(x), -1)
        if self.kind == "branch" and h.shape[1] < 4:  # beyond symbolic tracing
            h = -h
        return self.last(h)


@pytest.mark.parametrize("kind, rung", [("batch", "symbolic"), ("features", "symbolic"), ("branch", "exported")])
def test_len_of_a_tensor_is_its_first_size(kind, rung):
    model, x = Lengths(kind).eval(), torch.randn(4, 4)
    traced = trace(model, x)
    other = torch.randn(7, 4)
    assert traced.rung == rung and torch.allclose(traced.graph_module(other), model(other), atol=1e-6)
    assert "len" not in globals()


def test_a_loop_over_the_batch_is_refused_with_its_line():
    with pytest.raises(TraceError, match=r"test_trace.py:\d+: return torch.stack.*for i in range\(len\(x\)\)"):
        trace(Lengths("loop"), torch.randn(4, 4))


def test_len_where_it_cannot_be_followed_says_what_to_write():
    count = eval("lambda x: len(x)", {})  # a function of another file
    message = r"symbolic: len\(\) of a tensor is a plain number, which cannot be traced: write x.shape\[0\]"
    with pytest.raises(TraceError, match=message):

        class Elsewhere(Lengths):
            def forward(self, x):
                return super().forward(x).reshape(count(x), -1)

        trace(Elsewhere("batch"), torch.randn(4, 4))
