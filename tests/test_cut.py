"""Where the shared part ends: above layers of other shapes, and above what no private part could read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzip

torch.manual_seed(0)
X = torch.randn(24, 3, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore")


class Detector(nn.Module):
    """A trunk, a branch for boxes, and one for classes whose inner width goes with their number."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.box = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.cls = nn.Sequential(nn.Conv2d(12, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, classes, 1))

    def forward(self, x):
        h = F.relu(self.trunk(F.relu(self.stem(x))))
        return torch.cat([self.box(h), self.cls(h)], 1)


def test_a_branch_of_another_width_stays_per_model(tmp_path):
    a, b = Detector(3, 6), Detector(5, 9)
    with torch.no_grad():  # b is a, in another order and with another branch
        order, same = torch.randperm(12), {k: v for k, v in a.state_dict().items() if not k.startswith("cls")}
        b.load_state_dict(same, strict=False)
        b.trunk.weight.copy_(a.trunk.weight[order])
        b.trunk.bias.copy_(a.trunk.bias[order])
        b.box[0].weight.copy_(a.box[0].weight[:, order])
    zipped = fxzip.merge({"a": a, "b": b}, [X], method="permute", until="cls", progress=False)
    outputs = zipped(X)
    assert torch.allclose(outputs["a"], a(X), atol=1e-5) and torch.allclose(outputs["b"], b(X), atol=1e-5)
    names = set(zipped.state_dict())
    assert {"stem.weight", "trunk.weight", "box.0.weight"} <= names and "cls.0.weight" not in names
    assert zipped.get_parameter("cls.0_a.weight").shape[0] == 6  # nothing of it was widened
    fxzip.save(zipped, tmp_path)
    loaded = fxzip.load(tmp_path, lambda task: Detector(3, 6) if task == "a" else Detector(5, 9))
    assert torch.equal(loaded(X)["b"], outputs["b"])


def test_a_branch_of_another_width_is_merged_otherwise(tmp_path):
    zipped = fxzip.merge({"a": Detector(3, 6), "b": Detector(5, 9)}, [X], method="permute", progress=False)
    assert zipped.get_parameter("cls.0.weight").shape[0] == 9
    fxzip.save(zipped, tmp_path)
    loaded = fxzip.load(tmp_path, lambda task: Detector({"a": 3, "b": 5}[task], 9))  # all at the widths of the widest
    assert torch.equal(loaded(X)["b"], zipped(X)["b"])


def test_where_nothing_is_left_the_shapes_are_the_error():
    with pytest.raises(fxzip.InputError, match=r"stem.weight is \[8, 3, 3, 3\] in task0 and \[9, 3, 3, 3\] in task1"):
        other = Detector(3, 5)  # wider here, narrower there: neither can be taken for the widths of both
        other.stem, other.trunk = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 12, 3)
        fxzip.merge([Detector(3, 6), other], [X], method="permute", progress=False)


class Mixer(nn.Module):
    """The head reads a value whose channels and whose hidden tokens are both merged."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.mix1, self.mix2 = nn.Linear(4, 10), nn.Linear(10, 4)
        self.tokens, self.head = nn.Linear(4, 7), nn.Linear(7, classes)

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = h + self.mix2(F.gelu(self.mix1(self.norm(h).transpose(1, 2)))).transpose(1, 2)
        return self.head(F.gelu(self.tokens(h.transpose(1, 2)))).amax(1)


def test_the_cut_moves_above_features_along_several_axes():
    model = Mixer()
    zipped = fxzip.merge([model, fxzip.scramble(model, X)], [X], method="permute", progress=False)
    assert all(torch.allclose(y, model(X), atol=1e-5) for y in zipped(X))
    assert "mix1.weight" in zipped.state_dict() and "tokens.weight" not in zipped.state_dict()
    assert [y.shape[1] for y in fxzip.merge([model, Mixer(4)], [X], method="solve", progress=False)(X)] == [3, 4]


def test_a_cut_that_was_asked_for_stays_an_error():
    with pytest.raises(fxzip.SpaceError, match="%gelu_1 has merged features along several axes"):
        fxzip.merge([Mixer(), Mixer()], [X], method="permute", until="head", progress=False)
