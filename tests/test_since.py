"""Private stems: every model keeps what comes before `since`, and what follows is shared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from merging import DATA, STRUCTURES, Digits, digits, far, merge, outputs, same_bytes, scrambled, twins
from torch import nn
from torch.utils._pytree import tree_leaves

import fxzip
from fxzip.rewrite.partition import module_paths

pytestmark = pytest.mark.filterwarnings("ignore")


def own(zipped: nn.Module, task: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a task's stem, by the names that the model has."""
    state = zipped.state_dict()
    return {f"{n}.{k.rpartition('.')[2]}": v for n in names for k, v in state.items() if k.startswith(f"{n}_{task}.")}


# ---------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("method", ["average", "permute", "zip", "solve"])
def test_since_the_first_layer_is_a_plain_merge(method):
    a, b = digits(0, 3), digits(1, 5)
    assert same_bytes(merge([a, b], method=method, since="stem"), merge([a, b], method=method))


@pytest.mark.parametrize("method", ["average", "rebasin", "c2m3", "permute", "zip", "pair", "mudsc", "solve"])
def test_a_model_with_itself_behaves_as_the_model(method):
    model = digits()
    for found in outputs(merge([model, model], method=method, since="block1")):
        assert far(found, model(DATA)) < 2e-4


@pytest.mark.parametrize("method", ["rebasin", "c2m3", "permute", "zip", "pair", "transport", "select", "solve"])
@pytest.mark.parametrize("since", ["block1", "block2.3"])
def test_a_scrambled_copy_is_recovered(method, since):
    model, other = twins()
    for found in outputs(merge([model, other], method=method, since=since)):
        assert far(found, model(DATA)) < 1e-3


def test_of_three_models_too_with_weights():
    model, other = twins()
    third = fxzip.scramble(model, DATA[:2], seed=9)
    for found in outputs(merge([model, other, third], since="block1", model_weights=[3, 1, 2])):
        assert far(found, model(DATA)) < 1e-4


@pytest.mark.parametrize("example", STRUCTURES, ids=str)
def test_every_structure_is_recovered_or_refused(example):
    """At every third layer: a scrambled copy behaves as the model, or the cut is refused with its name."""
    model, other, batches = scrambled(example)
    graph = fxzip.inspect(model, batches[0]).graph_module
    paths = list(dict.fromkeys(p for n in graph.graph.nodes for p in module_paths(n) if p))
    for since in paths[1::3]:
        try:
            zipped = merge([model, other], batches, since=since)
        except fxzip.SpaceError as error:
            assert f'since="{since}"' in str(error) and "Cut points" in str(error)
            continue
        for found in tree_leaves(zipped(*batches[0])):
            assert far(found, model(*batches[0])) < 1e-4, since


@pytest.mark.parametrize("since", ["up", "mid"])
def test_skip_connections_cross_beside(since):
    """Of a U-Net several values cross: one layer for each."""
    example = next(e for e in STRUCTURES if e.name == "u-net")
    model, other, batches = scrambled(example)
    zipped = merge([model, other], batches, since=since)
    assert sum(type(m).__name__ == "Enter" for m in zipped.modules()) > 1
    for found in zipped(*batches[0]):
        assert far(found, model(*batches[0])) < 1e-4


def test_stems_are_the_models_own_bit_for_bit():
    a, b = digits(0), digits(1)
    with unchanged([a, b]):
        zipped = merge({"a": a, "b": b}, method="solve", since="block1")
    states = {n.name: n.meta["fxzip"]["state"] for n in zipped.graph.nodes if n.op != "output"}
    assert set(states.values()) == {"merged", "per model"} and states["x"] == "merged"
    for task, model in (("a", a), ("b", b)):
        state = model.state_dict()
        found = own(zipped, task, ("stem", "norm"))
        assert len(found) == 6 and all(torch.equal(v, state[k]) for k, v in found.items())


