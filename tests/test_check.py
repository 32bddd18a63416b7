"""Pre-flight checks: exact messages, everything at once, nothing touched."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxzip.check import check_merge, compare_graphs, compare_shapes, unusable
from fxzip.errors import InputError
from fxzip.trace import state_of, trace

torch.set_num_threads(1)
X, Y = torch.randn(6, 3), torch.arange(6)


class Net(nn.Module):
    def __init__(self, width=4, classes=2, act=nn.ReLU, eps=1e-5):
        super().__init__()
        self.fc = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.act = act()
        self.head = nn.Linear(width, classes)

    def forward(self, x, mask=None):
        return self.head(self.act(self.norm(self.fc(x))))


def problems(*args, **kwargs):
    """The text of the InputError, with every model left as it was."""
    models = args[0]
    modules = (
        models.values() if isinstance(models, dict) else models if isinstance(models, (list, tuple)) else []
    )
    with unchanged([m for m in modules if isinstance(m, nn.Module)]), pytest.raises(InputError) as error:
        check_merge(*args, **kwargs)
    return str(error.value)


def test_good_call():
    models = {"cats": Net(classes=2).train(), "dogs": Net(classes=5)}
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with unchanged(models):
        checked = check_merge(models, loader)
    assert checked.names == ("cats", "dogs")
    assert checked.models == tuple(models.values())
    assert checked.as_dict == models and checked.loader is loader
    assert [t.shape for t in checked.example] == [(4, 3), (4,)]
    assert checked.notices == ()
    assert check_merge([Net(), Net()], example_inputs=X).names == ("task0", "task1")
    assert check_merge(nn.ModuleList([Net(), Net()]), [X]).loader == [X]
    wrapped = check_merge([nn.DataParallel(Net()), Net()], [X])
    assert wrapped.notices == ("task0: unwrapped DataParallel: the merge sees the Net inside",)
    assert type(wrapped.models[0]) is Net


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "fxzip.merge: no models given: a merge needs at least two"),
        ([Net()], "fxzip.merge: one model given: a merge needs at least two"),
        (Net(), "fxzip.merge: models is a single Net: pass a list or dict of at least two"),
        ("ab", "fxzip.merge: models must be a list or dict of nn.Modules, not str"),
        ([Net(), Net], "fxzip.merge: models[1] is the class Net, not an instance of it"),
        (
            {"a": Net(), "b": Net().state_dict()},
            "fxzip.merge: models['b'] is a mapping, not an nn.Module: load a state_dict into its"
            " architecture first",
        ),
        ([3, Net()], "fxzip.merge: models[0] is of type int, not an nn.Module"),
        (
            {"a.b": Net(), "c": Net()},
            "fxzip.merge: task name 'a.b' must be letters, digits, _ and -: it becomes part of module names",
        ),
        ({"a-b": Net(), "a_b": Net()}, "fxzip.merge: task name 'a_b' is too like 'a-b'"),
    ],
)
def test_models(models, message):
    text = problems(models, [X])
    assert text == message or message.removeprefix("fxzip.merge: ") in text.splitlines()[1:][0]


def test_names():
    assert problems([Net(), Net()], [X], names=["a", "a"]) == "fxzip.merge: task name 'a' is used twice"
    assert problems([Net(), Net()], [X], names=["a"]) == "fxzip.merge: 1 names for 2 models"
    assert "task name 3 must be letters" in problems({3: Net(), "b": Net()}, [X])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty: it gives no batch"),
        (iter([]), "loader is empty: it gives no batch"),
        (5, "loader is not iterable: int"),
        (X, "loader is a tensor float32[6, 3]: pass [tensor] for a single batch"),
        (TensorDataset(X, Y), "loader is a Dataset of samples: wrap it in a DataLoader, which makes batches"),
        (None, "neither loader nor example_inputs: tracing needs one batch as an example"),
        ({"x": [X]}, "loader has the keys ['x'], the models are named ['task0', 'task1']"),
        ({"task0": [X], "task1": []}, "loader['task1'] is empty: it gives no batch"),
    ],
)
def test_loaders(loader, message):
    assert problems([Net(), Net()], loader) == f"fxzip.merge: {message}"


@pytest.mark.parametrize("calibration", [0, -1, 2.5, True, None])
def test_calibration(calibration):
    text = problems([Net(), Net()], [X], calibration=calibration)
    assert text == f"fxzip.merge: calibration must be a positive number of samples, got {calibration!r}"


def test_batches_that_do_not_fit():
    bad = torch.randn(6, 5)
    fails = "do not fit task0: Net.forward(x, mask=None) fails on (float32[2, 5]): RuntimeError: "
    assert problems([Net(), Net()], [bad]).startswith("fxzip.merge: batches " + fails)
    assert problems([Net(), Net()], [bad], example_inputs=X).startswith("fxzip.merge: batches " + fails)
    assert problems([Net(), Net()], [X], example_inputs=bad).startswith(
        "fxzip.merge: example_inputs " + fails
    )
    text = problems([Net(), Net()], {"task0": [X], "task1": [{"images": X}]})
    lacks = "the batch with keys ['images'] lacks 'x'; forward takes (x, mask=None)"
    assert text == f"fxzip.merge: batches do not fit task1: {lacks}"


def test_data_that_is_needed():
    text = problems([Net(), Net()], example_inputs=X, needs_data=True)
    assert text.startswith("fxzip.merge: loader is missing: this method reads batches")
    assert check_merge([Net(), Net()], example_inputs=X).loader is None
    per_task = check_merge({"a": Net(), "b": Net()}, {"b": iter([X]), "a": [X]}).loader
    assert list(per_task) == ["a", "b"] and len(list(per_task["b"])) == 1


def test_weights_that_are_not_finite():
    bad = Net()
    with torch.no_grad():
        bad.fc.weight[0, :2] = torch.nan
        bad.head.bias[0] = torch.inf
    assert problems([Net(), bad], [X]) == (
        "fxzip.merge: 2 problems\n  1. task1: fc.weight holds NaN (2 of 12 entries)\n"
        "  2. task1: head.bias holds infinite values (1 of 2 entries)"
    )
    assert unusable(Net().to("meta"))[0] == (
        "fc.weight is on the meta device and has no values (6 of 6 tensors are)"
    )
    assert unusable(Net()) == []


def test_hooks():
    hooked = Net()
    hooked.fc.register_forward_hook(lambda module, args, output: -output)
    text = problems([hooked, Net()], [X])
    assert "task0: fc has a forward hook that returns a value: remove it before merging (handle.remove(), or" in text


def test_everything_is_listed_at_once():
    text = problems([Net(), 3], [], calibration=0, problems=["method 'zap' is unknown (did you mean 'zip'?)"])
    assert text.splitlines() == [
        "fxzip.merge: 4 problems",
        "  1. method 'zap' is unknown (did you mean 'zip'?)",
        "  2. models[1] is of type int, not an nn.Module",
        "  3. calibration must be a positive number of samples, got 0",
        "  4. loader is empty: it gives no batch",
    ]


# ---------------------------------------------------------------------------------------------- comparing


def graphs(*models):
    return compare_graphs([trace(m, X) for m in models], ["a", "b", "c"][: len(models)])


def test_same_graphs():
    assert graphs(Net(), Net(classes=7), Net(width=9)) == []


class Longer(Net):
    def forward(self, x):
        return super().forward(x) + 1


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 3)

    def forward(self, x):
        return self.one(x)


class Scaled(nn.Module):
    def __init__(self, scale, function=F.relu):
        super().__init__()
        self.scale, self.function = scale, function

    def forward(self, x):
        return self.function(x) * self.scale


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (Net(), Net(act=nn.GELU), "act is ReLU in a and GELU in b"),
        (Net(), Net(eps=1e-3), "norm.eps is 1e-05 in a and 0.001 in b"),
        (nn.MaxPool1d(2), nn.MaxPool1d(2, 1), "stride is 2 in a and 1 in b"),
        (Net(), Longer(), "node 5 is %output = output(head) in a and %add ("),
        (
            Net(),
            Other(),
            "b lacks fc.weight, fc.bias, norm.weight, norm.bias and 2 more; a lacks one.weight, one.bias",
        ),
        (
            nn.Sequential(OrderedDict(trunk=nn.Linear(3, 4), masks=nn.Linear(4, 2))),
            nn.Sequential(OrderedDict(trunk=nn.Linear(3, 4), label=nn.Linear(4, 2))),
            "a lacks label.weight, label.bias; if these are other heads on one trunk, name the layer",
        ),
        (Scaled(2.0), Scaled(3.0), "node 2 is %mul (test_check.py:"),
        (Scaled(2), Scaled(3), "= mul(relu, 2) in a and %mul (test_check.py:"),
        (Scaled(2), Scaled(2, F.silu), "node 1 is %relu (test_check.py:"),
    ],
)
def test_graphs_that_differ(a, b, message):
    if isinstance(a, nn.MaxPool1d):
        a, b = nn.Sequential(a), nn.Sequential(b)
    (text,) = graphs(a, b)
    assert text.startswith("a and b are not the same architecture: ") and message in text
    assert graphs(a, a, b)[0].startswith("a and c are not")


class Constant(nn.Module):
    def __init__(self, value, index=(0, 1, 2), persistent=False):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("table", torch.full((3,), value), persistent=persistent)
        self.register_buffer("index", torch.tensor(index))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x):
        return self.fc(x)[:, self.index] * self.table * self.mask


def test_constants_outside_the_checkpoint_must_be_equal():
    assert graphs(Constant(1.0), Constant(1.0)) == []
    assert graphs(Constant(1.0), Constant(2.0)) == [
        "a and b are not the same architecture: table, a constant that is not part of the checkpoint, has other"
        " values in b than in a; make it equal, or a persistent buffer if its mean has a meaning"
    ]
    assert graphs(Constant(1.0, persistent=True), Constant(2.0, persistent=True)) == []


def test_integer_buffers_must_be_equal():
    a, b = (Constant(1.0, i).state_dict() for i in ((0, 1, 2), (2, 1, 0)))
    b["mask"] = ~b["mask"]
    assert compare_shapes([a, b], ["a", "b"]) == [
        "index holds other integers in b than in a: a mean has no meaning",
        "mask holds other truth values in b than in a: a mean has no meaning",
    ]
    assert compare_shapes([a, b], ["a", "b"], allowed=["index", "mask"]) == []
    counts = [{"n": torch.tensor(3)}, {"n": torch.tensor(4)}]
    assert compare_shapes(counts, ["a", "b"]) == ["n holds other integers in b than in a: a mean has no meaning"]
    assert compare_shapes(counts, ["a", "b"], unread=["n"]) == []


def test_shapes():
    ab = ["a", "b"]
    states = [state_of(Net(classes=2)), state_of(Net(classes=5))]
    assert compare_shapes(states, ab) == [
        "head.weight is [2, 4] in a and [5, 4] in b",
        "head.bias is [2] in a and [5] in b",
    ]
    assert compare_shapes(states, ab, allowed={"head.weight", "head.bias"}) == []
    states[1] = {k: v.half() for k, v in states[0].items() if k != "fc.bias"}
    assert compare_shapes(states, ab)[:2] == [
        "fc.weight is torch.float32 in a and torch.float16 in b",
        "fc.bias is missing in b",
    ]
    assert compare_shapes([{"w": X}, {"w": X[0]}], ab, allowed={"w"}) == ["w is [6, 3] in a and [3] in b"]
