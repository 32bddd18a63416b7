"""Post passes for any network: batch-norm statistics anew, REPAIR and RESCALE."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from merging import DATA, digits, far, outputs, same_bytes
from torch import nn
from toys import randomise

import fxzip

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, width), nn.Linear(width, 16), nn.Linear(16, 3)

    def hidden(self, x):
        a = self.fc1(x)
        return [a, self.fc2(F.relu(a))]

    def forward(self, x):
        return self.head(F.relu(self.hidden(x)[-1]))


def plain(seed: int) -> Plain:
    return randomise(Plain(), seed).eval()  # type: ignore[return-value]


def between(a: nn.Module, b: nn.Module, share: float = 0.5) -> nn.Module:
    """What anyone may have made: the mean of two networks' weights."""
    half = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(half.parameters(), b.parameters(), strict=True):
            p.lerp_(q, share)
    return half


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("shift", [True, False], ids=["repair", "rescale"])
def test_features_get_the_models_means_and_deviations(shift, share):
    a, b = plain(1), plain(2)
    half = between(a, b, share)
    with unchanged([a, b, half]):
        fixed = fxzip.respread(half, [a, b], [X], shift=shift, model_weights=[1 - share, share])
    assert isinstance(fixed, Plain)
    for x, y, before, after in zip(*(m.hidden(X) for m in (a, b, half, fixed)), strict=True):  # type: ignore[union-attr]
        deviation = (1 - share) * x.std(0, correction=0) + share * y.std(0, correction=0)
        torch.testing.assert_close(after.std(0, correction=0), deviation, rtol=1e-3, atol=1e-4)
        assert (before.std(0) - deviation).abs().max() > 0.1
        if shift:
            mean = (1 - share) * x.mean(0) + share * y.mean(0)
            torch.testing.assert_close(after.mean(0), mean, rtol=1e-3, atol=1e-3)
    assert torch.equal(fixed.head.weight, half.head.weight)


def test_as_the_method_does():
    """Of a network that `merge` made by averaging: the same weights as method="average+repair"."""
    a, b = plain(1), plain(2)
    options = {"progress": False, "verify": False, "heads": "average"}
    found = Plain()
    found.load_state_dict(fxzip.extract(fxzip.merge([a, b], [X], method="average", **options), 0).state_dict())
    want = fxzip.extract(fxzip.merge([a, b], [X], method="average+repair", **options), 0)
    assert far(fxzip.respread(found, [a, b], [X])(X), want(X)) < 1e-5


def test_no_hook_stays_and_statistics_are_recomputed():
    a, b = digits(0), digits(1)
    half = between(a, b)
    fixed = fxzip.respread(half, [a, b], [DATA])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fixed.modules())
    h = fixed.stem(DATA)  # type: ignore[operator]
    torch.testing.assert_close(fixed.norm.running_mean, h.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


def test_statistics_are_those_of_the_batches():
    model = between(digits(0), digits(1))
    with unchanged(model):
        fixed = fxzip.reset_statistics(model, [(x, torch.zeros(len(x))) for x in DATA.split(16)])
    h = model.stem(DATA)  # type: ignore[operator]
    torch.testing.assert_close(fixed.norm.running_mean, h.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fixed.parameters(), strict=True))
    assert not fixed.training and far(outputs(fixed), outputs(model)) > 0.01
    assert same_bytes(fxzip.reset_statistics(fixed, [DATA]), fxzip.reset_statistics(model, [DATA]))


def test_what_cannot_be_done_is_refused():
    a, b = plain(1), plain(2)
    with pytest.raises(fxzip.InputError, match="reset_statistics: the network has no batch norm"):
        fxzip.reset_statistics(a, [X])
    with pytest.raises(fxzip.InputError, match="the loader yields no batch"):
        fxzip.reset_statistics(digits(), [])
    with pytest.raises(fxzip.InputError, match=r"another|architecture: fc1.weight is \[25, 6\], not \[24, 6\]"):
        fxzip.respread(Plain(25), [a, b], [X])
    with pytest.raises(fxzip.InputError, match="architecture: fc1.weight is missing"):
        fxzip.respread(nn.Linear(6, 3), [a, b], [X])
    bare = [nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
    with pytest.raises(fxzip.InputError, match="no layer before the head has a weight and a bias"):
        fxzip.respread(bare[2], bare[:2], [X])