def test_what_is_shared_reads_m_h():
    """The layer at the border is [M_1 .. M_N]: with one-to-one matching, every model's feature once, at 1/N."""
    a, b = digits(0), digits(1)
    zipped = merge([a, b], since="block1")
    (weight,) = [v for k, v in zipped.state_dict().items() if k.endswith("_enter.weight")]
    assert weight.shape == (8, 16)
    assert torch.equal(weight[:, :8], torch.eye(8) / 2)
    assert set(weight[:, 8:].unique().tolist()) == {0.0, 0.5}
    assert torch.equal(weight[:, 8:].sum(0), torch.full((8,), 0.5))
    h = torch.cat([F.relu(m.norm(m.stem(DATA))) for m in (a, b)], 1)
    x = torch.einsum("mc,bchw->bmhw", weight, h)
    for block in ("block1", "block2"):
        y = x
        for k in range(5):
            y = zipped.get_submodule(f"{block}.{k}")(y)
        x = F.relu(x + y)
    assert far(outputs(zipped)[0], zipped.get_submodule("fc_task0")(x.mean((2, 3)))) < 1e-5


def test_private_stems_lose_less_than_a_shared_one():
    a, b = digits(0), digits(1)
    solve = fxzip.Solve(fxzip.Zip(beta=1.0))  # selected features of a layer that reads the input lose nothing there
    loss = [sum(far(y, m(DATA)) for y, m in zip(outputs(merge([a, b], method=solve, since=s)), (a, b), strict=True))
            for s in ("stem", "block1", "block2")]  # fmt: skip
    assert loss[0] > loss[1] > loss[2]


# ----------------------------------------------------------------------------------- unlike stems, ties

class Wide(nn.Module):
    """`Digits` with a stem of another width and depth."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(1, inner, 1), nn.Tanh(), nn.Conv2d(inner, width, 3, padding=1))
        self.late = nn.Sequential(nn.Conv2d(width, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 4))

    def forward(self, x):
        return self.late(self.early(x))


def test_stems_of_other_widths():
    a, b = Wide(3, 8), Wide(5, 8)
    zipped = merge([a, b], since="late", method="solve")
    state = zipped.state_dict()
    assert state["early.0_task0.weight"].shape[0] == 3 and state["early.0_task1.weight"].shape[0] == 5
    c = Wide(4, 6)  # at the border, too: merged at the wider one's
    weight = merge([a, c], since="late").get_parameter("early_2_enter.weight")
    assert weight.shape == (8, 14)


class Deep(Wide):
    """`Wide` with one layer more, and another operator, in the stem."""

    def __init__(self, width: int) -> None:
        super().__init__(4, width)
        self.more = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.late(torch.sigmoid(self.early(F.relu(self.more(F.relu(x))))) + 0.1)


class Bright(Wide):
    def forward(self, x):
        return self.late(torch.sigmoid(self.early(x)) + 0.1)


def test_stems_of_other_kinds(tmp_path):
    torch.manual_seed(0)
    a, b = Bright(3, 8), Deep(6)
    zipped = merge({"a": a, "b": b}, since="late", method="solve")
    names = set(zipped.state_dict())
    assert "more_b.weight" in names and "more_a.weight" not in names and "late.0.weight" in names
    for task, model in (("a", a), ("b", b)):
        assert far(outputs(fxzip.extract(zipped, task)), outputs(zipped)[task]) == 0
        assert far(outputs(zipped)[task], model(DATA)) < 0.5
    fxzip.save(zipped, tmp_path)
    again = fxzip.load(tmp_path, lambda task: Bright(3, 8) if task == "a" else Deep(6))
    assert torch.equal(outputs(again)["b"], outputs(zipped)["b"])
    with pytest.raises(fxzip.InputError, match="fxzip.merge"):
        merge({"a": a, "b": b})


class Renamed(Wide):
    def forward(self, y):  # type: ignore[override]
        return self.late(self.early(y))


def test_inputs_of_other_names_are_refused():
    with pytest.raises(fxzip.InputError, match=r"needs models with the same inputs.*forward\(x\) and forward\(y\)"):
        merge([Wide(3, 8), Renamed(3, 8)], since="late")


class Twice(nn.Module):
    """A layer of the stem runs again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.mid, self.last = (nn.Linear(n, m) for n, m in ((4, 8), (8, 8), (8, 8), (8, 3)))

    def forward(self, x):
        x = F.relu(self.again(F.relu(self.first(x))))
        return self.last(F.relu(self.again(F.relu(self.mid(x)))))


