"""Grouped convolutions: what a group reads may be in any order, in every group another; groups move as a whole.

The inputs' group is a wreath product. Scrambled copies are made here by hand, from the weights alone.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import unchanged
from merging import far
from torch import Tensor, nn

import fxzip
from fxzip.infer.group import axis_indices, duplicated, moved, permuted
from fxzip.infer.inner import gathered, permuted_inside, spread
from fxzip.infer.sampling import sample
from fxzip.rewrite import recompute_statistics

GROUPS, READ, MADE = 4, 3, 5  # groups; features that each reads and makes


class Grouped(nn.Module):
    """One grouped convolution between two plain ones."""

    def __init__(self, transposed: bool = False, returns: bool = False) -> None:
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.before, self.norm = nn.Conv2d(3, GROUPS * READ, 3), nn.BatchNorm2d(GROUPS * READ)
        self.conv = kind(GROUPS * READ, GROUPS * MADE, 3, groups=GROUPS)
        self.after, self.head = nn.Conv2d(GROUPS * MADE, 7, 1), nn.Linear(7, 3)
        self.returns = returns

    def forward(self, x: Tensor):
        h = self.conv(self.norm(self.before(x)).relu()).relu()
        out = self.head(self.after(h).relu().mean((2, 3)))
        return (out, self.conv.weight) if self.returns else out


def made(*args: bool) -> Grouped:
    torch.manual_seed(0)
    net = Grouped(*args).eval()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.3 * (torch.rand_like(tensor) if "var" in name else torch.randn_like(tensor)))
    recompute_statistics(net, batches(), lambda batch: (batch,))
    return net


def batches() -> list[Tensor]:
    return [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(net: Grouped, order: list[int], read: Tensor, made: Tensor) -> Grouped:
    """A copy with groups in another `order`, and in group g the features it reads in the order read[g], those it makes
    in the order made[g]."""
    rows = torch.stack([h * READ + read[g] for g, h in enumerate(order)]).flatten()
    outs = torch.stack([h * MADE + made[g] for g, h in enumerate(order)]).flatten()
    other = Grouped().eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for name in state:
        if name.startswith(("before", "norm")) and state[name].dim():
            state[name] = state[name][rows]
    state["conv.bias"], state["after.weight"] = state["conv.bias"][outs], state["after.weight"][:, outs]
    weight = state["conv.weight"]
    blocks = [weight[outs[g * MADE : (g + 1) * MADE]][:, read[g]] for g in range(GROUPS)]
    state["conv.weight"] = torch.cat(blocks)
    other.load_state_dict(state)
    return other


def orders(seed: int, size: int) -> Tensor:
    """A random order of `size` for every group. [g, size]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(GROUPS)])


SWAPPED = [2, 0, 3, 1]


@pytest.mark.parametrize("transposed", [False, True])
def test_each_group_orders_what_it_reads_by_itself(transposed):
    spaces = fxzip.inspect(made(transposed), images(1))
    block, read, out, rest = spaces
    assert (block.size, block.segments) == (GROUPS, ()) and rest.size == 7
    assert (read.size, read.structure) == (GROUPS * READ, f"{GROUPS} x {READ}")
    assert (out.size, out.structure) == (GROUPS * MADE, f"{GROUPS} x {MADE}")
    assert [p.space for s in (read, out) for p in s.parents] == [block.name] * 2
    assert not read.orthogonal_only  # some layer reads it: widths, zip and solve apply, not permutations alone
    (inner,) = (s for s in (*read.segments, *out.segments) if s.blocks > 1)
    assert (inner.parameter, inner.axis, inner.blocks, sorted(inner.positions)) == (
        "conv.weight", 1, GROUPS, list(range(len(inner.positions)))
    )  # fmt: skip
    assert inner.roles == {"produce" if transposed else "consume"}


