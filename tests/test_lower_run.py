"""What a lowered graph is run with: constants that it holds, the state, other dtypes and widths."""

import pytest
import torch
import torch.nn.functional as F
from test_lower import check_equal, graph_of, leaf_graph, lowered
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxzip.errors import InputError
from fxzip.trace import lower, run, state_of

torch.set_num_threads(1)


class Plain(nn.Module):
    """Constants of every kind: factories, literals, a plain tensor attribute, index tables."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.register_buffer("index", torch.tensor([3, 1, 0, 2]), persistent=False)

    def forward(self, x):
        h = self.fc(x)[:, self.index] * self.scale + torch.arange(4)
        return h + torch.zeros_like(h) + torch.ones(4) * 2


def test_constants_are_marked_and_keep_their_value():
    low = check_equal(Plain(), torch.randn(2, 4), leaf=True)
    constants = {n.name: n.meta["const"] for n in low.graph.nodes if "const" in n.meta}
    assert any(torch.equal(c, torch.tensor([1.0, 2.0, 3.0, 4.0])) for c in constants.values())
    assert any(torch.equal(c, torch.arange(4)) for c in constants.values())
    assert torch.equal(constants["p_inner_index"], torch.tensor([3, 1, 0, 2]))
    assert "zeros_like_default" in constants  # its operand only lends a shape
    assert all(not c.requires_grad for c in constants.values())
    assert "const" not in low.parameters["inner.fc.weight"].meta
    assert not any("const" in n.meta for n in low.inputs)


def test_index_tables_come_from_the_state_and_missing_ones_are_named():
    model, x = Plain().eval(), torch.randn(2, 4)
    gm = graph_of(model, x)
    low, state = lower(gm, (x,)), state_of(gm)
    state["index"] = torch.arange(4)
    other = Plain().eval()
    other.load_state_dict(model.state_dict())
    other.index = torch.arange(4)
    assert torch.allclose(run(low, state, (x,)), other(x))
    with pytest.raises(InputError, match="state has no buffer '(index|scale)'. state_of"):
        run(low, model.state_dict(), (x,))


def test_a_tensor_changed_in_place_later_keeps_its_earlier_value():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.ones(3)

        def forward(self, x):
            before = x * self.scale
            return before + x * (self.scale + 1) + torch.tensor([1.0, 2.0, 3.0]).clone().fill_(2)

    check_equal(Changing(), torch.randn(2, 3))


def test_float64_state_runs_in_float64_throughout():
    model, x = Plain().eval(), torch.randn(2, 4)
    gm = leaf_graph(model, x)
    low = lower(gm, (x,))
    state = {k: v.double() if v.is_floating_point() else v for k, v in state_of(gm).items()}
    got = run(low, state, (x,))
    double = Plain().eval()
    double.load_state_dict(model.state_dict())
    double.double().scale = double.scale.double()
    assert got.dtype == torch.float64
    assert torch.allclose(got, double(x.double()), rtol=1e-12)

    class Upcast(nn.Module):
        def forward(self, x):
            return F.softmax(x.float() * torch.tensor(1.0), -1)

    gm = graph_of(nn.Sequential(nn.Linear(4, 4), Upcast()), x)
    low = lower(gm, (x,))
    state = {k: v.double() for k, v in state_of(gm).items()}  # the literal is one of its buffers
    assert run(low, state, (x,)).dtype == torch.float64


def test_other_parameter_shapes_where_the_operators_allow():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    low = lowered(model, x)
    wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    assert torch.allclose(run(low, state_of(wide), (x,)), wide(x))


def test_sink_sees_wanted_values_and_only_their_ancestors_run():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    low = lowered(model, x)
    node = low.values["_1"][0]
    seen = {}
    state = {k: v for k, v in state_of(model).items() if not k.startswith("2")}
    result = run(low, state, (x,), sink=seen.__setitem__, wanted=[node])  # works without the last layer
    assert result is None and list(seen) == [node]
    assert torch.equal(seen[node], model[1](model[0](x)))
    result = run(low, state_of(model), (x,), sink=seen.__setitem__, wanted=[node], stop_early=False)
    assert torch.allclose(result, model(x))
    with pytest.raises(InputError, match="takes 1 input tensors, 2 given"):
        run(low, state, (x, x))


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class Reads(nn.Module):
    """Activations of values that others read, too: a view, a second use, a parameter, an input, a broadcast sum."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h, twice = self.fc(x), self.fc(x + 1)
        seen = F.relu(h) + h[:, :1]
        return seen + F.relu(twice) * twice + F.relu(self.scale) + F.relu(x) + self.scale + x


def test_what_nobody_reads_again_is_overwritten_and_nothing_else():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(2, 3, 5, 5)
    low, state, seen = lowered(model, x), state_of(model), {}
    with Called() as called:
        assert torch.equal(run(low, state, (x,)), model(x))
    assert "aten.relu_.default" in called.names
    before = low.values["_1"][0]
    with Called() as called:
        run(low, state, (x,), sink=seen.__setitem__, wanted=[before], stop_early=False)
    assert "aten.relu_.default" not in called.names and torch.equal(seen[before], model[1](model[0](x)))

    model, x = Reads().eval(), torch.randn(2, 4)
    copies = {k: v.clone() for k, v in state_of(model).items()}, x.clone()
    assert torch.equal(run(lowered(model, x), state_of(model), (x,)), model(x))
    assert torch.equal(x, copies[1]) and all(torch.equal(v, copies[0][k]) for k, v in state_of(model).items())
