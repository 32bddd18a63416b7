"""Rewriting with spaces and matchings made by hand: permuted copies merge back, cuts are exact."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxzip
from examples import EXAMPLES
from fxzip.errors import InputError, SpaceError
from fxzip.infer.spaces import FeatureSpace, Segment, Spaces
from fxzip.match.matching import Matching, from_slots
from fxzip.report import Report, Size, SpaceRow, report
from fxzip.rewrite import (
    Unmerge,
    build,
    cut_points,
    extract,
    head_parameters,
    merge_parameters,
    owned,
    partition,
    recompute_statistics,
)
from fxzip.rewrite.parameters import axis_map, layout
from fxzip.trace import state_by_all_names

torch.set_num_threads(1)
WIDTH, INNER = 6, 5
BN = ("weight", "bias", "running_mean", "running_var")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, INNER, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(INNER)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(INNER, WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    """conv-bn-relu, two residual blocks on one stream, linear head; an auxiliary head for training only."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.block1, self.block2 = Block(), Block()
        self.drop = nn.Dropout(0.5)
        self.aux = nn.Linear(WIDTH, classes)
        self.fc = nn.Linear(WIDTH, classes)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x * self.scale)))
        x = self.block2(self.block1(x))
        x = self.drop(x.mean([2, 3]))
        if self.training:
            return self.fc(x) + self.aux(x)
        return self.fc(x)


def space(name: str, size: int, *segments: tuple[str, int, str]) -> FeatureSpace:
    held = [Segment(p, a, np.arange(size), frozenset(role.split("+"))) for p, a, role in segments]
    return FeatureSpace(name, size, segments=tuple(held))


def spaces_of(*spaces: FeatureSpace, opaque=("fc",), untouched=(), tied=None) -> Spaces:
    lowered = cast(Any, SimpleNamespace(tied=tied or {}))
    return Spaces(spaces, (), tuple(untouched), frozenset(opaque), lowered)


def norm(name: str) -> list[tuple[str, int, str]]:
    return [(f"{name}.{b}", 0, "vector") for b in BN]


def residual_spaces() -> Spaces:
    stream = [
        ("conv.weight", 0, "produce"),
        ("conv.bias", 0, "vector"),
        *norm("bn"),
        ("fc.weight", 1, "consume"),
    ]
    inner = []
    for b in ("block1", "block2"):
        stream += [
            (f"{b}.conv1.weight", 1, "consume"),
            (f"{b}.conv2.weight", 0, "produce"),
            *norm(f"{b}.bn2"),
        ]
        made = [(f"{b}.conv1.weight", 0, "produce"), *norm(f"{b}.bn1"), (f"{b}.conv2.weight", 1, "consume")]
        inner.append(space(b, INNER, *made))
    norms = ("bn", *(f"{b}.bn{k}" for b in ("block1", "block2") for k in (1, 2)))
    return spaces_of(space("s0", WIDTH, *stream), *inner, untouched=[f"{n}.num_batches_tracked" for n in norms])


def features(name: str):
    """feature_axis of Residual's boundary values."""
    if name == "x":
        return None
    axis = "block2" if name in ("block2_conv1", "block2_bn1", "block2_relu") else "s0"
    return (1,), [(axis, np.arange(INNER if axis == "block2" else WIDTH))]


