"""The order in which solve takes nodes, what it holds meanwhile, and which fits it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

import pytest
import torch
from torch import Tensor, fx, nn
from toys import randomise

import fxzip
from fxzip.infer import infer
from fxzip.memory import Store
from fxzip.solve import Settings, sequence
from fxzip.solve.affine import Link
from fxzip.solve.lanes import Chunks, Lane
from fxzip.solve.sequence import Pass
from fxzip.trace import lower

torch.set_num_threads(1)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """[n, 6] -> [n, 3]: `branches` between a stem and a head."""

    def __init__(self, branches: Branches) -> None:
        super().__init__()
        self.branches = branches
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.wide, self.same, self.narrow = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(4, 8)
        self.also, self.first = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.second = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.conv, self.turned = nn.Conv1d(6, 8, 1), nn.ConvTranspose1d(8, 8, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.branches(self, torch.relu(self.stem(x)))))


Branches = Callable[[Net, Tensor], Tensor]


def twelve(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :4]], 1)


def made(net: nn.Module, private: str = "", memory: float = inf, models: int = 2, **settings: bool) -> Pass:
    """A pass that fits nothing, as there is no matching. private: from the layer of this name on."""
    spaces = infer(lower(fx.symbolic_trace(net.eval()), (X,)))
    nodes = {n.name: n for n in spaces.lowered.graph.nodes}
    start = next((k for k, n in enumerate(nodes.values()) if n.meta["origin"] == private), len(nodes))
    tail = frozenset(n for n in list(nodes)[start:] if nodes[n].op == "call_function")
    store = Store(memory)

    def lane(given: Mapping[str, list[Tensor]], fallback: Callable | None = None) -> Lane:
        return Lane(spaces.lowered, nodes, dict(net.state_dict()), store, dict(given), fallback=fallback)

    inputs = {spaces.lowered.inputs[0].name: [X, -X]}
    merged = lane(inputs)
    own = [lane({}, merged.value) for _ in range(models)]
    return Pass([lane(inputs) for _ in own], merged, own, tail, spaces, {}, Settings(**settings), Chunks(2))


def steps(p: Pass) -> list[tuple[str, list[Link] | None]]:
    """The nodes in the order in which they are taken; nothing is computed."""
    found, waiting = [], list(p.dynamic)
    while waiting:
        name, links = p._next(waiting)
        found.append((name, links))
        p.done.add(name)
        waiting.remove(name)
    return found


def layers(p: Pass) -> str:
    """Merge points in the order in which they are taken, each with the links to its target."""
    origin = {n: node.meta["origin"] for n, node in p.dynamic.items()}
    return ", ".join(" ".join([origin[n], *(k.kind for k in links)]) for n, links in steps(p) if links is not None)


ORDERS: list[tuple[str, Branches]] = [
    ("same, first", lambda n, x: n.first(torch.relu(n.same(x)))),
    # of two branches the one with fewer columns is not repaired
    ("narrow, same add", lambda n, x: n.same(x) + n.narrow(x[:, :4])),
    ("same, wide add", lambda n, x: n.wide(twelve(x)) + n.same(x)),
    ("same, wide subtract", lambda n, x: n.wide(twelve(x)) - n.same(x)),
    ("same, first add", lambda n, x: n.same(x) + n.first(x)),
    ("narrow, same add, wide add", lambda n, x: n.wide(twelve(x)) + (n.same(x) + n.narrow(x[:, :4]))),
    ("narrow, same add add", lambda n, x: x + (n.same(x) + n.narrow(x[:, :4]))),
    # what is no fit goes on meanwhile
    ("first, same, also add", lambda n, x: n.also(x) + torch.relu(n.same(torch.relu(n.first(x))))),
    # what is there need not be waited for
    ("same add", lambda n, x: x + n.same(x)),
    ("same add", lambda n, x: n.bias + n.same(x)),
    # up to the addition that has to wait
    ("narrow norm, same add", lambda n, x: n.same(x) + n.norm(n.narrow(x[:, :4]))),
    ("same scalar add, first", lambda n, x: n.first(torch.relu(n.same(x) * 2 + x))),
    # a product's weight is [columns, outputs], a transposed convolution's [groups * columns, outputs, ...]
    ("same, addmm add", lambda n, x: torch.addmm(n.bias, twelve(x), n.weight) + n.same(x)),
    ("turned, conv add", lambda n, x: (n.conv(x[:, :6, None]) + n.turned(x[..., None])).mean(2)),
    # no weights, or no data
    ("same move", lambda n, x: x @ (n.same(x).T @ x).relu()),
    ("same", lambda n, x: n.same(x) * torch.nn.functional.linear(n.matrix, n.weight.T[:, :8], x.sum(0)).mean()),
]


@pytest.mark.parametrize("order, branches", ORDERS)
def test_merge_points_are_taken_when_the_other_branches_are_there(order, branches):
    p = made(Net(branches), models=1)
    assert layers(p) == f"stem, {order}, head"


@pytest.mark.parametrize("order, branches", ORDERS)
def test_nodes_are_taken_once_each_behind_what_they_read(order, branches):
    p = made(Net(branches))
    done: set[str] = set()
    for name, _ in steps(p):
        assert {i.name for i in p.dynamic[name].all_input_nodes} & set(p.dynamic) <= done and name not in done
        done.add(name)
    assert done == set(p.dynamic)


def test_without_feedback_no_target_is_behind_an_addition():
    net = Net(lambda n, x: (n.same(x) / 2 + n.bias) * 3 + n.norm(n.first(x)))
    assert layers(made(net)) == "stem, same scalar add scalar, first norm add, head"
    assert layers(made(net, feedback=False)) == "stem, same scalar, first norm, head"


def test_targets_stay_in_their_part():
    """The shared part ends where each model's own begins."""
    way = Net(lambda n, x: n.second(n.same(x) / 2) + n.norm(n.first(x)))
    assert layers(made(way)) == "stem, same scalar, first norm add, head"
    assert layers(made(way, private="truediv")) == "stem, same, first norm add, head"
    assert layers(made(way, private="norm")) == "stem, same scalar, first, head"


