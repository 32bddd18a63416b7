"""What solve computes on its way is what the merged network computes in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import randomise

import fxzip

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")


class Tied(nn.Module):
    """A decoder that is its model's own is tied to the embedding, which is shared; more of its own follows."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.dec = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, i: Tensor) -> Tensor:
        x = self.emb(i)
        x = x + torch.relu(self.mid(x))
        return self.head(torch.relu(self.dec(x)).mean(1))


def tied(seed: int) -> nn.Module:
    net = randomise(Tied(), seed).eval()
    net.dec.weight = net.emb.weight
    return net


def errors(zipped: nn.Module, nets: list[nn.Module], x: Tensor) -> list[float]:
    """E|y - y'|^2 / E|y|^2 of every model's output."""
    with torch.no_grad():
        pairs = [(n(x).double(), y.double()) for n, y in zip(nets, zipped(x), strict=True)]
    return [float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in pairs]


def test_the_error_that_is_reported_of_a_head_is_that_of_the_network():
    x = torch.randint(20, (512, 6), generator=torch.Generator().manual_seed(0))
    nets = [tied(seed) for seed in range(2)]
    zipped = fxzip.merge(nets, [x], progress=False, verify=False)
    reported = [row.after for row in fxzip.report(zipped).layers if row.node == "head"]
    assert reported == pytest.approx(errors(zipped, nets, x), rel=1e-3)
