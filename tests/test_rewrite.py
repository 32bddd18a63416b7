"""Merged networks, with spaces and matchings made by hand: permuted copies merge back, cuts are exact."""

import copy
import pickle

import numpy as np
import pytest
import torch
from rewrite_nets import (
    WIDTH,
    Residual,
    X,
    close,
    features,
    permuted,
    permuted_pair,
    random_model,
    space,
    spaces_of,
    zipped_of,
)
from torch import fx, nn

from fxzip.errors import InputError, SpaceError
from fxzip.match.matching import Matching, from_slots
from fxzip.rewrite import build, extract, head_parameters, merge_parameters, owned, partition
from fxzip.trace import state_by_all_names

torch.set_num_threads(1)
pair = pytest.fixture(scope="module")(permuted_pair)


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
