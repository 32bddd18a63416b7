"""What is shared runs one program for all models: numbers and functions in the code must be the same there."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzip
from fxzip.trace import compare_graphs, trace


class Pooled(nn.Module):
    def __init__(self, classes, pool):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, classes)
        self.pool = pool

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.first(x)), self.pool)
        return self.head(torch.relu(self.second(x)).amax((2, 3)))


class Attention(nn.Module):
    def __init__(self, classes, heads):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(5, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.head = nn.Linear(12, classes)
        self.heads = heads

    def forward(self, x):
        x = self.embed(x)
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


IMAGES, TOKENS = torch.randn(8, 3, 16, 16), torch.randn(8, 7, 5)


@pytest.mark.parametrize("made, x", [(lambda k, n: Pooled(k, n), IMAGES), (lambda k, n: Attention(k, n), TOKENS)])
def test_numbers_in_the_code_of_what_is_shared_must_be_equal_although_heads_differ(made, x):
    merge = partial(fxzip.merge, example_inputs=x, method="average", progress=False, verify=False)
    merge([made(3, 2), made(4, 2)])
    with pytest.raises(fxzip.InputError, match=r"not the same architecture: node \d+ is %(floordiv|max)"):
        merge([made(3, 2), made(4, 4)])


def test_blocks_of_other_sizes_are_refused_by_name():
    with pytest.raises(fxzip.InputError, match="not the same architecture: node"):
        fxzip.merge([Attention(3, 2), Attention(4, 3)], [TOKENS], progress=False)


def layer(act):
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, activation=act, batch_first=True))


def power(k):
    return lambda x: x**k


@pytest.mark.parametrize(
    "one, other, differs",
    [
        (F.silu, torch.tanh, "1.activation is silu in a and tanh in b"),
        (power(2), power(4), "1.activation is <lambda> in a and <lambda> in b"),
        (partial(F.elu, alpha=2.0), partial(F.elu, alpha=1.0), "1.activation is"),
        (power(2), power(2), ""),
        (partial(F.elu, alpha=2.0), partial(F.elu, alpha=2.0), ""),
    ],
)
def test_functions_that_a_whole_module_holds_are_compared(one, other, differs):
    found = compare_graphs([trace(layer(act), TOKENS) for act in (one, other)], ["a", "b"])
    assert (differs in found[0]) if differs else not found


def test_a_setting_that_only_the_second_model_has_is_seen():
    a, b = nn.Sequential(nn.AvgPool1d(2)), nn.Sequential(nn.AvgPool1d([3]))
    assert compare_graphs([trace(m, TOKENS) for m in (a, b)], ["a", "b"])
    a, b = (nn.Sequential(nn.LPPool1d(2, 2, stride=s)) for s in (None, 1))
    assert "0.stride is None in a and 1 in b" in compare_graphs([trace(m, TOKENS) for m in (a, b)], ["a", "b"])[0]