def random_model(make: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for module in norms:
            for statistic in (module.weight, module.bias, module.running_mean):
                statistic.copy_(torch.randn_like(statistic))
            module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
            module.num_batches_tracked += seed
    return model.eval()


def permuted(model: nn.Module, spaces: Spaces, seed: int) -> tuple[Any, dict[str, Matching]]:
    """A copy with permuted features, and the matching that undoes it."""
    rng, twin = np.random.default_rng(seed), copy.deepcopy(model)
    state, matchings = state_by_all_names(twin), {}
    for s in spaces:
        order = rng.permutation(s.size)
        for g in s.segments:
            tensor = state[g.parameter].data
            index = torch.arange(tensor.shape[g.axis])
            index[g.positions] = index[g.positions[order]]
            tensor.copy_(tensor.index_select(g.axis, index))
        matchings[s.name] = from_slots(np.concatenate([np.arange(s.size), order]), s.size, (s.size, s.size))
    return twin, matchings


def zipped_of(
    models, spaces, matchings, x, until=None, names=("a", "b"), feature_axis: Any = features, **options
):
    graphs = [fx.symbolic_trace(m) for m in models]
    cut = partition(graphs[0], spaces.opaque, until)
    merged = merge_parameters([state_by_all_names(g) for g in graphs], spaces, matchings, owned(graphs[0], cut.shared))
    private = head_parameters(graphs, cut, spaces, matchings, feature_axis, (x,))
    originals = [m.state_dict() for m in models]
    return build(graphs, cut, merged, private, names, (x,), originals=originals, **options), private


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


X = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair():
    """A model, its permuted copy, and the matching between them."""
    spaces = residual_spaces()
    model = random_model(Residual, 1)
    twin, matchings = permuted(model, spaces, 2)
    close(twin(X), model(X))
    assert not torch.allclose(twin.conv.weight, model.conv.weight)
    return model, twin, spaces, matchings


# ---- parameters


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


# ---- partition


def test_partition_by_opaque_and_until(pair):
    graph = fx.symbolic_trace(pair[0])
    cut = partition(graph, {"fc"})
    assert cut.private == {"fc", "output"} and cut.boundary == ("drop",)
    cut = partition(graph, {"fc"}, "block2.conv2")
    assert cut.boundary == ("block1_relu_1", "block2_relu")
    assert {"block2_conv2", "block2_bn2", "mean", "fc"} <= cut.private and "block2_relu" in cut.shared
    assert partition(graph, {"fc"}, "block2_conv2") == cut  # an FX node name
    assert "aux.weight" not in owned(graph, cut.shared | cut.private)


def test_cut_points_are_the_dominators(pair):
    points = cut_points(fx.symbolic_trace(pair[0]))
    assert {"conv", "block1_relu_1", "block2_relu_1", "mean", "fc"} <= set(points)
    assert not {"block1_conv1", "block2_bn2", "x", "output", "scale"} & set(points)


def test_shapes_carry_no_features():
    class Flat(nn.Module):
        def forward(self, x):
            n = x.shape[0]
            return torch.relu(x).view(n, -1)

    assert cut_points(fx.symbolic_trace(Flat())) == ("relu", "view")


def test_bad_until_lists_names_and_cut_points(pair):
    graph = fx.symbolic_trace(pair[0])
    with pytest.raises(InputError, match=r"Did you mean 'block2'.*Cut points.*block1_relu_1"):
        partition(graph, {"fc"}, "blok2")
    with pytest.raises(InputError, match="placeholder"):
        partition(graph, {"fc"}, "x")
    with pytest.raises(InputError, match='"aux" is no module or node that this graph runs'):
        partition(graph, {"fc"}, "aux")
    with pytest.raises(SpaceError, match='nothing can be merged: until="conv".*Cut points'):
        partition(graph, {"fc"}, "conv")
    with pytest.raises(SpaceError, match="%conv cannot be shared.*no rule for conv"):
        partition(graph, {"conv"}, None, ["no rule for conv"])


class Token(nn.Module):
    """A class token read by the private part alone, an embedding by both."""

    def __init__(self):
        super().__init__()
        self.emb, self.token, self.fc = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
            nn.Linear(4, 4),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.fc(x + self.emb) + self.token.expand(x.shape[0], -1) + self.emb)


def test_parameters_read_by_the_private_part_are_private():
    models = [random_model(Token, seed) for seed in (1, 2)]
    graph = fx.symbolic_trace(models[0])
    cut = partition(graph, {"head"}, "expand")
    assert {"token", "expand"} <= cut.private and cut.copied == {"emb"} and "fc" in cut.boundary
    x = torch.randn(3, 4)
    zipped, _ = zipped_of(models, spaces_of(opaque=["head"]), {}, x, "expand", feature_axis=lambda _: None)
    names = {n for n, _ in zipped.named_parameters()}
    assert {"emb", "emb_a", "emb_b", "token_a", "token_b", "fc.weight", "head_b.weight"} <= names
    assert "token" not in names
    mean = {n: (p + models[1].get_parameter(n)) / 2 for n, p in models[0].named_parameters()}
    hidden = nn.functional.linear(x + mean["emb"], mean["fc.weight"], mean["fc.bias"])
    for got, m in zip(zipped(x), models, strict=True):
        close(got, m.head(hidden + m.token + m.emb))


# ---- build


