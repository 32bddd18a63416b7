"""What solve computes on its way: values of all networks, chunk by chunk, in step with what the merge computes."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxzip import InputError
from fxzip.infer import Layout
from fxzip.match import Matching
from fxzip.memory import Store
from fxzip.processes import Processes
from fxzip.solve import CHUNK, _chunks, _through_unmerge
from fxzip.solve.lanes import Chunks, Lane, dynamic_nodes, nbytes
from fxzip.solve.mixing import NARROW, mixer
from fxzip.trace import lower, state_of

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::fxzip.MergeWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- lanes -------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Values of inputs, of parameters alone, of neither; an operator with two results; one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w, self.copy = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4, bias=False)
        self.copy.weight = self.fc.weight

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        x.cos()
        kept, at = torch.add(self.fc(x) * self.w.exp().sum(0), torch.arange(4.0), alpha=2).clamp(max=m + 1).max(-1)
        return self.copy(kept[..., None] * m) + at[..., None]


@pytest.fixture
def lane() -> Lane:
    torch.manual_seed(0)
    net = Mixed().eval()
    module = fx.symbolic_trace(net)
    lowered = lower(module, (torch.ones(2, 5, 4), torch.ones(2, 5, 4)))
    state = {n: t.detach() for n, t in state_of(module).items()}
    made = Lane(lowered, {n.name: n for n in lowered.graph.nodes}, state, Store(1e9))
    made.net = net  # type: ignore[attr-defined]
    return made


@torch.no_grad()
def test_a_lane_computes_what_its_network_does(lane):
    data = [tuple(torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(k))) for k in range(3)]
    dynamic = dynamic_nodes(lane.lowered)
    for k, node in enumerate(lane.lowered.inputs):
        lane.values[node.name] = [given[k] for given in data]
    (output,) = lane.lowered.graph.output_node().all_input_nodes
    for name, node in dynamic.items():
        if node.op == "call_function":
            lane.compute(name, 3, dynamic)
    for k, given in enumerate(data):
        torch.testing.assert_close(lane.value(output.name, k), lane.net(*given))
    held = lane.values[output.name]
    lane.compute(output.name, 3, dynamic)
    assert lane.values[output.name] is held, "computed once"


@torch.no_grad()
def test_what_is_spent_makes_room_chunk_by_chunk():
    """A convolution's result, which relu alone reads, is written over; an operand of another size is let go."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1)).eval()
    lowered = lower(fx.symbolic_trace(net), (torch.ones(2, 1, 4, 4),))
    state = {n: t.detach() for n, t in state_of(fx.symbolic_trace(net)).items()}
    lane = Lane(lowered, {n.name: n for n in lowered.graph.nodes}, state, Store(1e9))
    dynamic = dynamic_nodes(lowered)
    first, relu, last = (n for n, node in dynamic.items() if node.op == "call_function")
    (given,) = (n.name for n in lowered.inputs)
    own = [random(2, 1, 4, 4, seed=k).float() for k in range(3)]
    lane.values[given] = own
    lane.compute(first, 3, dynamic)
    assert lane.store.held == 3 * 2 * 2 * 16 * 4 and lane.values[given] is own and own[0] is not None
    made = list(lane.values[first])
    lane.compute(relu, 3, dynamic, [first])
    assert all(a is b for a, b in zip(lane.values[relu], made, strict=True)) and lane.values[first] == [None] * 3
    assert lane.store.held == 3 * 2 * 2 * 16 * 4
    lane.compute(last, 3, dynamic, [relu])
    assert lane.values[relu] == [None] * 3 and lane.store.held == 3 * 2 * 3 * 16 * 4
    for k, x in enumerate(own):
        torch.testing.assert_close(lane.value(last, k), net(x))
    assert lane.store.most == 4 * (3 * 2 * 3 * 16 + 2 * 2 * 16), "all of the next, but one chunk of the one before"


@torch.no_grad()
def test_what_somebody_reads_still_is_not_written_over():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).eval()
    lowered = lower(fx.symbolic_trace(net), (torch.ones(2, 1, 4, 4),))
    state = {n: t.detach() for n, t in state_of(fx.symbolic_trace(net)).items()}
    lane = Lane(lowered, {n.name: n for n in lowered.graph.nodes}, state, Store(1e9))
    dynamic = dynamic_nodes(lowered)
    first, relu = (n for n, node in dynamic.items() if node.op == "call_function")
    lane.values[lowered.inputs[0].name] = [random(2, 1, 4, 4).float()]
    lane.compute(first, 1, dynamic)
    lane.compute(relu, 1, dynamic)
    assert (lane.value(first, 0) < 0).any() and torch.equal(lane.value(first, 0).relu(), lane.value(relu, 0))


