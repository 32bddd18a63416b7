"""Models without values: inspected by their shapes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers import unchanged
from torch import nn
from torch._subclasses.fake_tensor import is_fake

import fxzip


class Block(nn.Module):
    """Convolution, batch norm, attention with a mask made on the inputs' device, and a gather at constant places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        n, t, c = h.shape
        q, k, v = self.qkv(h).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        places = torch.arange(t, device=x.device)
        scores = (q @ k.transpose(2, 3)).masked_fill(places[:, None] < places, -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head((h + self.out(mixed))[:, places.flip(0)].mean(1))


X = torch.randn(2, 3, 8, 8)


def test_inspected_by_shapes():
    real, model = Block(), Block().to("meta")
    with unchanged(real):
        wanted = fxzip.inspect(real, X)
    for example in (X, X.to("meta")):
        found = fxzip.inspect(model, example)
        assert [(s.name, s.size, s.parameters, str(s.parents)) for s in found] == [
            (s.name, s.size, s.parameters, str(s.parents)) for s in wanted
        ]
        assert "on the meta device: shapes were compared, not values, and nothing is proven" in str(found)
    assert "meta" not in str(wanted)


class Checking(nn.Module):
    """As transformers does with positions: values are looked at where there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x)
        places = torch.arange(h.shape[1], device=h.device)
        if not is_fake(places) and bool((places < 0).any()):
            raise ValueError("places are negative")
        return self.head((h * places[:, None]).relu())


def test_code_that_checks_values_is_inspected():
    real, model = Checking(), Checking().to("meta")
    x = torch.randn(2, 3, 4)
    found = fxzip.inspect(model, x)
    assert [(s.name, s.size, s.parameters) for s in found] == [
        (s.name, s.size, s.parameters) for s in fxzip.inspect(real, x)
    ]


@pytest.mark.parametrize("call", [fxzip.verify, fxzip.scramble], ids=["verify", "scramble"])
def test_nothing_is_proven(call):
    with pytest.raises(fxzip.InputError) as error:
        call(Block().to("meta"), X)
    assert str(error.value) == (
        f"fxzip.{call.__name__}: conv.weight is on the meta device and has no values, so nothing can be computed;"
        " give it some (to_empty() and load_state_dict()), or see fxzip.inspect for what shapes alone tell"
    )