@pytest.mark.parametrize("until", [None, "block2", "block2.conv2", "block1", "mean", "block2.bn1"])
def test_a_permuted_copy_merges_back_at_every_cut(pair, until):
    model, twin, spaces, matchings = pair
    before = [copy.deepcopy(m.state_dict()) for m in (model, twin)]
    zipped, private = zipped_of((model, twin), spaces, matchings, X, until)
    for out in zipped(X):
        close(out, model(X))
    assert bool(private.unmerge) == (until not in (None, "mean"))
    for m, kept in zip((model, twin), before, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in m.state_dict().items())
    storage = {t.data_ptr() for m in (model, twin) for t in state_by_all_names(m).values()}
    assert not storage & {t.data_ptr() for t in state_by_all_names(zipped).values()}


def test_heads_absorb_the_unmerge(pair):
    model, twin, spaces, matchings = pair
    zipped, private = zipped_of((model, twin), spaces, matchings, X)
    assert private.absorbed == {"s0"} and not private.unmerge
    close(zipped.get_parameter("fc_b.weight"), model.fc.weight)
    names = [n.name for n in zipped.graph.nodes]
    assert {"conv", "block1_conv1", "fc_a", "fc_b"} <= set(names) and "fc" not in names


def test_absorption_is_refused_where_it_is_not_exact():
    """relu(U z) is not U relu(z) for a general U, so the private relu keeps an explicit unmerge."""

    class Late(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 2))

    spaces = spaces_of(
        space("s0", 4, ("0.weight", 0, "produce"), ("0.bias", 0, "vector"), ("3.weight", 1, "consume")),
        opaque=["_3"],
    )
    models = [random_model(Late, s) for s in (1, 2)]
    torch.manual_seed(3)
    general = {"s0": Matching(torch.randn(4, 8), torch.randn(8, 4), (4, 4))}
    x = torch.randn(5, 3)
    for until, absorbed in (("2", frozenset()), (None, frozenset({"s0"}))):
        zipped, private = zipped_of(
            models, spaces, general, x, until, feature_axis=lambda n: ((1,), [("s0", np.arange(4))])
        )
        assert private.absorbed == absorbed
        z = zipped.get_submodule("0")(x)
        z = z if until == "2" else torch.relu(z)
        for i, out in enumerate(zipped(x)):
            u = general["s0"].blocks_unmerge(i).float()
            close(out, models[i][3](torch.relu(z @ u.T) if until == "2" else z @ u.T), 1e-4)


def test_different_classes_as_tuple_and_dict(pair):
    model, twin, spaces, matchings = pair
    torch.manual_seed(5)
    twin = copy.deepcopy(twin)
    twin.fc = nn.Linear(WIDTH, 7)
    twin.aux = nn.Linear(WIDTH, 7)
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    assert isinstance(zipped(X), tuple)
    for out, m in zip(zipped(X), (model, twin), strict=True):
        close(out, m(X))
    named, _ = zipped_of((model, twin), spaces, matchings, X, names=("digits", "my task"), as_dict=True)
    assert list(named(X)) == ["digits", "my task"] and named(X)["my task"].shape == (2, 7)
    assert named.get_submodule("fc_my_task").weight.shape == (7, WIDTH)
    with pytest.raises(
        InputError, match=r'heads="average" needs outputs of one shape, got a: \[\[2, 3\]\], b: \[\[2, 7\]\]'
    ):
        zipped_of((model, twin), spaces, matchings, X, heads="average")


def test_averaged_heads(pair):
    model, _, spaces, matchings = pair
    other = random_model(Residual, 9)
    zipped, _ = zipped_of((model, other), spaces, matchings, X)
    mean, _ = zipped_of((model, other), spaces, matchings, X, heads="average")
    close(mean(X), sum(zipped(X)) / 2)
    for i, task in enumerate("ab"):
        for module in (mean, pickle.loads(pickle.dumps(mean))):
            close(extract(module, task)(X), zipped(X)[i])


def test_bad_calls_are_listed(pair):
    model, twin, spaces, matchings = pair
    with pytest.raises(InputError) as error:
        zipped_of((model, twin), spaces, matchings, X, names=("a b", "a_b"), heads="both")
    assert "heads='both' is unknown" in str(error.value) and "task names must differ" in str(error.value)


def test_three_models(pair):
    model, _, spaces, _ = pair
    models = [model, *(permuted(model, spaces, s)[0] for s in (3, 4))]
    matchings = {}
    for s in spaces:
        orders = [np.arange(s.size)]
        for seed in (3, 4):
            undone = permuted(model, spaces, seed)[1][s.name]
            orders.append(undone.blocks_unmerge(1).argmax(1).numpy())
        matchings[s.name] = from_slots(np.concatenate(orders), s.size, (s.size,) * 3)
    zipped, _ = zipped_of(models, spaces, matchings, X, names=("a", "b", "c"), until="block2")
    assert len(zipped(X)) == 3
    for out in zipped(X):
        close(out, model(X))


