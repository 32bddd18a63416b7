"""Lowering to functional ATen graphs."""

import operator
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxzip.errors import TraceError
from fxzip.trace import corresponding, lower, run, state_of, trace
from fxzip.trace.recorder import _overlap

torch.set_num_threads(1)


def graph_of(model, *args):
    """Traced GraphModule in eval."""
    return trace(model, args).graph_module


def lowered(model, *args):
    return lower(graph_of(model, *args), args)


class Leaf(nn.Module):
    """Holds a module that is traced as one node: code that symbolic tracing itself cannot follow."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def leaf_graph(inner, *args):
    return trace(Leaf(inner), args, leaf_modules=["inner"]).graph_module


def ops(low):
    return [str(n.target) for n in low.graph.nodes if n.op == "call_function"]


def check_equal(model, *args, rtol=1e-5, leaf=False):
    """Lowered and original agree; returns the lowered graph."""
    model.eval()
    gm = (graph_of if not leaf else leaf_graph)(model, *args)
    low = lower(gm, args)
    with torch.no_grad():
        want = model(*[x.clone() for x in args])
    got = run(low, state_of(gm), args)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= rtol * want.abs().max() and want.abs().max() > 0
    return low


def is_functional(low):
    for n in low.graph.nodes:
        if isinstance(n.target, torch._ops.OpOverload):
            assert not any(a.alias_info and a.alias_info.is_write for a in n.target._schema.arguments), (
                n.target
            )
    return True


ZOO = {
    "resnet18": {},
    "vit_b_16": {"image_size": 32},
    "swin_t": {},
    "shufflenet_v2_x0_5": {},
    "densenet121": {},
    "mobilenet_v3_small": {},
}


@pytest.mark.parametrize("name", ZOO)
def test_torchvision_runs_equal_and_is_functional(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **ZOO[name]).eval()
    for p in model.parameters():
        if not p.any():  # ViT heads start at zero, which would make the comparison empty
            nn.init.normal_(p, std=0.02)
    low = check_equal(model, torch.randn(2, 3, *(2 * [ZOO[name].get("image_size", 64)])))
    assert is_functional(low)
    low.graph.lint()
    assert set(low.parameters) == {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    assert not any(n.meta.get("const") is None and "fixed" in n.meta for n in low.graph.nodes)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "shufflenet_v2_x0_5"])
def test_batch_one_and_two_correspond(name):
    size = ZOO[name].get("image_size", 64)
    model = torchvision.models.get_model(name, weights=None, **ZOO[name]).eval()
    gm = graph_of(model, torch.randn(2, 3, size, size))
    a, b = (lower(gm, (torch.randn(n, 3, size, size),)) for n in (1, 2))
    names = corresponding(a, b)
    assert all(x == y for x, y in names.items())
    assert len(names) == len(a.graph.nodes)
    assert a.values.keys() == b.values.keys()


class InPlace(nn.Module):
    """Writes through views, on activations and a constant."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = x * 2
        x += 1
        h = self.fc(x)
        h[:, 1:3].mul_(2)
        h.view(-1)[0] = 5.0
        mask = torch.zeros(4)
        mask[2] = 1
        mask[:2].add_(3)
        return F.relu_(h) * mask + x


def test_in_place_writes_become_pure():
    x = torch.randn(3, 4)
    kept = x.clone()
    low = check_equal(InPlace(), x, leaf=True)
    assert is_functional(low)
    assert torch.equal(x, kept)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_views_overlap_where_they_share_an_element(data):
    def view() -> torch.Tensor:
        axes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), max_size=3))
        sizes, steps = [n for n, _ in axes], [step for _, step in axes]
        return memory.as_strided(sizes, steps, data.draw(st.integers(0, 36)))

    memory = torch.arange(100)
    a, b = view(), view()
    assert _overlap(a, b) == bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))


def test_tied_tensors_have_one_placeholder():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied().eval()
    x = torch.tensor([[1, 2, 6]])
    low = check_equal(model, x)
    assert dict(low.tied) == {"head.weight": "embed.weight"}
    assert list(low.parameters) == ["embed.weight"]
    weight = model.embed.weight.detach()
    assert torch.allclose(run(low, {"head.weight": weight}, (x,)), model(x))


def test_several_results_have_getitem_nodes_and_values_map_fx_nodes():
    class Split(nn.Module):
        def forward(self, x):
            a, b = x.split([1, 3], dim=1)
            return {"wide": b * 2, "both": (a, a + 1)}

    x = torch.randn(2, 4)
    gm = graph_of(Split(), x)
    low = lower(gm, (x,))
    split = next(n for n in low.graph.nodes if "split" in n.name)
    assert split.meta["results"] == (((2, 1), torch.float32), ((2, 3), torch.float32))
    assert {n.target for n in split.users} == {operator.getitem}
    assert [n.meta["shape"] for n in low.values["split"]] == [(2, 1), (2, 3)]
    assert low.values["x"] == low.inputs
    out = run(low, {}, (x,))
    assert torch.equal(out["wide"], x[:, 1:] * 2) and torch.equal(out["both"][1], x[:, :1] + 1)
    assert out["both"][0].shape == low.outputs["both"][0].meta["shape"]


