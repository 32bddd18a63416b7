"""Parts of rewrite against what they are by definition: dense matrices, models run by hand, odd small networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip.errors import InputError

torch.set_num_threads(1)
X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


class Ends(nn.Module):
    """Two layers and a head, behind which comes what a test wants."""

    def __init__(self, end) -> None:
        super().__init__()
        self.a, self.b, self.head, self.end = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), end

    def forward(self, x: Tensor):
        return self.end(self.head(self.b(self.a(x).relu()).relu()))


def two(end) -> list[nn.Module]:
    return [randomise(Ends(end), seed).eval() for seed in range(2)]


@pytest.mark.parametrize("weights", [None, [3, 1]])
@pytest.mark.parametrize(
    "end, said",
    [
        (lambda y: y.argmax(1), "%argmax is int64"),
        (lambda y: (y, y > 0, y.int()), "%gt is bool, %int_1 is int32"),
    ],
)
def test_no_mean_of_indices_or_truth_values(end, said, weights):
    with pytest.raises(InputError, match=f"cannot average indices or truth values, and of the outputs {said};"):
        fxzip.merge(two(end), [X], heads="average", model_weights=weights, progress=False)


@pytest.mark.parametrize("heads", ["average", "concat"])
@pytest.mark.parametrize(
    "end, said", [(lambda y: y.split([1, 2], 1), "%split is of type tuple"), (lambda y: (y, y.shape[0]), "of type int")]
)
def test_outputs_are_joined_one_by_one(end, said, heads):
    with pytest.raises(InputError, match=f'heads="{heads}" needs outputs that are tensors one by one, but .*{said};'):
        fxzip.merge(two(end), [X], heads=heads, progress=False)


@pytest.mark.parametrize("end", [lambda y: (y, y > 0), lambda y: (y > 0) * 2.0])
def test_a_head_behind_which_truth_values_come_is_fitted_itself(end):
    """Nothing to refine there, and who gets the scores reads them, too."""
    nets = two(end)
    plain, compared = (fxzip.merge(n, [X], progress=False) for n in (two(lambda y: y), nets))
    for i in range(2):
        name = f"head_task{i}"
        torch.testing.assert_close(compared.get_submodule(name).weight, plain.get_submodule(name).weight)