def test_dynamic_is_what_lies_between_inputs_and_outputs(lane):
    graph, output = nx.DiGraph(), lane.lowered.graph.output_node()
    graph.add_edges_from((i, n) for n in lane.lowered.graph.nodes for i in n.all_input_nodes)
    below = {d for i in lane.lowered.inputs for d in nx.descendants(graph, i)} | set(lane.lowered.inputs)
    between = below & nx.ancestors(graph, output)
    found = dynamic_nodes(lane.lowered)
    assert list(found) == [n.name for n in lane.lowered.graph.nodes if n in between] and "cos" not in str(list(found))
    assert all(found[n].name == n for n in found)


@torch.no_grad()
def test_what_is_made_of_parameters_is_kept_until_one_is_written(lane):
    (node,) = [n for n in lane.lowered.graph.nodes if "exp" in n.name]
    first = lane.static(node)
    torch.testing.assert_close(first, lane.net.w.exp())
    given = {n: torch.zeros(4, 4) for n in lane.state}
    assert torch.equal(lane.static(node, given), torch.ones(4, 4)), "of others for once"
    assert lane.static(node) is first
    lane.write("w", torch.full((4, 4), 2.0, dtype=torch.float64))
    assert lane.state["w"].dtype == torch.float32 and torch.equal(lane.static(node), lane.state["w"].exp())


@torch.no_grad()
def test_a_tied_parameter_goes_by_the_name_that_the_state_has(lane):
    node = lane.lowered.parameters["fc.weight"]
    assert lane.parameter(node) == "fc.weight"
    lane.state["copy.weight"] = lane.state.pop("fc.weight") + 1
    assert lane.parameter(node) == "copy.weight" and lane.static(node) is lane.state["copy.weight"]


def test_what_a_lane_does_not_compute_another_does(lane):
    other = Lane(lane.lowered, lane.nodes, lane.state, Store(0))
    lane.values = {"a": [torch.ones(2), torch.ones(3)], "b": [torch.ones(4)]}
    other.fallback = _through_unmerge(lane, {"a": [torch.neg, torch.exp]}, 1)
    other.values["c"] = [(torch.ones(5), None)]
    assert torch.equal(other.value("a", 1), torch.ones(3).exp()) and torch.equal(other.value("b", 0), torch.ones(4))
    assert torch.equal(other.value("c", 0)[0], torch.ones(5))


def test_bytes_of_lanes_are_those_in_memory(lane):
    some, file = (torch.ones(3, dtype=torch.float64), [torch.ones(5)], None), Store(0).keep(torch.ones(9))
    lane.values = {"a": [torch.ones(2), some], "b": [file]}
    assert nbytes([lane]) == 8 + 24 + 20 and nbytes([lane, lane]) == 104