def test_every_node_knows_shape_origin_and_line():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            h = self.fc(x)
            return F.relu(h) + x

    gm = graph_of(Small(), torch.randn(3, 4))
    low = lower(gm, (torch.randn(3, 4),))
    linear = next(n for n in low.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert linear.meta["shape"] == (3, 4) and linear.meta["dtype"] is torch.float32
    assert linear.meta["origin"] == "fc"
    assert re.fullmatch(r"test_lower.py:\d+: h = self.fc\(x\)", linear.meta["line"])
    names = {n.name for n in gm.graph.nodes}
    assert all(n.meta["origin"] in names for n in low.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", ["matmul", "operator", "vector", "batched", "attention", "lstm", "einsum"])
def test_products_are_equal_at_any_layout(name):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5))
            self.v = nn.Parameter(torch.randn(4))
            self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            if name == "matmul":
                return torch.matmul(x.transpose(0, 1), self.w)
            if name == "operator":
                return (self.w.t() @ x.transpose(1, 2)).sum() * (self.v[:3] @ x)
            if name == "vector":
                return x @ self.v
            if name == "batched":
                return x @ x.transpose(1, 2)
            if name == "attention":
                return self.mha(x, x, x)[0]
            return self.lstm(x)[0] if name == "lstm" else torch.einsum("bij,jk->bik", x, self.w)

    torch.manual_seed(0)
    model = Products().eval()
    low = check_equal(model, torch.randn(2, 3, 4))
    assert ("aten.linear.default" in ops(low)) == (name in ("matmul", "operator", "vector", "attention"))
    assert "aten.clone.default" not in ops(low)


def test_lowering_leaves_no_trace_and_warns_of_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    x = torch.randn(2, 3, 8, 8)
    gm = graph_of(model, x)
    with unchanged([model, gm]), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lower(gm, (x,)), state_of(gm), (x,))


class Cell(nn.Module):
    """nn.LSTM's C++ code changes its own temporaries in place, below functionalize."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("on", [True, False])
def test_convolutions_run_by_onednn_where_it_is_on_and_are_recorded_as_they_are(on, monkeypatch):
    """Without it a depthwise one takes ten times as long; it stays off for whoever has switched it off."""

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, torch._C._get_mkldnn_enabled()))
            return func(*args, **(kwargs or {}))

    seen: list = []
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    gm, x = fx.symbolic_trace(nn.Sequential(conv, nn.ReLU()).eval()), torch.randn(2, 4, 5, 5)
    narrow = x[:, :3]
    with torch.backends.mkldnn.flags(enabled=on), unchanged(gm), Watched():
        lowered = lower(gm, (x,))
    made = [n.target for n in lowered.graph.nodes if n.op == "call_function"]
    assert made == [torch.ops.aten.convolution.default, torch.ops.aten.relu.default]
    ran = dict(seen)
    assert (ran[made[0]], ran[made[1]]) == (on, False)

    with unchanged(gm), pytest.raises(TraceError, match="lowering stopped at %_0"):
        lower(gm, (narrow,))  # a convolution that fails


def test_writes_inside_composite_operators_become_pure():
    torch.manual_seed(0)
    low = check_equal(Cell(), torch.randn(2, 3, 3))
    assert is_functional(low) and "aten.sigmoid.default" in ops(low)
    weights = {n.name: n for n in low.graph.nodes if n.name.startswith("p_rnn_weight")}
    assert len(weights) == 8 and all(n.users for n in weights.values())


def test_every_layer_kind_of_dropout_is_idle_in_eval():
    layers = [nn.Dropout1d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Dropout()]
    low = check_equal(nn.Sequential(*layers, nn.Tanh()), torch.randn(2, 3, 4))
    assert not any(n.meta.get("random") for n in low.graph.nodes)


@fx.wrap
def _first_grown(sizes: list[int]) -> int:
    sizes[0] += 1
    return sizes[0]


def test_a_wrapped_function_may_write_to_its_list():
    class Net(nn.Module):
        def forward(self, x):
            return x * _first_grown([x.shape[0], 2])

    gm = fx.symbolic_trace(Net()).eval()
    (node,) = (n for n in lower(gm, (torch.ones(2, 3),)).graph.nodes if n.op == "call_function")
    assert node.args[1] == 3
