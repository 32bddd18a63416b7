"""How models are called: batches bound to arguments, their rows, what of an output counts, forward_fn."""

import inspect
from collections import OrderedDict, UserDict
from types import SimpleNamespace

import pytest
import torch
from test_trace import X, Y
from torch import Tensor, nn

import fxzip
from fxzip.errors import InputError
from fxzip.trace import batch_size, bind, counted, describe, first_rows, rows

torch.set_num_threads(1)


def signature(function):
    return inspect.signature(function)


@pytest.mark.parametrize(
    ("batch", "forward", "names"),
    [
        (X, lambda x: 0, "X"),
        ((X, Y), lambda x: 0, "X"),
        ([X, Y], lambda x: 0, "X"),
        ((X, Y), lambda x, y: 0, "XY"),
        ((X, Y), lambda x, mask=None: 0, "X"),
        ((X, Y), lambda x=None, mask=None: 0, "X"),
        ((X, Y), lambda *xs: 0, "XY"),
        (({"x": X}, Y), lambda x: 0, "X"),
        ({"y": Y, "x": X}, lambda x, y: 0, "XY"),
        (UserDict(b=X, labels=Y), lambda a=None, b=None, labels=None: 0, "-X"),
        ({"x": X, "other": Y}, lambda x: 0, "X"),
        ({"labels": Y, "x": X}, lambda x, labels: 0, "XY"),
    ],
)
def test_bind(batch, forward, names):
    got = bind(batch, signature(forward))
    want = tuple({"X": X, "Y": Y, "-": None}[n] for n in names)
    assert len(got) == len(want) and all(a is b for a, b in zip(got, want, strict=True))


def test_bind_takes_names_for_a_signature():
    assert [t.shape for t in bind((X, Y), ["a", "b"])] == [(4, 3), (4,)]


def f(input_ids, mask, labels=None):
    return 0


@pytest.mark.parametrize(
    ("batch", "function", "message"),
    [
        (
            {"ids": X},
            f,
            "keys ['ids'] lacks 'input_ids', 'mask'; forward takes (input_ids, mask, labels=None)",
        ),
        ({"z": X}, lambda x=None: 0, "keys ['z'] has none of forward's parameters; forward takes (x=None)"),
        ((X,), f, "has 1 item (float32[4, 3]), forward requires 2: (input_ids, mask, labels=None)"),
        ((), f, "must be a tensor, a non-empty tuple or list, or a mapping; got ()"),
        (None, f, "must be a tensor, a non-empty tuple or list, or a mapping; got None"),
        (([1, 2], Y), lambda x: 0, "item 0 of the batch holds no tensor but [1, 2]; forward takes (x)"),
        ({"x": X}, lambda *, x: 0, "forward takes 'x' by keyword only: (x). Wrap the model"),
    ],
)
def test_bind_says_what_is_wrong(batch, function, message):
    with pytest.raises(InputError) as error:
        bind(batch, signature(function))
    assert message in str(error.value)


def test_rows_cut_and_repeat_what_has_the_batch_axis():
    args = (X, torch.zeros(7), {"y": Y, "n": 3})
    assert batch_size(args) == 4
    cut, more = rows(args, 1), rows(args, 6)
    assert torch.equal(cut[0], X[:1]) and cut[1].shape == (7,) and cut[2]["n"] == 3
    assert torch.equal(more[0][4:], X[:2]) and torch.equal(more[2]["y"], torch.tensor([0, 1, 2, 3, 0, 1]))
    assert describe(args) == "(float32[4, 3], float32[7], {'y': int64[4], 'n': 3})"


def test_first_rows_keeps_names():
    cut = first_rows((UserDict(x=torch.zeros(4, 3), flag=True), torch.zeros(4)), 2)
    assert cut["x"].shape == (2, 3) and cut["flag"] is True
    assert first_rows((torch.zeros(4, 3), torch.zeros(4)), 5)[0].shape == (5, 3)


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (lambda t: t, lambda t: t),
        (lambda t: {"out": t, "n": 3}, lambda t: {"out": t, "n": 3}),
        (lambda t: OrderedDict(out=(t, None)), lambda t: OrderedDict(out=(t, None))),
        (lambda t: SimpleNamespace(loss=t + 1, logits=t), lambda t: t),
        (lambda t: UserDict(loss=t + 1, logits=t), lambda t: t),
        (lambda t: SimpleNamespace(ids=torch.arange(2), hidden=t, other=t + 1), lambda t: t),
    ],
)
def test_counted_outputs(output, wanted):
    t = torch.ones(2)
    assert repr(counted(output(t))) == repr(wanted(t))


def test_forward_fn_chooses_inputs_and_output(tmp_path):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            hidden = torch.relu(self.b(torch.relu(self.a(x * scale))))
            return {"logits": self.c(hidden), "hidden": hidden}

    def hidden(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        return model(x, scale=scale)["hidden"]

    torch.manual_seed(0)
    net, some = Encoder().eval(), {"x": torch.randn(64, 4), "scale": torch.rand(64, 1)}
    spaces = fxzip.inspect(net, some, forward_fn=hidden)
    assert [s.size for s in spaces] == [16]
    assert fxzip.verify(net, some, forward_fn=hidden).ok
    other = fxzip.scramble(net, some, forward_fn=hidden)
    assert torch.equal(other.b.bias, net.b.bias) and not torch.equal(other.a.bias, net.a.bias)
    zipped = fxzip.merge([net, other], [some], method="permute", forward_fn=hidden, progress=False)
    assert all(torch.allclose(y, hidden(net, **some), atol=1e-5) for y in zipped(**some))
    fxzip.save(zipped, tmp_path)
    again = fxzip.load(tmp_path, Encoder, forward_fn=hidden)
    assert torch.equal(again(**some)[0], zipped(**some)[0])
    with pytest.raises(InputError, match=r"forward_fn\(\*, x\) must take the model first: forward_fn\(model, x\)"):
        fxzip.inspect(net, some, forward_fn=lambda *, x: x)
