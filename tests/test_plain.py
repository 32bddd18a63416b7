"""Weights that are computed before each forward: made plain with a notice, and the user's model as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxzip
from fxzip.trace import plain, trace

X = torch.randn(16, 3, 8, 8)


class Net(nn.Module):
    """Every way to have a weight computed."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
            self.conv2 = parametrizations.spectral_norm(nn.Conv2d(8, 10, 3))
            self.fc = nn.utils.weight_norm(nn.Linear(10, 9))
            self.fc2 = nn.utils.spectral_norm(nn.Linear(9, 7))
            self.head = parametrizations.orthogonal(nn.Linear(7, 3))

    def forward(self, x):
        h = F.relu(self.conv2(F.relu(self.conv(x)))).mean((2, 3))
        return self.head(F.relu(self.fc2(F.relu(self.fc(h)))))


COMPUTED = ["conv", "conv2", "fc", "fc2", "head"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    made(X)  # power iterations; and the old hooks leave a weight that torch does not copy
    return made


def test_plain_weights_are_those_of_eval_mode(model):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wanted = model.eval()(X)
    model.train()
    bare, notices = plain(model)
    tensors = {f"{c}.{t}" for c in COMPUTED for t in ("weight", "bias")}
    assert set(dict(bare.named_parameters())) == set(bare.state_dict()) == tensors
    assert [type(bare.get_submodule(c)) for c in COMPUTED] == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear, nn.Linear]
    assert torch.allclose(bare.eval()(X), wanted, atol=1e-6)
    plain_text = "computed by {}: the value in eval mode counts, and the result has plain weights"
    assert notices == (
        "conv.weight, fc.weight are " + plain_text.format("WeightNorm"),
        "conv2.weight, fc2.weight are " + plain_text.format("SpectralNorm"),
        "head.weight is " + plain_text.format("Orthogonal"),
    )
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model(X).sum().backward()  # still computed, still trained
    assert model.conv.parametrizations.weight.original0.grad is not None and model.fc.weight_g.grad is not None


def test_two_of_one_layer_and_shared_originals():
    layer = nn.Linear(4, 4)
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    other = nn.Linear(4, 4)
    parametrize.register_parametrization(other, "bias", nn.Tanh())
    other.parametrizations["bias"].original = layer.parametrizations["bias"].original
    both = nn.Sequential(layer, other)
    x = torch.randn(2, 4)
    assert torch.allclose(plain(both)[0](x), both(x), atol=1e-6)
    assert torch.allclose(plain(copy.deepcopy(both))[0](x), both(x), atol=1e-6)  # a copy shares its class


def test_what_is_plain_is_not_copied():
    made = nn.Linear(2, 2)
    assert plain(made) == (made, ())


def test_it_recovers_itself_from_a_scrambled_copy(model):
    with unchanged([model]):
        scrambled = fxzip.scramble(model, X)
        zipped = fxzip.merge([model, scrambled], [X], method="permute", progress=False)
    assert not torch.allclose(scrambled.conv.weight, model.conv.weight)
    wanted = model.eval()(X)
    assert all(torch.allclose(y, wanted, atol=1e-5) for y in zipped(X))
    assert any(n.startswith("task0: conv.weight") for n in fxzip.report(zipped).notices)
    assert set(fxzip.extract(zipped, "task0").state_dict()) == set(scrambled.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_saved_and_loaded_by_the_class_that_computes_them(model, tmp_path):
    zipped = fxzip.merge([model, Net()], [X], method="permute", progress=False)
    fxzip.save(zipped, tmp_path)
    loaded = fxzip.load(tmp_path, Net)
    assert all(torch.equal(a, b) for a, b in zip(zipped(X), loaded(X), strict=True))


def test_what_transformers_leaves_on_a_model_is_left_out():
    """Hooks that record, once it has run with output_hidden_states."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x, output_hidden_states=True).logits
    assert any(m._forward_hooks for m in model.modules())
    traced = trace(model, x)
    assert torch.allclose(traced.graph_module(x), wanted, atol=1e-5)
    assert any("that only look on: a forward hook of vit" in n for n in traced.notices)
