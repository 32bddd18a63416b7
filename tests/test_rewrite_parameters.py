"""Merged weights follow the formula, whatever the axes and widths; so do the matrices that undo a merge."""

from typing import Any

import numpy as np
import pytest
import torch
from rewrite_nets import close, permuted_pair, space, spaces_of
from torch import nn

from fxzip.errors import SpaceError
from fxzip.infer.spaces import FeatureSpace, Segment
from fxzip.match.matching import Matching, from_slots
from fxzip.rewrite import Unmerge, merge_parameters
from fxzip.rewrite.axes import axis_map, layout
from fxzip.trace import state_by_all_names

torch.set_num_threads(1)
pair = pytest.fixture(scope="module")(permuted_pair)


def test_matching_a_permuted_copy_gives_the_weights_back(pair):
    model, twin, spaces, matchings = pair
    states = [state_by_all_names(model), state_by_all_names(twin)]
    merged = merge_parameters(states, spaces, matchings, [n for n in states[0] if not n.startswith("aux")])
    for name, value in merged.items():
        close(value, states[0][name], 1e-6)
        assert value.dtype == states[0][name].dtype


def test_without_a_making_axis_parameters_are_averaged():
    spaces = spaces_of(space("s0", 2, ("w", 0, "consume")))
    matching = from_slots(np.array([0, 1, 1, 0]), 2, (2, 2))
    states = [
        {"w": torch.tensor([1.0, 2.0]), "c": torch.tensor(1.0)},
        {"w": torch.tensor([4.0, 3.0]), "c": torch.tensor(2.0)},
    ]
    merged = merge_parameters(states, spaces, {"s0": matching}, ["w", "c"])
    close(merged["w"], torch.tensor([2.0, 3.0]))
    close(merged["c"], torch.tensor(1.5))


def test_general_matrices_follow_the_formula():
    torch.manual_seed(0)
    spaces = spaces_of(space("s", 3, ("w", 0, "produce")), space("t", 4, ("w", 1, "consume")))
    random = {
        n: Matching(torch.randn(k, 2 * k).double(), torch.randn(2 * k, k).double(), (k, k))
        for n, k in (("s", 3), ("t", 4))
    }
    w = [torch.randn(3, 4, 2, dtype=torch.float64) for _ in range(2)]
    got = merge_parameters([{"w": v} for v in w], spaces, random, ["w"])["w"]
    want = sum(
        torch.einsum("ab,bcx,cd->adx", random["s"].blocks_merge(i), w[i], random["t"].blocks_unmerge(i))
        for i in (0, 1)
    )
    close(got, want, 1e-12)