def test_two_grouped_convolutions_in_a_row():
    """Four groups that feed two: what the four make is ordered inside the half of a group of two."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 12, 1, groups=2),
        nn.ReLU(), nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    spaces = fxzip.inspect(net, images(1))
    assert sorted((s.size, s.structure) for s in spaces if s.segments) == [(8, "4 x 2"), (12, "2 x 6"), (16, "4 x 4")]
    assert sorted((s.size, s.structure) for s in spaces if not s.segments) == [(2, "2"), (4, "2 x 2")]
    assert fxzip.verify(net, images(2)).ok


def test_depthwise_and_one_group_have_no_blocks_on_an_axis():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    spaces = fxzip.inspect(net, images(1))
    assert [(s.size, s.structure) for s in spaces] == [(8, "8")]
    assert all(g.blocks == 1 for s in spaces for g in s.segments)


@pytest.mark.parametrize("net, size", [(made(False, True), None), (made(), 12)], ids=["returned", "not returned"])
def test_a_weight_that_is_an_output_is_pinned_whole(net, size):
    found = [s.size for s in fxzip.inspect(net, images(1)) if "before.weight" in s.parameters]
    assert found == ([size] if size else [])


def test_what_serves_a_group_of_outputs_alone_stays_per_model():
    """Outputs are other classes in every model, and so are groups of them: as with units that vote for one class."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2))
    spaces = fxzip.inspect(net.eval(), images(1))
    assert sorted(s.structure for s in spaces) == ["4", "4", "8"] and fxzip.verify(net, images(2)).ok
    zipped = fxzip.merge([net, copy.deepcopy(net)], [images(32)], method="permute", progress=False)
    names = dict(zipped.named_parameters())
    assert "0.weight" in names and "2.weight" not in names, list(names)


def test_a_weight_with_another_use_is_ordered_alike_in_every_group():
    """Where something else reads the weight, its second axis is one axis, and groups share an order."""

    class Norm(Grouped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / self.conv.weight.abs().amax((0, 2, 3)).sum()

    net = Norm().eval()
    (read,) = (s for s in fxzip.inspect(net, images(1)) if "before.weight" in s.parameters)
    assert read.structure == f"{GROUPS * READ} x 1" and len(read.parents) == 2
    assert fxzip.verify(net, images(2)).ok


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_elements_leave_the_output(transposed, seed):
    """And they are no direct product: orders inside groups differ. Leaving out either axis of the weight shows."""
    net, x = made(transposed).double(), images().double()
    spaces = fxzip.inspect(net, x[:1])
    wanted, state = net(x), dict(net.state_dict())
    draw = sample(spaces, np.random.default_rng(seed), draws=16)
    indices = axis_indices(spaces, draw, state)
    inside = indices["conv.weight", 1].reshape(GROUPS, -1) % (MADE if transposed else READ)
    assert len(np.unique(inside, axis=0)) > 1

    def error(leave_out: list[tuple[str, int]]) -> float:
        with torch.no_grad():
            return far(torch.func.functional_call(net, permuted(state, indices, leave_out), (x,)), wanted)

    assert error([]) < 1e-12
    assert all(error([("conv.weight", axis)]) > 1e-3 for axis in (0, 1))


def test_every_order_by_hand_is_in_the_group():
    """What `by_hand` does to parameters is what the spaces' own element does to them."""
    net, read, out = made(), orders(1, READ), orders(2, MADE)
    twin = by_hand(net, SWAPPED, read, out)
    assert far(twin(images()), net(images())) < 1e-5
    block, reads, makes, rest = fxzip.inspect(net, images(1))
    element = {
        block.name: np.array(SWAPPED),
        reads.name: np.concatenate([h * READ + read[g].numpy() for g, h in enumerate(SWAPPED)]),
        makes.name: np.concatenate([h * MADE + out[g].numpy() for g, h in enumerate(SWAPPED)]),
        rest.name: np.arange(rest.size),
    }
    state = permuted(net.state_dict(), axis_indices((block, reads, makes, rest), element, net.state_dict()))
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())


def test_a_feature_in_the_wrong_group_is_noticed():
    """The control: exchanging two features across groups is no symmetry, and no element of the group does it."""
    net = made()
    wrong = {k: v.clone() for k, v in net.state_dict().items()}
    across = torch.arange(GROUPS * READ)
    across[[0, READ]] = torch.tensor([READ, 0])
    for name in wrong:
        if name.startswith(("before", "norm")) and wrong[name].dim():
            wrong[name] = wrong[name][across]
    with torch.no_grad():
        assert far(torch.func.functional_call(net, wrong, (images(),)), net(images())) > 1e-2
    read = fxzip.inspect(net, images(1))["s1"]
    for seed in range(20):
        found = sample([fxzip.inspect(net, images(1))["s0"], read], np.random.default_rng(seed))[read.name]
        assert all(len(set(b)) == 1 for b in (found // READ).reshape(GROUPS, READ).tolist())


METHODS = [("permute", 1e-5), ("zip", 1e-5), ("rebasin", 1e-5), ("c2m3", 1e-5), ("select", 1e-5), ("solve", 1e-3)]


@pytest.mark.parametrize("method, most", METHODS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], SWAPPED], ids=["inside groups", "and whole groups"])
def test_a_copy_in_another_order_is_recovered(method, most, order):
    net = made()
    twin = by_hand(net, order, orders(3, READ), orders(4, MADE))
    data = batches()
    with unchanged([net, twin]):
        zipped = fxzip.merge([net, twin], data, method=method, progress=False)
    wanted = net(data[0])
    assert all(far(found, wanted) < most for found in zipped(data[0]))
    assert far(fxzip.merge([net, twin], data, method="average", progress=False)(data[0])[0], wanted) > 1e-2  # no luck
    assert far(fxzip.extract(zipped, 0)(data[0]), wanted) < most


