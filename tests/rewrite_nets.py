"""Networks with spaces and matchings made by hand, and their merges, for test_rewrite_*.py."""

import copy
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from fxzip.infer.spaces import FeatureSpace, Segment, Spaces
from fxzip.match.matching import Matching, from_slots
from fxzip.rewrite import build, head_parameters, merge_parameters, owned, partition
from fxzip.trace import state_by_all_names

WIDTH, INNER = 6, 5
BN = ("weight", "bias", "running_mean", "running_var")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, INNER, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(INNER)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(INNER, WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    """conv-bn-relu, two residual blocks on one stream, linear head; an auxiliary head for training only."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.block1, self.block2 = Block(), Block()
        self.drop = nn.Dropout(0.5)
        self.aux = nn.Linear(WIDTH, classes)
        self.fc = nn.Linear(WIDTH, classes)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x * self.scale)))
        x = self.block2(self.block1(x))
        x = self.drop(x.mean([2, 3]))
        if self.training:
            return self.fc(x) + self.aux(x)
        return self.fc(x)


def space(name: str, size: int, *segments: tuple[str, int, str]) -> FeatureSpace:
    held = [Segment(p, a, np.arange(size), frozenset(role.split("+"))) for p, a, role in segments]
    return FeatureSpace(name, size, segments=tuple(held))


def spaces_of(*spaces: FeatureSpace, opaque=("fc",), untouched=(), tied=None) -> Spaces:
    lowered = cast(Any, SimpleNamespace(tied=tied or {}))
    return Spaces(spaces, (), tuple(untouched), frozenset(opaque), lowered)


def norm(name: str) -> list[tuple[str, int, str]]:
    return [(f"{name}.{b}", 0, "vector") for b in BN]


def residual_spaces() -> Spaces:
    stream = [
        ("conv.weight", 0, "produce"),
        ("conv.bias", 0, "vector"),
        *norm("bn"),
        ("fc.weight", 1, "consume"),
    ]
    inner = []
    for b in ("block1", "block2"):
        stream += [
            (f"{b}.conv1.weight", 1, "consume"),
            (f"{b}.conv2.weight", 0, "produce"),
            *norm(f"{b}.bn2"),
        ]
        made = [(f"{b}.conv1.weight", 0, "produce"), *norm(f"{b}.bn1"), (f"{b}.conv2.weight", 1, "consume")]
        inner.append(space(b, INNER, *made))
    norms = ("bn", *(f"{b}.bn{k}" for b in ("block1", "block2") for k in (1, 2)))
    return spaces_of(space("s0", WIDTH, *stream), *inner, untouched=[f"{n}.num_batches_tracked" for n in norms])


def features(name: str):
    """feature_axis of Residual's boundary values."""
    if name == "x":
        return None
    axis = "block2" if name in ("block2_conv1", "block2_bn1", "block2_relu") else "s0"
    return (1,), [(axis, np.arange(INNER if axis == "block2" else WIDTH))]


def random_model(make: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for module in norms:
            for statistic in (module.weight, module.bias, module.running_mean):
                statistic.copy_(torch.randn_like(statistic))
            module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
            module.num_batches_tracked += seed
    return model.eval()


def permuted(model: nn.Module, spaces: Spaces, seed: int) -> tuple[Any, dict[str, Matching]]:
    """A copy with permuted features, and the matching that undoes it."""
    rng, twin = np.random.default_rng(seed), copy.deepcopy(model)
    state, matchings = state_by_all_names(twin), {}
    for s in spaces:
        order = rng.permutation(s.size)
        for g in s.segments:
            tensor = state[g.parameter].data
            index = torch.arange(tensor.shape[g.axis])
            index[g.positions] = index[g.positions[order]]
            tensor.copy_(tensor.index_select(g.axis, index))
        matchings[s.name] = from_slots(np.concatenate([np.arange(s.size), order]), s.size, (s.size, s.size))
    return twin, matchings


def zipped_of(
    models, spaces, matchings, x, until=None, names=("a", "b"), feature_axis: Any = features, **options
):
    graphs = [fx.symbolic_trace(m) for m in models]
    cut = partition(graphs[0], spaces.opaque, until)
    merged = merge_parameters([state_by_all_names(g) for g in graphs], spaces, matchings, owned(graphs[0], cut.shared))
    private = head_parameters(graphs, cut, spaces, matchings, feature_axis, (x,))
    originals = [m.state_dict() for m in models]
    return build(graphs, cut, merged, private, names, (x,), originals=originals, **options), private


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


X = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(0))


def permuted_pair():
    """A model, its permuted copy, and the matching between them."""
    spaces = residual_spaces()
    model = random_model(Residual, 1)
    twin, matchings = permuted(model, spaces, 2)
    close(twin(X), model(X))
    assert not torch.allclose(twin.conv.weight, model.conv.weight)
    return model, twin, spaces, matchings