@pytest.mark.parametrize("total", [1, 5])
def test_every_chunk_is_in_one_rank(total):
    ranks = [list(Chunks(total, Processes(r, 2))) for r in range(2)]
    for k in range(total):
        assert [found[k] for found in ranks] == [k // 2, None] if k % 2 == 0 else [None, k // 2]
    assert [Chunks(total, Processes(r, 2)).own for r in range(2)] == [(total + 1) // 2, total // 2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_chunks_that_belong_together_are_one_ranks(world):
    """And what is summed in one go ends with them, whatever the number of ranks."""
    ranks = [Chunks(7, Processes(r, world), together=3) for r in range(world)]
    owners = [[r for r, of in enumerate(ranks) if of.mine(k)] for k in range(7)]
    assert owners == [[k // 3 % world] for k in range(7)]
    assert [k for k in range(7) if ranks[0].ends(k)] == [2, 5, 6]
    for of in ranks:
        assert [j for j in of if j is not None] == list(range(of.own))



# -- merged coordinates ------------------------------------------------------------------------------


def matching(width: int, *sizes: int) -> Matching:
    return Matching(random(width, sum(sizes)), random(sum(sizes), width), sizes)


def test_values_are_mixed_where_features_are_and_averaged_elsewhere():
    """Two features, each at two places; those of a space without a matching, and what is no feature."""
    places, others = np.array([[0, 3], [4, 1]]), np.array([[2], [6]])
    found = matching(2, 2, 2)
    layout = Layout((1,), (("s", places), ("t", others)))
    mix = mixer([Layout((0,), (("t", others),)), layout], (3, 7, 2), {"s": found}, [0.75, 0.25], "%x")
    a, b = random(3, 7, 2), random(3, 7, 2, seed=1)
    expected = 0.75 * a + 0.25 * b
    for column in places.T:
        parts = (torch.einsum("mk,bkx->bmx", found.blocks_merge(i), v[:, column]) for i, v in enumerate((a, b)))
        expected[:, column] = sum(parts)
    assert mix is not None
    torch.testing.assert_close(mix([a, b]), expected)


def test_features_on_several_axes_together():
    found, layout = matching(6, 6, 6), Layout((1, 3), (("s", np.arange(6)[:, None]),))
    mix = mixer([layout], (4, 2, 5, 3), {"s": found}, [0.5, 0.5], "%x")
    a, b = random(4, 2, 5, 3), random(4, 2, 5, 3, seed=1)
    flat = [v.permute(0, 2, 1, 3).reshape(4, 5, 6) for v in (a, b)]
    expected = sum(v @ found.blocks_merge(i).T for i, v in enumerate(flat)).reshape(4, 5, 2, 3).permute(0, 2, 1, 3)
    assert mix is not None
    torch.testing.assert_close(mix([a, b]), expected)


def test_another_width_and_one_model():
    found, layout = matching(5, 3, 3), Layout((1,), (("s", np.arange(3)[:, None]),))
    mix = mixer([layout], (4, 3), {"s": found}, [0.5, 0.5], "%x")
    a, b = random(4, 3), random(4, 3, seed=1)
    assert mix is not None
    torch.testing.assert_close(mix([a, b]), torch.cat([a, b], 1) @ found.merge.T)


def test_no_mixture_of_nothing_or_of_two():
    layouts, matchings = [Layout((a,), ((s, np.arange(3)[:, None]),)) for a, s in enumerate("st")], {
        s: matching(3, 3, 3) for s in "st"}  # fmt: skip
    assert mixer(layouts, (3, 3), matchings, [0.5, 0.5], "%x") is None
    assert mixer(layouts, (3, 3), {}, [0.5, 0.5], "%x") is None


# -- samples -----------------------------------------------------------------------------------------


def test_chunks_hold_all_samples_in_order_but_for_what_fills_none():
    x, whole = torch.arange(300.0)[:, None], torch.ones(2, 2)
    for size in (1, 50, 128, 300):
        found = _chunks([({"x": part}, whole, 3) for part in x.split(size)])
        assert [type(c[0]) for c in found] == [dict] * 2 and all(c[1] is whole and c[2] == 3 for c in found)
        assert torch.equal(torch.cat([c[0]["x"] for c in found]), x[: 2 * CHUNK])
    assert [len(c[0]) for c in _chunks([(x[:40],), (x[:60],)])] == [100]
    assert _chunks([(x[0, 0],)]) == [(x[0, 0],)], "a sample without an axis"


def test_a_tensor_as_long_as_one_batch_by_chance_has_no_rows():
    x, table = torch.arange(300.0)[:, None], torch.ones(100, 1)
    (chunk,) = _chunks([(x[:100], table), (x[100:150], table)])
    assert chunk[1] is table and len(chunk[0]) == 128


def test_what_cannot_be_in_one_chunk_is_refused():
    shapes = r"of one shape, the loader has \(float32\[4, 2\]\) and \(float32\[4, 3\]\): crop"
    with pytest.raises(InputError, match=shapes):
        _chunks([(torch.ones(4, 2),), (torch.ones(4, 3),)])
    for one, other in ((3, 4), (torch.ones(1, 2), torch.zeros(1, 2))):
        with pytest.raises(InputError, match="an argument without a row for each sample, differs between batches"):
            _chunks([(torch.ones(4, 2), one), (torch.ones(4, 2), other)])


def test_few_features_along_the_last_axis_are_mixed_alike():
    """By a product of matrices, or by index as wide ones are: exactly the same where every output is of one input, and
    what is infinite stays where it is."""
    wide = NARROW + 1
    for width in (6, wide):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        matrix = torch.eye(width, dtype=torch.float64)[order]
        found = Matching(torch.cat([matrix, matrix], 1) / 2, torch.cat([matrix.T, matrix.T]), (width, width))
        mix = mixer([Layout((1,), (("s", np.arange(width)[:, None]),))], (4, width), {"s": found}, [0.5, 0.5], "%x")
        value = random(4, width)
        assert mix is not None and torch.equal(mix([value, value]), value[:, order])
        value[1, 2] = float("inf")
        assert torch.equal(mix([value, value]), value[:, order])


def test_a_value_that_is_features_alone():
    found, layout = matching(5, 3, 3), Layout((0,), (("s", np.arange(3)[:, None]),))
    mix = mixer([layout], (3,), {"s": found}, [0.5, 0.5], "%x")
    a, b = random(3), random(3, seed=1)
    assert mix is not None
    torch.testing.assert_close(mix([a, b]), found.merge @ torch.cat([a, b]))
    found, layout = matching(6, 6, 6), Layout((0, 1), (("s", np.arange(6)[:, None]),))
    mix = mixer([layout], (2, 3), {"s": found}, [0.5, 0.5], "%x")
    a, b = random(2, 3), random(2, 3, seed=1)
    assert mix is not None
    torch.testing.assert_close(mix([a, b]).flatten(), found.merge @ torch.cat([a.flatten(), b.flatten()]))


def test_products_that_may_be_rounded_are_not_taken_to_mix():
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    matrix = torch.eye(128, dtype=torch.float64)[order]
    found = Matching(torch.cat([matrix, matrix], 1) / 2, torch.cat([matrix.T, matrix.T]), (128, 128))
    mix = mixer([Layout((1,), (("s", np.arange(128)[:, None]),))], (512, 128), {"s": found}, [0.5, 0.5], "%x")
    value, before = random(512, 128).float(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert mix is not None and torch.equal(mix([value, value]), value[:, order])
    finally:
        torch.set_float32_matmul_precision(before)
