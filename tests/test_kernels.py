"""Faster kernels of lowered graphs give what the operators give, and leave to these what they are not for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxzip.trace import lower, run, state_of
from fxzip.trace.kernels import aten, kernel

torch.set_num_threads(1)
X = torch.randn(3, 4, 9, 10, generator=torch.Generator().manual_seed(0))
POOLS = [dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=(2, 3), stride=(1, 2)),
         dict(kernel_size=2, ceil_mode=True), dict(kernel_size=2, dilation=2)]  # fmt: skip


def pooled(x: Tensor, indices: bool = False, **how) -> tuple[list[fx.Node], Tensor]:
    """The pools of a lowered graph, and what it gives."""

    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = F.max_pool2d(x, return_indices=indices, **how)
            return found[0] + found[1] if indices else found

    graph_module = fx.symbolic_trace(Pool().eval())
    lowered = lower(graph_module, (x,))
    nodes = [n for n in lowered.graph.nodes if n.target is aten.max_pool2d_with_indices.default]
    return nodes, run(lowered, state_of(graph_module), (x,))


@pytest.mark.parametrize("how", POOLS, ids=str)
def test_max_pools_are_torch_s(how):
    nodes, found = pooled(X, **how)
    assert len(nodes) == 1 and kernel(nodes[0]) is not nodes[0].target
    assert torch.equal(found, F.max_pool2d(X, **how))


def test_max_pools_of_what_is_no_plain_image():
    for x in (X.double(), X[0], X.contiguous(memory_format=torch.channels_last), X[..., ::2]):
        assert torch.equal(pooled(x, kernel_size=2)[1], F.max_pool2d(x, 2))
    broken = X.clone()
    broken[0, 0, 0, 0], broken[1] = float("nan"), float("inf")
    torch.testing.assert_close(pooled(broken, kernel_size=2)[1], F.max_pool2d(broken, 2), equal_nan=True)


def test_max_pools_whose_indices_are_read_are_torch_s_own():
    nodes, found = pooled(X, indices=True, kernel_size=2)
    values, where = F.max_pool2d(X, 2, return_indices=True)
    assert kernel(nodes[0]) is nodes[0].target and torch.equal(found, values + where)


@pytest.mark.parametrize("masked", ["nothing", "a few", "whole rows", "nan"])
def test_softmax_is_torch_s_safe_one(masked):
    x, hidden = X.clone(), float("nan") if masked == "nan" else float("-inf")
    if masked != "nothing":
        x[0, 1, 2, :3] = hidden
    if masked == "whole rows":
        x[1, 2, 3] = hidden
    node = fx.Graph().call_function(aten._safe_softmax.default, (x, -1))
    found, wanted = kernel(node)(x, -1), aten._safe_softmax.default(x, -1)
    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1)) and bool(wanted.isnan().any()) == (masked == "nan")
    assert masked != "whole rows" or not found[1, 2, 3].any()


def test_gradients_pass_through_them():
    x = X.clone().requires_grad_(True)
    graph = fx.Graph()
    for target, args in ((aten._safe_softmax.default, (-1,)), (aten.max_pool2d_with_indices.default, ([2, 2],))):
        made = kernel(graph.call_function(target, args))(x, *args)
        made = made if isinstance(made, Tensor) else made[0]
        assert made.requires_grad and torch.autograd.grad(made.square().sum(), x)[0].any()
