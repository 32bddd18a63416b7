"""The proof where little can be proven: silent units, constant outputs, rounding, spaces that are no group."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip.infer import FeatureSpace, Parent, Segment, analyse, counted_outputs
from fxzip.infer.engine import Inference, tensor_nodes
from fxzip.infer.families import read_spaces
from fxzip.infer.sampling import sample
from fxzip.infer.spaces import MAKES
from fxzip.trace import lower, trace
from fxzip.verify import Verification, _distance, verify_spaces


def test_units_that_are_silent_on_the_example_do_not_fail_the_proof():
    """A draw whose units say nothing is repeated on more samples: six units are sound whatever their weights."""
    for seed in range(24):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
        assert fxzip.verify(model, torch.randn(2, 4)).ok


class Quiet(nn.Module):
    """A straight path, and beside it features that change nothing: silenced, multiplied by zero, or averaged to it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last, self.past = kind, nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)
        self.register_buffer("nothing", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "silent":
            return self.past(x) + self.last(F.relu(h - 1000))
        if self.kind == "zero":
            return self.past(x) + self.nothing * self.last(F.relu(h))
        return self.past(x) + F.layer_norm(h, [8]).mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["silent", "zero", "mean"])
def test_features_that_change_nothing_are_proven_on_random_parameters(kind):
    model, x = randomise(Quiet(kind)).eval(), torch.randn(16, 6)
    found = fxzip.verify(model, x)
    assert found.ok and found.redrawn and "on random parameters" in str(found)
    zipped = fxzip.merge([model, fxzip.scramble(model, x)], [x], method="permute", progress=False)
    assert all(torch.allclose(y, model(x), atol=1e-4) for y in zipped(x))


def test_an_output_that_is_constant_proves_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Softmax(-1)).eval()
    with pytest.raises(fxzip.VerificationError, match="the output hardly depends on the input"):
        fxzip.merge([model, model], [torch.randn(8, 4)], progress=False)


def test_every_space_moves_in_the_proof():
    """The identity is every second draw for two features."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(4)), nn.Linear(2, 2)).eval()
    spaces = fxzip.inspect(net, torch.randn(2, 2))
    for seed in range(20):
        drawn = sample(spaces, np.random.default_rng(seed), draws=32)
        assert len(drawn) == 4 and all(p.tolist() == [1, 0] for p in drawn.values())


def test_no_output_of_several_is_left_out_of_the_proof():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert all(np.isnan(_distance(given, [one, one])) for given in ([one, nan], [nan, one]))
    assert _distance([one, 2 * one, one[:0]], [one, one, one[:0]]) == 1


def test_indices_alone_are_no_proof_and_no_fault():
    class Labels(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    model = Labels(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(fxzip.VerificationError, match=r"(?s)^NOT PROVEN.*indices or truth values alone.*forward_fn="):
        fxzip.merge([model, model], [torch.randn(8, 4)], progress=False)
    assert fxzip.verify(model, torch.randn(8, 4), forward_fn=lambda m, x: nn.Sequential(*m)(x))


def test_spaces_that_are_no_group_are_named():
    """Two blocks of one and of two features cannot change places."""
    block = FeatureSpace("s0", 2)
    rows = Segment("fc.weight", 0, np.arange(3), MAKES)
    inside = FeatureSpace("s1", 3, (Parent("s0", np.array([0, 0, 1])),), (rows,))
    said = r"^s1 \(fc.weight\): it cannot follow .* blocks s0, .*; please report it, and merge a part of the model"
    with pytest.raises(fxzip.SpaceError, match=said):
        sample([block, inside], np.random.default_rng(0), draws=16)


def test_features_that_come_twice_along_an_axis_are_named():
    """As if inference had taken the first column of a weight for its second, too."""
    traced = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    inference = Inference(lower(traced.graph_module, (torch.randn(1, 4),)))
    solution = inference.run(tensor_nodes(counted_outputs(inference.lowered.outputs)))
    rows, columns = inference.axes["2.weight"]
    inference.axes["2.weight"] = rows, columns[[0, 0, *range(2, 8)]]
    said = r"^2.weight\[axis 1\]: the features of s0 do not .*; please report it, and merge a part of the model without"
    with pytest.raises(fxzip.SpaceError, match=said):
        read_spaces(inference, solution)


def test_amplified_rounding_is_no_proof_and_no_disproof():
    proof = Verification(0.03, {"w[0]": 0.5}, 1e-9, 0.4, 0.9, 3)
    assert not proof.ok and not proof.inconclusive and "a random group element changes" in str(proof)
    proof = replace(proof, rounding=5e-6)
    assert not proof.ok and proof.inconclusive
    assert "rounding alone changes the output by 5.0e-06 (tolerance 1e-06): nothing is proven" in str(proof)


def test_rounding_is_measured_where_the_error_is_not_small():
    class Chaos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.b(torch.tanh(self.a(x))))
            for _ in range(70):  # the logistic map doubles an error each time
                x = 4 * x * (1 - x)
            return x

    torch.manual_seed(0)
    for proof in (fxzip.verify(Chaos().eval(), torch.randn(2, 4), seed=s) for s in range(3)):
        assert proof.ok or proof.chaotic, proof


def test_what_a_proof_needed_is_freed_without_a_collection():
    """The float64 copy of a model takes twice its memory, and a GraphModule frees nothing by itself."""
    model, x = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2)).eval(), torch.randn(2, 4)
    traced = trace(model, x)
    spaces = analyse(traced.graph_module, (x,))

    def large() -> set[int]:
        every = (t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float64)
        return {t.data_ptr() for t in every if t.numel() >= 300}

    gc.collect()
    gc.disable()
    try:
        before = large()  # of other tests
        assert verify_spaces(traced, spaces, (x,)).ok
        assert large() <= before
    finally:
        gc.enable()
