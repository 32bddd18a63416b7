"""Which operands of a layer are entries of one parameter, so that a fit can write them, and which entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzip
from fxzip.memory import Store
from fxzip.solve.lanes import Lane
from fxzip.solve.slots import Slot, argument, arguments

torch.set_num_threads(1)


class Net(nn.Module):
    """A linear map [n, 6] -> [n, o] with a weight that `make` gets from parameters; all of them are positive."""

    def __init__(self, make: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.rand(6, 6) + 0.5) for _ in range(2))
        self.tied, self.scale = self.w, nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("order", torch.randperm(6))
        self.register_buffer("constant", torch.rand(6, 6), persistent=False)
        self.make = make

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.linear(x, self.make(self, t)) * self.scale[0]


def lane_of(net: nn.Module, *inputs: Tensor) -> Lane:
    lowered = fxzip.inspect(net.eval(), inputs).lowered
    return Lane(lowered, {n.name: n for n in lowered.graph.nodes}, dict(net.state_dict()), Store(0))


def operand(make: Callable[[Net, Tensor], Tensor]) -> tuple[Lane, torch.fx.Node]:
    torch.manual_seed(0)
    lane = lane_of(Net(make), torch.randn(4, 6), torch.randn(6, 6))
    linear = next(n for n in lane.lowered.graph.nodes if "linear" in str(n.target))
    return lane, argument(linear, "weight")


MOVED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "the parameter": lambda n, t: n.w,
    "by its other name": lambda n, t: n.tied,
    "transposed": lambda n, t: n.w.t(),
    "in another shape": lambda n, t: n.w.reshape(3, 2, 6).transpose(0, 1).flatten(0, 1),
    "a part, turned round": lambda n, t: n.w[1:4].flip(1),
}


@pytest.mark.parametrize("make", MOVED.values(), ids=list(MOVED))
def test_an_operand_that_is_moved_from_a_parameter_can_be_written(make):
    lane, node = operand(make)
    slot = Slot.of(lane, node)
    assert slot is not None
    before = lane.state["w"].clone()
    torch.testing.assert_close(before.flatten()[slot.index], lane.static(node), atol=0, rtol=0)
    value = -torch.rand(slot.index.shape, dtype=torch.float64)
    slot.write(lane, value)
    torch.testing.assert_close(lane.static(node), value.float(), atol=0, rtol=0)
    rest = torch.ones(36, dtype=torch.bool).index_fill(0, slot.index.flatten(), False)
    assert torch.equal(lane.state["w"].flatten()[rest], before.flatten()[rest])


NOT_MOVED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "twice": lambda n, t: n.w * 2,
    "less one": lambda n, t: n.w - 1,
    "and one": lambda n, t: n.w + 1,
    "negative": lambda n, t: -n.w,
    "positive": lambda n, t: n.w.abs(),  # as all entries are
    "what is above zero": lambda n, t: n.w.clamp(min=0),
    "whole": lambda n, t: n.w.round(),
    "in half precision": lambda n, t: n.w.half().float(),
    "a function": lambda n, t: n.w.exp(),
    "a row, again and again": lambda n, t: n.w[:1].expand(6, 6),
    "of two parameters": lambda n, t: torch.cat([n.w[:3], n.v[:3]]),
    "used twice": lambda n, t: n.w + 0 * n.w.t(),
    "used elsewhere": lambda n, t: n.scale.expand(6, 6),
    "of parameter and data": lambda n, t: torch.cat([n.w[:3], t[:3]]),
    "data": lambda n, t: t,
    "a constant": lambda n, t: n.constant,
    "by a table": lambda n, t: n.w[n.order],
}


@pytest.mark.parametrize("make", NOT_MOVED.values(), ids=list(NOT_MOVED))
def test_an_operand_that_is_more_than_moved_is_left_alone(make):
    lane, node = operand(make)
    before = {n: v.clone() for n, v in lane.state.items()}
    assert Slot.of(lane, node) is None
    assert all(torch.equal(v, before[n]) for n, v in lane.state.items())


def test_no_operand_has_no_slot():
    assert Slot.of(operand(MOVED["the parameter"])[0], None) is None


def test_arguments_of_an_operator_by_name():
    lane = lane_of(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False, groups=2), nn.GELU("tanh"), nn.GELU()),
                   torch.randn(1, 4, 5, 5))  # fmt: skip
    conv, tanh, gelu = (n for n in lane.lowered.graph.nodes if n.op == "call_function")
    assert arguments(conv) == dict(zip(
        ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"),
        (*conv.args[:2], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2), strict=True))  # fmt: skip
    assert argument(conv, None) is None and argument(conv, "mat2") is None
    assert argument(tanh, "approximate") == "tanh" and argument(gelu, "approximate") == "none"