def test_a_layer_of_both_parts_comes_apart(tmp_path):
    torch.manual_seed(0)
    a, b = Twice(), Twice()
    x = torch.randn(64, 4)
    zipped = merge([a, b], [x], since="mid")
    assert {"again.weight", "again_task0.weight", "again_task1.weight"} <= set(zipped.state_dict())
    for task in (0, 1):
        single = fxzip.extract(zipped, task)
        assert far(single(x), zipped(x)[task]) == 0
        assert torch.equal(single.get_parameter(f"again_task{task}.weight"), (a, b)[task].again.weight)
    fxzip.save(zipped, tmp_path)
    assert torch.equal(fxzip.load(tmp_path, Twice)(x)[0], zipped(x)[0])


class Tied(nn.Module):
    """Decodes with the weight of its stem."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(F.relu(self.mid(F.relu(self.first(x)))), self.first.weight.t())


def test_a_tensor_of_both_parts_comes_apart(tmp_path):
    torch.manual_seed(0)
    a, b = Tied(), Tied()
    x = torch.randn(64, 4)
    zipped = merge([a, b], [x], since="mid", method="solve")
    state = zipped.state_dict()
    assert torch.equal(state["first_task0.weight"], a.first.weight)
    assert not torch.equal(state["first.weight_task0"], a.first.weight)  # the decoder's: solved
    single = fxzip.extract(zipped, 0)
    assert far(single(x), zipped(x)[0]) == 0 and torch.equal(single.first.weight, a.first.weight)
    fxzip.save(zipped, tmp_path)
    assert torch.equal(fxzip.load(tmp_path, Tied)(x)[0], zipped(x)[0])


# ------------------------------------------------------------------------------------------------ refusals


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.a(x)
        return self.c(torch.relu(self.b(torch.relu(h)))), h


class Positions(nn.Module):
    """A value with features along two axes, one without a row per sample, one without features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b, self.c = kind, nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if kind == "outer":
            self.c, self.d = nn.Linear(36, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.kind == "outer":
            h = torch.einsum("bi,bj->bij", h, torch.tanh(self.b(h)))
            return self.d(torch.relu(self.c(torch.relu(h).flatten(1))))
        elif self.kind == "flat":
            h = h.repeat(2, 1)
        else:
            h = h.cumsum(1)
        h = self.c(torch.relu(h))
        return h[: len(x)].flatten(1)


@pytest.mark.parametrize(
    ("make", "since", "message"),
    [
        (digits, "blok1", r"since=\"blok1\" is no module or node that this graph runs. Did you mean 'block1'"),
        (digits, "x", r"since=\"x\" is an placeholder of the graph, not a layer. Cut points"),
        (digits, "fc", r"nothing can be merged: no layer is shared from since=\"fc\" on. Cut points"),
        (Skips, "b", r"the output reads %a, which comes before. Cut points"),
        (lambda: Positions("outer"), "flatten", r"which crosses there, has its features along several axes \(1, 2\)"),
        (lambda: Positions("flat"), "c", r"which crosses there, has not one row per sample"),
        (lambda: Positions("cumsum"), "c", r"which crosses there, is not made of features that may be merged alone"),
    ],
)
def test_refusals(make, since, message):
    torch.manual_seed(0)
    nets = [make(), make()]
    x = DATA if isinstance(nets[0], Digits) else torch.randn(16, 4)
    with unchanged(nets), pytest.raises((fxzip.InputError, fxzip.SpaceError), match=message):
        merge(nets, [x], since=since)


def test_until_before_since_is_refused():
    with pytest.raises(fxzip.InputError, match=r'until="stem" comes before since="block1"'):
        merge([digits(0), digits(1)], since="block1", until="stem")
    with pytest.raises(fxzip.SpaceError, match="nothing can be merged"):
        merge([digits(0), digits(1)], since="block1", until="block1")


def test_a_path_is_a_text():
    with pytest.raises(fxzip.InputError, match="since must be the path of a module, got 3"):
        merge([digits(0), digits(1)], since=3)