def test_modes_copies_and_pickles(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X, "block2")
    assert not any(m.training for m in zipped.modules())
    zipped.train()
    assert zipped.get_submodule("drop_a").training and zipped.get_submodule("bn").training
    torch.manual_seed(0)
    assert not torch.equal(zipped(X)[0], zipped(X)[0])  # dropout is alive
    zipped, _ = zipped_of((model, twin), spaces, matchings, X, "block2")
    for twin_of in (copy.deepcopy(zipped), pickle.loads(pickle.dumps(zipped))):
        assert not twin_of.training
        close(twin_of(X)[1], zipped(X)[1], 0)
        close(extract(twin_of, "b")(X), zipped(X)[1], 0)
        assert twin_of.meta["fxzip"]["tasks"] == ("a", "b")
        assert twin_of.state_dict().keys() == zipped.state_dict().keys()


def test_node_notes_and_gradients_survive(pair):
    model, twin, spaces, matchings = pair
    graphs = [fx.symbolic_trace(m) for m in (model, twin)]
    for node in graphs[0].graph.nodes:
        node.meta["fxzip"] = f"type of {node.name}"
    for p in graphs[0].get_submodule("conv").parameters():
        p.requires_grad_(False)
    cut = partition(graphs[0], {"fc"})
    states = [state_by_all_names(g) for g in graphs]
    merged = merge_parameters(states, spaces, matchings, owned(graphs[0], cut.shared))
    private = head_parameters(graphs, cut, spaces, matchings, features, (X,))
    zipped = build(graphs, cut, merged, private, ("a", "b"), (X,))
    notes = {n.name: n.meta.get("fxzip") for n in zipped.graph.nodes}
    assert notes["block1_conv1"] == "type of block1_conv1" and notes["fc_a"] == "type of fc"
    assert not zipped.get_parameter("conv.weight").requires_grad
    for p in graphs[0].get_submodule("conv").parameters():
        p.requires_grad_(True)
    torch.cat(zipped(X)).sum().backward()
    assert zipped.get_parameter("bn.weight").grad is not None


def test_ties_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight
            self.same = self.a

        def forward(self, x):
            return self.fc(torch.relu(self.b(torch.relu(self.a(x)))))

    models = [random_model(Tied, s) for s in (1, 2)]
    x = torch.randn(3, 4)
    zipped, _ = zipped_of(models, spaces_of(), {}, x, feature_axis=lambda _: None)
    assert zipped.get_parameter("a.weight") is zipped.get_parameter("b.weight")
    assert zipped.get_parameter("a.weight").data_ptr() != models[0].a.weight.data_ptr()
    single = extract(zipped, "b")
    fresh = Tied()
    fresh.load_state_dict(single.state_dict(), strict=True)  # also `same.*`, another name of a.*
    close(fresh(x), zipped(x)[1])
    split, _ = zipped_of(models, spaces_of(), {}, x, "b", feature_axis=lambda _: None)
    assert split.get_parameter("a.weight") is not split.get_parameter("b_a.weight")
    close(split.get_parameter("b_b.weight"), models[1].b.weight)


def test_a_module_used_on_both_sides_of_the_cut():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.fc = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.act(self.a(self.act(self.a(x)))))

    models = [random_model(Twice, s) for s in (1, 2)]
    x = torch.randn(3, 4)
    zipped, _ = zipped_of(models, spaces_of(), {}, x, "a_1", feature_axis=lambda _: None)
    z = zipped.get_submodule("act")(zipped.get_submodule("a")(x))
    for i, m in enumerate(models):
        close(zipped(x)[i], m.fc(m.act(m.a(z))))
        close(extract(zipped, "ab"[i])(x), zipped(x)[i])


def test_in_place_private_ops_do_not_reach_the_other_model():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            h.view(-1).add_(1.0)
            return self.fc(h)

    models = [random_model(InPlace, s) for s in (1, 1)]
    x = torch.randn(3, 4)
    zipped, private = zipped_of(models, spaces_of(), {}, x, "view", feature_axis=lambda _: None)
    assert private.cloned == {"a"}
    for out in zipped(x):
        close(out, models[0](x))


