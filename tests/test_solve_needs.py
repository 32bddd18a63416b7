"""What solve says it needs, against the shapes of single layers; copies are as many as were measured once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxzip.solve import CHUNK, FitNeed, Settings, SolveNeeds, chunk_size, solve_needs
from fxzip.trace import Lowered, lower

torch.set_num_threads(1)
FEW = Settings(rows=2, least=10)


class Product(nn.Module):
    """x @ W + b: the weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def lowered(layer: nn.Module, *shape: int, batch: int) -> Lowered:
    net = nn.Sequential()
    net.add_module("layer", layer)
    return lower(fx.symbolic_trace(net).eval(), (torch.ones(batch, *shape),))


@pytest.mark.parametrize(
    "layer, shape, groups, columns, outputs, positions",
    [
        (nn.Linear(6, 4), (6,), 1, 6, 4, 1),
        (nn.Linear(6, 1), (5, 6), 1, 6, 1, 5),
        (Product(), (6,), 1, 6, 4, 1),
        (nn.Conv2d(6, 4, (3, 2)), (6, 7, 5), 1, 36, 4, 20),
        (nn.Conv2d(6, 9, 3, groups=3), (6, 5, 4), 3, 18, 3, 6),
        (nn.Conv1d(6, 6, 3, groups=6), (6, 9), 6, 3, 1, 7),
        (nn.ConvTranspose2d(6, 8, (3, 2), groups=2), (6, 3, 3), 2, 18, 4, 20),
        (nn.ConvTranspose1d(6, 1, 3, 2), (6, 4), 1, 18, 1, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [FEW, Settings(rows=1000, least=10)])
def test_a_fit_holds_its_gram_matrices_and_its_rows(layer, shape, groups, columns, outputs, positions, settings):
    """Of 7 samples at a time, 21 in all: of three chunks each gives a third of the rows, or all it has; they are added
    together."""
    found = solve_needs(lowered(layer, *shape, batch=3), 3, 21, 7, 2, settings)
    rows = 3 * min(max(settings.rows * columns, 10) // 3 + 1, 7 * positions)
    grams = int(8 * groups * (3.5 * columns * columns + 9 * outputs * columns))
    copies = 4 * groups * rows * (4 * columns + 5 * outputs)
    name = "addmm" if isinstance(layer, Product) else "layer"
    assert found.fits == (FitNeed(name, columns, grams + copies, outputs, groups),)


def test_rows_that_are_added_together_are_few():
    """Chunks of one sample each, 64 in all, with 1,000 rows and one more each: of two, and what 2,048 rows more are."""
    settings = Settings(rows=1, least=64_000, plenty=10_000)
    found = solve_needs(lowered(nn.Conv2d(6, 4, 3), 6, 42, 42, batch=1), 1, 64, 1, 2, settings)
    grams = int(8 * (3.5 * 54**2 + 9 * 4 * 54))
    assert found.fits[0].size == grams + 4 * (1_001 + 2_048) * (4 * 54 + 5 * 4)


class Branches(nn.Module):
    """A weight that is made of another, larger than any value; a product of two values; one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Linear(16, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = torch.mm(x, x.t())
        return self.b(torch.mm(y, x)) * self.w.exp().mean()


def test_values_of_all_networks_count_and_weights_do_not():
    """In float32, at batches of 2; the input is larger."""
    graph = lower(fx.symbolic_trace(Branches()).eval(), (torch.ones(2, 16),))
    found = solve_needs(graph, 2, 7, 3, 2, FEW)
    assert found.value == 2 * 4 * 4 * 3 // 2 and found.values > 2 * found.value
    assert found.activations == 4 * (2 * 2 + 2 * 4 + 2 * 4) * 7 // 2 * 3, "y, x and what is made of them"
    assert [f.node for f in found.fits] == ["a", "b"]
    assert solve_needs(graph, 2, 7, 99, 2, FEW).value == 2 * 4 * 4 * 7 // 2, "no more at once than there are"


@pytest.mark.parametrize("samples", [1, 4])
def test_samples_that_run_at_once_are_fewer_where_their_values_are_large(samples):
    """32 MB of one value; the input, which is there anyway, does not count."""

    def at_once(size: int) -> int:
        images = torch.ones(samples, 1, size, size, device="meta")
        return chunk_size(lower(fx.symbolic_trace(nn.Conv2d(1, 16, 1)).eval(), (images,)))

    assert [at_once(size) for size in (8, 64, 128, 224, 4096)] == [CHUNK, CHUNK, 32, 8, 1]


def test_the_largest_fit_and_two_values_are_at_work():
    some = SolveNeeds((FitNeed("a", 3, 50), FitNeed("b", 9, 70), FitNeed("c", 5, 60)), 1000, 8)
    assert some.largest.node == "b" and some.work == 70 + 16
    nothing = solve_needs(lowered(nn.Identity(), 3, batch=1), 1, 1, 1, 2, FEW)
    assert nothing == SolveNeeds((), 0, 0) and nothing.largest == FitNeed("", 0, 0) and nothing.work == 0
