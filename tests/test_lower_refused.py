"""What cannot be lowered is refused, with the node and its line."""

import pytest
import torch
import torch.nn.functional as F
from test_lower import Leaf, graph_of, ops
from torch import fx, nn

from fxzip.errors import InputError, TraceError
from fxzip.trace import corresponding, lower, trace

torch.set_num_threads(1)


def test_random_forward_is_refused_with_the_line():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    gm = fx.symbolic_trace(Noise().eval())
    with pytest.raises(TraceError, match=r"random in eval mode: aten.rand_like.default at %rand_like"):
        lower(gm, (torch.ones(2),))

    class Active(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    with pytest.raises(TraceError, match="random in eval mode: aten.bernoulli"):
        lower(fx.symbolic_trace(Active().eval()), (torch.ones(2),))

    class Filled(nn.Module):
        def forward(self, x):
            return x + torch.empty(2).normal_()

    class Unused(nn.Module):
        def forward(self, x):
            torch.rand(2)
            return x + 1

    gm = fx.GraphModule(Leaf(Filled()).eval(), _leaf_tracer(Filled).trace(Leaf(Filled()).eval()))
    with pytest.raises(TraceError, match="random in eval mode: aten.normal.* at %inner"):
        lower(gm, (torch.ones(2),))
    gm = fx.GraphModule(Leaf(Unused()).eval(), _leaf_tracer(Unused).trace(Leaf(Unused()).eval()))
    assert ops(lower(gm, (torch.ones(2),))) == ["aten.add.Tensor"]
    idle = lower(fx.symbolic_trace(nn.Sequential(nn.Dropout(0.5), nn.ReLU()).eval()), (torch.ones(2),))
    assert ops(idle) == ["aten.relu.default"]


def _leaf_tracer(kind):
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, kind) or super().is_leaf_module(m, module_qualified_name)

    return Tracer()


def test_reading_a_weight_into_python_is_refused():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.w.item()

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Reads()

        def forward(self, x):
            return self.inner(x)

    gm = trace(Holder(), torch.ones(2), leaf_modules=[Reads]).graph_module
    with pytest.raises(
        TraceError, match=r"%inner \(test_lower_refused.py:\d+: return self.inner\(x\)\) reads a parameter"
    ):
        lower(gm, (torch.ones(2),))


def test_failures_name_node_and_line():
    gm = graph_of(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3))
    with pytest.raises(TraceError, match="lowering stopped at %_0: RuntimeError: "):
        lower(gm, (torch.ones(1, 4),))


def test_corresponding_refuses_another_path():
    class Shape(nn.Module):
        def forward(self, x):
            return x.relu() if x.shape[0] > 1 else x.sigmoid()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.shape = Shape()

        def forward(self, x):
            return self.shape(x)

    gm = fx.GraphModule(Outer().eval(), _leaf_tracer(Shape).trace(Outer().eval()))
    a, b = (lower(gm, (torch.ones(n, 2),)) for n in (1, 2))
    with pytest.raises(TraceError, match=r"node 1: %sigmoid_default = aten.sigmoid.default .*against"):
        corresponding(a, b)


def test_training_mode_is_refused():
    with pytest.raises(InputError, match="training mode; call eval"):
        lower(fx.symbolic_trace(nn.Linear(2, 2)), (torch.ones(1, 2),))