def test_a_width_that_a_module_does_not_take_is_refused():
    class Fixed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))

        def forward(self, x):
            return self[1](self[0](x).reshape(-1, 2, 2).flatten(1))  # sizes baked into the graph

    made = [("0.weight", 0, "produce"), ("0.bias", 0, "vector")]
    spaces = spaces_of(space("s0", 4, *made, ("1.weight", 1, "consume")), opaque=["_1"])
    apart = {"s0": Matching(torch.eye(8), torch.eye(8), (4, 4))}
    with pytest.raises(SpaceError, match="does not run.*keep the width"):
        zipped_of(
            [Fixed(), Fixed()],
            spaces,
            apart,
            torch.randn(2, 3),
            feature_axis=lambda _: ((1,), [("s0", np.arange(4))]),
        )


def test_kept_apart_is_exact_for_two_models():
    """m = sum n_i: merged features are both models', so each head reads its own and nothing is lost."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    spaces = spaces_of(
        space("s0", 4, ("0.weight", 0, "produce"), ("0.bias", 0, "vector"), ("2.weight", 1, "consume")),
        opaque=["_2"],
    )
    models = [random_model(Net, s) for s in (1, 2)]
    x = torch.randn(5, 3)
    apart = {"s0": Matching(torch.eye(8), torch.eye(8), (4, 4))}
    zipped, private = zipped_of(
        models, spaces, apart, x, feature_axis=lambda _: ((1,), [("s0", np.arange(4))])
    )
    assert private.absorbed == {"s0"}
    for out, m in zip(zipped(x), models, strict=True):
        close(out, m(x))


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


# ---- extract


def test_extract_loads_strictly_into_the_users_class(pair):
    model, twin, spaces, matchings = pair
    twin = copy.deepcopy(twin)
    nn.init.normal_(twin.aux.weight)
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    for i, (task, source) in enumerate((("a", model), ("b", twin))):
        single = extract(zipped, task)
        fresh = Residual()
        fresh.load_state_dict(single.state_dict(), strict=True)
        close(fresh.eval()(X), zipped(X)[i])
        close(single(X), zipped(X)[i], 0)
        assert torch.equal(fresh.aux.weight, source.aux.weight)
        assert "fc" in [n.name for n in single.graph.nodes] and not single.training
        shared = {t.data_ptr() for t in state_by_all_names(single).values()} & {
            t.data_ptr() for t in state_by_all_names(zipped).values()
        }
        assert not shared


def test_what_only_one_model_has_beside_its_graph_is_its_own(pair):
    model, twin, spaces, matchings = pair
    model, twin = copy.deepcopy(model), copy.deepcopy(twin)
    del model.aux
    twin.register_buffer("seen", torch.tensor(5))
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    kept = [extract(zipped, task).state_dict() for task in "ab"]
    assert [k.keys() for k in kept] == [m.state_dict().keys() for m in (model, twin)]
    assert torch.equal(kept[1]["aux.weight"], twin.aux.weight) and kept[1]["seen"] == 5


def test_extract_drops_the_other_task(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X, "block2")
    single = extract(zipped, 1)
    close(single(X), zipped(X)[1], 0)
    assert not [n for n in single.graph.nodes if n.name.endswith("_a")]
    assert "block2.conv1.weight" in single.state_dict() and "block2.conv1_a.weight" not in single.state_dict()
    with pytest.raises(InputError, match="no task 'c'.*Tasks: 'a', 'b'"):
        extract(zipped, "c")
    with pytest.raises(InputError, match="expected the result of fxzip.merge"):
        extract(fx.symbolic_trace(model), "a")


# ---- norms


def test_statistics_are_those_of_the_data(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X, "block2")
    zipped.get_submodule("bn").train()
    batches = [torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    state, modes = torch.get_rng_state(), [m.training for m in zipped.modules()]
    assert recompute_statistics(zipped, batches, lambda b: (b,)) == 7  # 3 shared, 2 of each model
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in zipped.modules()]
    bn: Any = zipped.get_submodule("bn")
    hidden = zipped.get_submodule("conv")(torch.cat(batches))
    close(bn.running_mean, hidden.mean([0, 2, 3]))
    close(bn.running_var, hidden.var([0, 2, 3]), 0.03)  # a mean over three batches, which are shuffled
    assert bn.momentum == 0.1 and bn.num_batches_tracked == 3
    for name in ("block2.bn1_a", "block2.bn1_b"):
        assert zipped.get_submodule(name).num_batches_tracked == 3


def test_batches_count_by_their_size_and_one_sample_is_no_error():
    """A last batch of one sample, without a variance, came to a ValueError after all the work."""
    net = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(66, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 10.0]) + 5
    recompute_statistics(net, [x[:40], x[40:60], x[60:65], x[65:]], lambda b: (b,))
    bn: Any = net[0]
    close(bn.running_mean, x.mean(0))
    torch.testing.assert_close(bn.running_var, x.var(0), rtol=0.03, atol=0)
    recompute_statistics(net, list(x.split(1)), lambda b: (b,))
    close(bn.running_mean, x.mean(0))
    torch.testing.assert_close(bn.running_var, x.var(0), rtol=0.3, atol=0)
    parts = [x[:40, :, None], x[40:, :, None].expand(-1, -1, 2)]  # of two forms: by size
    recompute_statistics(net, parts, lambda b: (b,))
    close(bn.running_mean, x.mean(0))
    close(bn.running_var, (40 * parts[0].var((0, 2)) + 26 * parts[1].var((0, 2))) / 66)
    twice = nn.Sequential(bn, nn.Linear(3, 3), bn)  # a norm that runs twice: every run counts
    recompute_statistics(twice, [x], lambda b: (b,))
    second = twice[1]((x - x.mean(0)) / (x.var(0, correction=0) + bn.eps).sqrt() * bn.weight + bn.bias)
    close(bn.running_mean, torch.cat([x, second]).mean(0).detach())


def test_statistics_hold_what_lies_between_tasks():
    """Batches of one task each, as a dict of loaders gives them, were each normed by their own task."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    tasks = [torch.randn(4, generator=g) * 2 + torch.randn(64, 4, generator=g) for _ in range(3)]
    recompute_statistics(net, tasks, lambda b: (b,))
    normed = net(torch.cat(tasks))
    close(normed.mean(0), torch.zeros(4), 0.03)
    close(normed.var(0), torch.ones(4), 0.1)