@pytest.mark.parametrize("until", ["conv", "after"])
def test_the_cut_before_and_behind_a_grouped_convolution(until):
    """Private weights in blocks cannot take up the merged order of groups: features are given back in the model's."""
    net = made()
    twin = by_hand(net, SWAPPED, orders(3, READ), orders(4, MADE))
    data = batches()
    zipped = fxzip.merge([net, twin], data, method="zip", until=until, progress=False)
    assert all(far(found, net(data[0])) < 1e-5 for found in zipped(data[0]))


def test_groups_of_other_widths_get_idle_features():
    """READ features in a group here, one less there: padded inside every group."""
    wide = made()
    torch.manual_seed(5)
    narrow = Grouped().eval()
    narrow.before, narrow.norm = nn.Conv2d(3, GROUPS * (READ - 1), 3), nn.BatchNorm2d(GROUPS * (READ - 1)).eval()
    narrow.conv = nn.Conv2d(GROUPS * (READ - 1), GROUPS * MADE, 3, groups=GROUPS)
    data = batches()
    zipped = fxzip.merge([wide, narrow], data, method="permute", progress=False)
    assert fxzip.report(zipped).shared > 0.8
    assert zipped(data[0])[0].shape == (32, 3)


def test_moving_in_place_is_what_permuted_does_and_is_undone():
    net = made()
    spaces, state = fxzip.inspect(net, images(1)), {k: v.clone() for k, v in net.state_dict().items()}
    indices = axis_indices(spaces, sample(spaces, np.random.default_rng(2), draws=16), state)
    for leave_out in ([], [("conv.weight", 0)], [("conv.weight", 1)]):
        wanted = permuted(net.state_dict(), indices, leave_out)
        with moved(state, indices, leave_out):
            assert all(torch.equal(state[name], value) for name, value in wanted.items())
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_copies_of_units_come_in_three_steps_and_are_undone():
    net = made()
    spaces, state = fxzip.inspect(net, images(1)), {k: v.clone() for k, v in net.state_dict().items()}
    seen = [
        torch.func.functional_call(net, {k: v.clone() for k, v in state.items()}, (images(),))
        for _ in duplicated(state, [s for s in spaces if s.segments], np.random.default_rng(0))
    ]
    base, shifted, control = seen
    assert far(shifted, base) < 1e-5 and far(control, base) > 1e-3 and far(base, net(images())) > 1e-3
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


# --------------------------------------------------------------------------------------------- on plain tensors


def test_spread_puts_blocks_apart_and_gathered_brings_them_back():
    x = torch.arange(1.0, 13).reshape(4, 3)  # two blocks of two rows
    wide = spread(x, 2)
    assert wide.tolist() == [
        [1, 2, 3, 0, 0, 0], [4, 5, 6, 0, 0, 0], [0, 0, 0, 7, 8, 9], [0, 0, 0, 10, 11, 12]
    ]  # fmt: skip
    assert torch.equal(gathered(wide, 2), x) and spread(x, 1) is x and gathered(x, 1) is x
    kernel = torch.randn(6, 2, 3, 3)
    assert spread(kernel, 3).shape == (6, 6, 3, 3) and torch.equal(gathered(spread(kernel, 3), 3), kernel)


def test_columns_are_permuted_inside_their_block():
    x = torch.arange(1.0, 13).reshape(4, 3)
    index = torch.tensor([3 + 1, 3 + 0, 3 + 2, 2, 0, 1])  # the blocks were exchanged, by axis 0
    assert permuted_inside(x, index).tolist() == [[2, 1, 3], [5, 4, 6], [9, 7, 8], [12, 10, 11]]
