"""What a budget counts: FLOPs, as torch counts them; and what another width must not change."""

import pytest
import torch
from torch import nn

import fxzip
from fxzip.evaluate import cost
from fxzip.infer import analyse
from fxzip.rewrite import partition
from fxzip.trace import trace
from fxzip.widths import cost_terms, flops


class Product(nn.Module):
    """A weight that is laid out [inputs, outputs]."""

    def __init__(self, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.zeros(32)) if bias else None

    def forward(self, x):
        rows = x.flatten(0, 1)
        y = torch.mm(rows, self.weight) if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.view(-1, x.shape[1], 32)


@pytest.mark.parametrize(
    "layers, shape",
    [
        ((Product(False), nn.ReLU(), nn.Linear(32, 3)), (2, 6, 8)),
        ((Product(True), nn.ReLU(), nn.Linear(32, 3)), (2, 6, 8)),
        ((nn.Conv1d(5, 8, 3), nn.ConvTranspose1d(8, 6, 4, stride=2, groups=2), nn.Conv1d(6, 2, 1)), (2, 5, 9)),
        ((nn.Conv1d(5, 8, 3), nn.ReLU(), nn.Conv1d(8, 12, 3, groups=4), nn.Conv1d(12, 2, 1)), (2, 5, 9)),
    ],
)
def test_terms_add_up_to_what_torch_counts(layers, shape):
    net, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    graph = trace(net, x).graph_module
    spaces = analyse(graph, (x,))
    assert flops(cost_terms(spaces, partition(graph, spaces.opaque), 1), {}) == cost(net, x[:1]).flops


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.far, self.head = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, padding=8, dilation=8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head((x + self.far(x)).mean(2))


def test_a_dilation_as_large_as_a_width_stays():
    nets, x = [Dilated().eval() for _ in range(2)], torch.randn(64, 3, 40)
    far = fxzip.merge(nets, [x], method="zip", budget=3.9, progress=False, verify=False).get_submodule("far")
    assert far.in_channels == far.weight.shape[1] == 16
    assert far.dilation == far.padding == (8,)


def test_a_width_that_a_module_insists_on_leaves_the_others_free():
    """Shifted windows are cut with the channels written into the call: the streams stay, the MLPs grow."""
    swin = pytest.importorskip("torchvision.models.swin_transformer").SwinTransformer
    torch.manual_seed(0)
    nets = [swin([2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=3).eval() for _ in range(2)]
    zipped = fxzip.merge(nets, [torch.randn(8, 3, 32, 32)], method="zip", budget=1.3, progress=False, verify=False)
    rows = fxzip.report(zipped).spaces
    grown = {r.width_in[0]: r.width for r in rows if r.width > r.width_in[0]}
    assert grown and set(grown) <= {64, 128}, "four times the streams' 16 and 32"
    assert cost(zipped, torch.randn(1, 3, 32, 32)).flops > 1.1 * cost(nets[0], torch.randn(1, 3, 32, 32)).flops