class TwoOutputs(Net):
    """An output is read on, another value is read twice, and one only by an op that no output needs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        y = self.same(x)
        z = self.second(torch.tanh(y)) * 2
        y.exp()
        return y, self.head(self.branches(self, z) + x)


def still_read(p: Pass, name: str) -> bool:
    """Whether a node will read this value, or what is made of it at each reading; or only an output does."""
    users = [u.name for u in p.dynamic[name].users if u.name in p.dynamic]
    return not users or any(still_read(p, u) if u in p.passing else u not in p.done for u in users)


@torch.no_grad()
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("private", ["", "tanh", "head"])
def test_values_are_held_until_their_last_reader(private, feedback):
    net = TwoOutputs(lambda n, z: n.norm(n.first(torch.relu(z)) / 2))
    p = made(net, private, feedback=feedback)
    waiting = list(p.dynamic)
    while waiting:
        name, links = p._next(waiting)
        p._step(name, links)
        waiting.remove(name)
        live = {n for n in p.done if still_read(p, n)} - set(p.passing)
        shared = live - p.is_private
        assert set(p.merged.values) == shared
        for lane in p.private:
            assert set(lane.values) == live & p.is_private
        for parent in p.parents:  # targets are computed ahead
            assert set(parent.values) - live <= set(waiting) and set(parent.values) >= live
    last = p.spaces.lowered.values["head"][0].name
    for lane in (*p.parents, *(p.private if private else [p.merged])):
        for k, x in enumerate((X, -X)):
            torch.testing.assert_close(lane.value(last, k), net(x)[1], atol=1e-3, rtol=1e-3)
    assert {r.model for r in p.records} == ({0, 1} if private else set())


@torch.no_grad()
def test_progress_is_shown_while_it_lasts(capsys):
    made(TwoOutputs(lambda n, z: z)).run(progress=False)
    assert not capsys.readouterr().err
    made(TwoOutputs(lambda n, z: z)).run(progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert any("solve: " in line for line in shown) and not shown[-1].strip()


@torch.no_grad()
def test_the_peak_is_what_memory_has_to_hold():
    """With so much nothing goes to a file, with a byte less something does."""
    net = TwoOutputs(lambda n, z: n.first(torch.relu(z)))
    free = made(net, "head")
    free.run(progress=False)
    for memory, mapped in ((free.store.most, False), (free.store.most - 1, True)):
        capped = made(net, "head", memory)
        capped.run(progress=False)
        assert bool(capped.store.mapped) == mapped


class Reported(Net):
    """A norm that a layer takes in, one that none does as its layer cannot be fitted, and one behind a function."""

    def __init__(self) -> None:
        super().__init__(lambda n, x: n.norm(n.same(x)))
        self.third = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.same(torch.relu(self.stem(x)))))
        x = self.second(torch.nn.functional.linear(x, self.matrix.tanh()))
        return self.head(self.third(torch.relu(x)))


DATA = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))


def reported(until: str | None) -> tuple[list[nn.Module], fx.GraphModule, str]:
    nets = [randomise(Reported(), seed).eval() for seed in range(2)]
    method = fxzip.Solve(fxzip.Average(), Settings(lam=1e-5, sweeps=0))
    models = dict(zip("ab", nets, strict=True))
    zipped = fxzip.merge(models, [DATA], method=method, until=until, progress=False, verify=False)
    return nets, zipped, " ".join(f"{r.node}:{r.task}" for r in fxzip.report(zipped).layers)


def test_every_fit_is_reported_in_order_a_private_one_for_each_task():
    assert reported(None)[2] == "stem: same: second: third: head:a head:b"
    assert reported("third")[2] == "stem: same: second: head:a head:b"  # the third norm is in merged coordinates
    assert reported("same")[2] == "stem: same:a same:b second:a second:b third:a third:b head:a head:b"


@torch.no_grad()
@pytest.mark.parametrize("until", [None, "third", "same"])
def test_private_layers_are_fitted_to_their_own_model(until):
    """A head says what its model says nearly as well as any could, reading what it reads."""
    nets, zipped, _ = reported(until)
    seen: dict[str, Tensor] = {}
    for task in "ab":
        head = zipped.get_submodule(f"head_{task}")
        head.register_forward_pre_hook(lambda _, x, task=task: seen.update({task: x[0].detach()}))
    made = zipped(DATA)
    for net, task in zip(nets, "ab", strict=True):
        rows = torch.cat([seen[task], torch.ones(400, 1)], 1)[:384].double()  # whole chunks
        wanted = net(DATA)[:384].double()
        best = (rows @ torch.linalg.lstsq(rows, wanted).solution - wanted).square().sum()
        # a feature that is all but constant tells little beside the intercept, more than float32 sums know
        assert (made[task][:384] - wanted).square().sum() < 1.35 * best


class Moved(nn.Module):
    """Layers whose outputs are only moved behind them; one is seen through a function, one through an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).transpose(0, 1).tanh().transpose(0, 1)
        x = x + self.b(x).transpose(0, 1).transpose(0, 1)
        return self.head(self.norm(self.c(x).unsqueeze(1).transpose(1, 0)).squeeze(0))


def test_layers_aim_in_front_of_moves_that_nothing_is_behind(monkeypatch):
    """What moves is mixed whole, what is drawn from is not; a function behind the moves has to be seen."""
    own, seen = sequence.solve_point, {}

    def watched(point, *rest):
        seen[point.name] = [k.kind for k in point.links]
        return own(point, *rest)

    monkeypatch.setattr(sequence, "solve_point", watched)
    fxzip.merge([randomise(Moved(), s).eval() for s in range(2)], [X], progress=False, verify=False)
    assert list(seen.values())[:3] == [["move"], ["move", "move", "add"], []]
