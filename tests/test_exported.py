"""The second rung: models whose forward branches on shapes or has keyword inputs, through the whole pipeline."""

import copy
import pickle
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from torch import Tensor, nn

import fxzip
from fxzip.errors import InputError, TraceError
from fxzip.rewrite import recompute_statistics
from fxzip.trace import trace
from fxzip.trace.precision import doubled

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, 12), nn.BatchNorm1d(12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.norm(self.up(x))))


@dataclass
class Output:
    """What a transformers model returns: not a container that fx can write down."""

    loss: Tensor | None
    logits: Tensor
    cache: object


class Branching(nn.Module):
    """Control flow on a shape, an optional mask, tied embedding, batch norm, dropout, an object as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(20, 8), nn.Dropout(0.5), nn.Linear(8, 20, bias=False)
        self.layers = nn.ModuleList(Block(8) for _ in range(2))
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        if ids is None:
            raise ValueError("no ids")
        x = self.embed(ids)
        if mask is not None and mask.shape[1] > 2:
            x = x * mask[..., None].to(x.dtype)
        x = self.drop(x.mean(1))
        for layer in self.layers:
            x = layer(x)
        return Output(None, self.head(x), object())


def branching(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Branching().eval()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return net


def batch(count: int = 6) -> dict[str, Tensor]:
    mask = torch.ones(count, 5)
    mask[:, 3:] = 0
    return {"mask": mask, "ids": torch.randint(20, (count, 5)), "labels": torch.zeros(count)}


def test_names_ties_lines_and_batch_sizes():
    net, data = branching(), batch()
    with unchanged(net):
        traced = trace(net, data)
    graph_module = traced.graph_module
    assert traced.rung == "exported" and "train() brings back batch norms" in traced.notices[-1]
    assert [n.name for n in graph_module.graph.nodes if n.op == "placeholder"] == ["ids", "mask"]
    names = set(dict(graph_module.named_parameters(remove_duplicate=False)))
    assert names == {n for n, _ in net.named_parameters(remove_duplicate=False) if not n.startswith("unused")}
    assert graph_module.head.weight is graph_module.embed.weight
    for count in (1, 2, 3, 7):
        some = batch(count)
        assert torch.allclose(graph_module(some["ids"], some["mask"]), net(**some).logits, atol=1e-6)
    node = next(n for n in graph_module.graph.nodes if n.name == "linear")
    assert "x + self.down(F.relu(self.norm(self.up(x))))" in node.stack_trace
    assert [path for path, _ in node.meta["nn_module_stack"].values()] == ["layers.0", "layers.0.up"]
    assert not [n for n in graph_module.graph.nodes if "dropout" in str(n.target) or "assert" in str(n.target)]
    pickle.loads(pickle.dumps(copy.deepcopy(graph_module)))


def test_batch_norms_are_modules_again():
    graph_module = trace(branching(), batch()).graph_module
    norm = graph_module.layers[0].norm if hasattr(graph_module.layers, "__getitem__") else None
    norm = norm or graph_module.get_submodule("layers.0.norm")
    before, seen = norm.running_mean.clone(), int(norm.num_batches_tracked)
    reference = branching()
    reference.train()
    reference.drop.eval()
    graph_module.train()
    some = batch()
    assert torch.allclose(graph_module(some["ids"], some["mask"]), reference(**some).logits, atol=1e-5)
    assert int(norm.num_batches_tracked) == seen + 1 and not torch.equal(norm.running_mean, before)
    assert torch.allclose(norm.running_mean, reference.layers[0].norm.running_mean, atol=1e-6)


def test_the_whole_pipeline(tmp_path):
    net, loader = branching(), [UserDict(batch(16)) for _ in range(8)]
    recompute_statistics(net, loader, lambda b: (b["ids"], b["mask"]))  # as the merge will
    scrambled = fxzip.scramble(net, batch())
    assert not torch.equal(net.embed.weight, scrambled.embed.weight)
    assert fxzip.verify(net, batch()).ok
    with unchanged([net, scrambled]):
        zipped = fxzip.merge({"a": net, "b": scrambled}, loader, method="permute", progress=False)
    some = {k: v for k, v in batch().items() if k != "labels"}
    wanted = net(**some).logits
    for output in zipped(**some).values():
        assert torch.allclose(output, wanted, atol=1e-4)
    assert "traced by torch.export in eval mode" in str(fxzip.report(zipped))
    exported = torch.export.export(zipped, tuple(some[k] for k in ("ids", "mask"))).module()
    assert torch.allclose(exported(some["ids"], some["mask"])["a"], wanted, atol=1e-4)
    fxzip.save(zipped, tmp_path)
    again = fxzip.load(tmp_path, Branching)
    assert torch.equal(again(**some)["b"], zipped(**some)["b"])
    single = fxzip.extract(zipped, "b")
    assert torch.allclose(single(**some), wanted, atol=1e-4)
    Branching().load_state_dict(single.state_dict())


def test_until_takes_module_paths():
    nets, loader = [branching(0), branching(1)], [batch(16)]
    zipped = fxzip.merge(nets, loader, method="zip", until="layers.1", progress=False)
    names = {n for n, _ in zipped.named_parameters(remove_duplicate=False)}
    assert "layers.0.up.weight" in names and "layers.1.up.weight" not in names
    assert "layers.1.norm_task0.weight" in names and "embed.weight" in names
    some = batch(3)
    assert [tuple(y.shape) for y in zipped(some["ids"], some["mask"])] == [(3, 20), (3, 20)]
    with pytest.raises(InputError, match=r'until="layer.1" is no module or node .*Did you mean .*layers\.1'):
        fxzip.merge(nets, loader, method="zip", until="layer.1", progress=False)


def test_inspect_names_the_front_end():
    text = str(fxzip.inspect(branching(), batch()))
    assert "traced by the exported front end" in text
    assert "traced by the symbolic front end" in str(fxzip.inspect(nn.Linear(3, 2), torch.ones(2, 3)))


class Shaped(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(4, 6), nn.Linear(6, 3), body

    def forward(self, x):
        return self.b(self.body(self, self.a(x))) if x.dim() == 2 and len(x.shape) == 2 else self.b(x)


def reads_values(net: nn.Module, h: Tensor) -> Tensor:
    return h * 2 if h.sum() > 0 else h


def scan(net: nn.Module, h: Tensor) -> Tensor:
    rows = [row for row in h]  # unrolled at the batch size of the example
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (reads_values, r"(?s)Shaped could not be traced.*exported: .*test_exported\.py:\d+: return h \* 2 if"),
        (scan, r"(?s)Shaped could not be traced.*exported: .*batch"),
    ],
)
def test_what_no_rung_takes_is_refused(body, message):
    torch.manual_seed(0)
    with pytest.raises(TraceError, match=message):
        trace(Shaped(body).eval(), torch.randn(3, 4))


def test_nested_inputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, more: list[Tensor], parts: dict[str, Tensor]) -> dict[str, Tensor]:
            x = parts["x"] if len(more) == 2 and more[0].shape[1] > 1 else more[1]
            return {"y": self.b(torch.relu(self.a(x + more[1])))}

    net, args = Net().eval(), ([torch.randn(3, 4), torch.randn(3, 4)], {"x": torch.randn(3, 4)})
    traced = trace(net, args)
    assert torch.allclose(traced.graph_module(*args)["y"], net(*args)["y"])
    assert fxzip.verify(net, args).ok


def test_doubled_overrules_dtypes_in_the_code():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).float() if x.shape[1] == 4 else x
            return self.a(F.softmax(y, -1, dtype=torch.float32))

    net, x = Net().eval(), torch.randn(2, 4)
    graph_module = doubled(trace(net, x).graph_module)
    assert torch.allclose(graph_module(x.double()).float(), net(x), atol=1e-6)
    assert graph_module(x.double()).dtype == torch.float64 and net(x).dtype == torch.float32


def test_batch_flattened_into_the_heads_is_measured():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.q, self.k, self.v, self.o = nn.Linear(6, 8), *(nn.Linear(8, 8) for _ in "qkvo")
            self.head = nn.Linear(8, 3)

        def split(self, x: Tensor) -> Tensor:  # [b, t, 8] -> [b * heads, t, 4]
            return x.view(x.shape[0], -1, 2, 4).transpose(1, 2).reshape(-1, x.shape[1], 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
            y = y.view(x.shape[0], 2, -1, 4).transpose(1, 2).reshape(x.shape)
            return self.head(torch.relu(self.o(y)).mean(1))

    torch.manual_seed(0)
    net = Attention().eval()
    loader = [torch.randn(8, 5, 6) for _ in range(4)]
    scrambled = fxzip.scramble(net, loader[0])
    zipped = fxzip.merge([net, scrambled], loader, method="permute", progress=False)
    assert all(torch.allclose(y, net(loader[0]), atol=1e-4) for y in zipped(loader[0]))


def test_multihead_attention_is_taken_apart():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.inner, self.layers, self.head = nn.Linear(4, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, 1:] if x.shape[1] > 5 else x
            return self.head(self.layers(self.inner(x)).mean(1))

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(3, 7, 4)
    with unchanged(net):
        spaces = fxzip.inspect(net, x)
    assert not spaces.frozen and {"8", "12", "2 x 4"} == {s.structure for s in spaces if s.segments}
    assert fxzip.verify(net, x).ok