def test_statistics_without_batches_or_norms_are_left_alone(pair):
    model = copy.deepcopy(pair[0])
    kept = model.bn.running_mean.clone()
    with pytest.raises(InputError, match="gave no batch"):
        recompute_statistics(model, [], lambda b: (b,))
    assert torch.equal(model.bn.running_mean, kept)
    assert (
        recompute_statistics(nn.Linear(2, 2), [torch.zeros(1)], lambda b: pytest.fail("nothing to run")) == 0
    )
    with pytest.raises(RuntimeError):
        recompute_statistics(model, [torch.zeros(1, 5)], lambda b: (b,))
    assert not model.bn.training and model.bn.momentum == 0.1


# ---- report


def test_report_prints_every_part(pair):
    model, twin, spaces, matchings = pair
    zipped, _ = zipped_of((model, twin), spaces, matchings, X)
    with pytest.raises(InputError, match="without its report"):
        report(zipped)
    made = Report(
        "zip", ("a", "b"), (Size("a", 1000, 2_500_000), Size("b", 1000, None)), Size("zipped", 1500), 0.5
    )
    made = replace(
        made, spaces=(SpaceRow("s0", "6", (6, 6), 6, 0.91, 0.1), SpaceRow("s1", "2 x 4", (8, 8), 12))
    )
    made = made.with_(
        frozen=("frozen: %fft",), notices=("unwrapped",), verification="sound", seconds={"trace": 0.25}
    )
    zipped.meta["fxzip"]["report"] = made
    text = str(report(pickle.loads(pickle.dumps(zipped))))
    for part in (
        "2 models merged by zip (a, b)",
        "2.50M",
        "50.0% of",
        "0.910",
        "8+8 -> 12",
        "frozen: %fft",
        "unwrapped",
        "trace 0.2",
    ):
        assert part in text, part


@pytest.mark.parametrize(("name", "private"), [
    ("token mixer", {"head"}),
    ("relative positions", {"head"}),
    ("votes for classes", {"votes"}),
    ("weight beside its module", {"head"}),
])  # fmt: skip
def test_places_are_shared_and_what_a_model_numbers_itself_is_not(name, private):
    example = next(e for e in EXAMPLES if e.name == name)
    model, (x,) = example.make(), example.inputs()
    zipped = fxzip.merge([model, fxzip.scramble(model, x)], [x], method="permute", progress=False)
    names = {n.rpartition(".")[0].rpartition("_task")[0] for n, _ in zipped.named_parameters() if "_task" in n}
    assert names == private
    for output in zipped(x):
        torch.testing.assert_close(output, model(x), atol=1e-5, rtol=1e-5)