def test_inert_rest_of_a_making_axis_is_averaged():
    segment = Segment("w", 0, np.array([2, 0]), frozenset({"produce"}))
    spaces = spaces_of(FeatureSpace("s0", 2, segments=(segment,)))
    states = [{"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.tensor([3.0, 6.0, 1.0])}]
    matching = from_slots(np.array([0, 1, 1, 0]), 2, (2, 2))
    merged = merge_parameters(states, spaces, {"s0": matching}, ["w"])
    close(merged["w"], torch.tensor([1.0, 4.0, 3.0]))


def test_one_axis_may_make_and_read():
    """The reading half of a making axis is a mean over models, as if the axis did not make anything."""
    read = Segment("w", 0, np.array([2, 3]), frozenset({"consume"}))
    spaces = spaces_of(space("s0", 2, ("w", 0, "produce")), FeatureSpace("s1", 2, segments=(read,)))
    swap = from_slots(np.array([0, 1, 1, 0]), 2, (2, 2))
    states = [{"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"w": torch.tensor([2.0, 1.0, 4.0, 3.0])}]
    close(merge_parameters(states, spaces, {"s0": swap, "s1": swap}, ["w"])["w"], states[0]["w"])


def test_integer_buffers():
    spaces = spaces_of()
    states = [
        {"n": torch.tensor(3), "table": torch.tensor([1, 2]), "count": torch.tensor(7)},
        {"n": torch.tensor(3), "table": torch.tensor([1, 2]), "count": torch.tensor(8)},
    ]
    merged = merge_parameters(states, spaces_of(untouched=["count"]), {}, ["n", "table", "count"])
    assert merged["n"] == 3 and merged["table"].tolist() == [1, 2] and "count" not in merged
    states[1] |= {"table": torch.tensor([2, 2]), "n": torch.tensor(5)}
    for name in ("table", "n"):
        with pytest.raises(SpaceError, match=f"{name}: integer buffers differ"):
            merge_parameters(states, spaces, {}, [name])


def test_layout_resizes_runs_and_interleaved_maps():
    run = np.arange(3)
    out, rest, length = layout(8, [run, run + 4], [5, 2], "w")
    assert [p.tolist() for p in out] == [[0, 1, 2, 3, 4], [6, 7]]
    assert rest.tolist() == [5, 8] and length == 9
    out, _, length = layout(6, [run * 2, run * 2 + 1], [4, 4], "w")  # (c 2)
    assert [p.tolist() for p in out] == [[0, 2, 4, 6], [1, 3, 5, 7]] and length == 8
    scattered = np.array([0, 3, 1])
    assert layout(4, [scattered], [3], "w")[0][0].tolist() == [0, 3, 1]
    for positions, sizes in (([scattered], [2]), ([run * 2], [4]), ([run * 2, run * 2 + 1], [4, 3])):
        with pytest.raises(SpaceError, match="^w: .*width"):
            layout(6, positions, sizes, "w")
    with pytest.raises(SpaceError, match="two features claim one index"):
        layout(6, [run, run + 2], [3, 3], "w")


def test_models_of_different_widths_and_a_wider_result():
    spaces = spaces_of(
        space("s0", 2, ("0.weight", 0, "produce"), ("0.bias", 0, "vector"), ("2.weight", 1, "consume"))
    )
    nets: list[Any] = [nn.Sequential(nn.Linear(3, k), nn.ReLU(), nn.Linear(k, 1)) for k in (2, 4)]
    matching = Matching(torch.eye(6), torch.eye(6), (2, 4))  # kept apart
    states = [state_by_all_names(n) for n in nets]
    merged = merge_parameters(states, spaces, {"s0": matching}, list(states[0]))
    close(merged["0.weight"], torch.cat([n[0].weight for n in nets]))
    close(merged["2.weight"], torch.cat([n[2].weight for n in nets], 1) / 2)


def test_shapes_that_differ_outside_any_space_are_named():
    states = [{"w": torch.zeros(2)}, {"w": torch.zeros(3)}]
    with pytest.raises(SpaceError, match=r"w: \[2\] and \[3\] differ outside any space"):
        merge_parameters(states, spaces_of(), {}, ["w"])


def test_tied_names_use_the_segments_of_the_first():
    spaces = spaces_of(space("s0", 2, ("a", 0, "vector")), tied={"b": "a"})
    matching = from_slots(np.array([0, 1, 1, 0]), 2, (2, 2))
    states = [{"b": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([2.0, 1.0])}]
    close(merge_parameters(states, spaces, {"s0": matching}, ["b"])["b"], torch.tensor([1.0, 2.0]))


# ---- unmerge


def test_unmerge_gathers_or_multiplies_the_same():
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, 5)
    positions = [np.arange(4) * 5 + k for k in range(5)]  # (c w), c the features
    copying, general = torch.eye(4)[[2, 0, 0, 1]].double(), torch.randn(4, 4).double()
    for matrix in (copying, general):
        op = Unmerge((2, 3), axis_map([("s0", p, matrix) for p in positions], 20, "z"))
        assert (op.index is not None) == (matrix is copying)
        close(op(z), torch.einsum("nm,abmw->abnw", matrix.float(), z))
        op = Unmerge((2,), axis_map([("s0", np.arange(4), matrix)], 4, "z"))
        close(op(z), torch.einsum("nm,abmw->abnw", matrix.float(), z))
        assert op(z).is_contiguous()


def test_unmerge_of_concatenated_spaces_keeps_the_rest():
    u, v = torch.randn(2, 2).double(), torch.randn(2, 3).double()
    op = Unmerge((1,), axis_map([("s", np.array([0, 1]), u), ("t", np.array([3, 4]), v)], 5, "z"))
    z = torch.randn(4, 6)
    want = torch.cat([z[:, :2] @ u.T.float(), z[:, 2:3], z[:, 3:] @ v.T.float()], 1)
    close(op(z), want)
