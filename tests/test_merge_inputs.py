"""What goes into a merge: models, which stay as they were; loaders of any kind, moments, methods."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import unchanged
from merging import DATA, digits, merge, same_bytes, twins
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxzip
from fxzip import METHODS, InputError, Permute, Select, Zip

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------- models


@fx.wrap
def grown(sizes: list[int]) -> int:
    sizes[0] += 1
    return sizes[0]


class Writes(nn.Module):
    """Of a list in its code a wrapped function makes another, in the shared part and in the head."""

    def __init__(self, seed: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x) * grown([2, x.shape[0]])) / grown([x.shape[1]])


@pytest.mark.parametrize("options", [{}, {"heads": "concat"}, {"budget": 1.5, "method": "solve"}, {"until": "head"}])
def test_a_function_may_write_to_its_list(options):
    models = [Writes(0, 3).eval(), Writes(1, 3 if "until" not in options else 4).eval()]
    x = torch.randn(64, 6)
    zipped = fxzip.merge(models, [x], progress=False, **{"method": "permute", **options})
    again = zipped(x)
    twice = zipped(x)
    assert all(torch.equal(a, b) for a, b in zip(again, twice, strict=True))
    program = torch.export.export(zipped, (x,), strict=False)  # runs the graph node by node
    assert all(torch.equal(a, b) for a, b in zip(again, program.module()(x), strict=True))
    copied = fxzip.merge([models[0], fxzip.scramble(models[0], x[:2])], [x], method="permute", progress=False)
    torch.testing.assert_close(copied(x)[1], models[0](x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_inputs_and_random_states_stay_as_they_were(method, training):
    models = [digits(1, 3), digits(2, 5)]
    for k, model in enumerate(models):
        model.train(training)
        model.stem.weight.requires_grad_(False)
        model.block1.eval()
        model.fc.weight.grad = torch.full_like(model.fc.weight, float(k))
    with unchanged(models):
        zipped = merge(models, [DATA[:32], DATA[32:]], method, verify=True)
    assert not any(m.training for m in zipped.modules())
    before = copy.deepcopy(models)
    with torch.no_grad():
        for tensor in (*zipped.parameters(), *zipped.buffers()):
            tensor.fill_(7)
    for model, old in zip(models, before, strict=True):
        assert same_bytes(model, old), "the result aliases its inputs"


def test_hooks_are_refused_with_the_way_out():
    models = [digits(1), digits(2)]
    handle = models[1].block1.register_forward_hook(lambda module, args, output: 2 * output)
    with unchanged(models), pytest.raises(InputError, match=r"task1: block1 has a forward hook.*handle"):
        merge(models)
    handle.remove()
    merge(models)


def test_training_mode_of_the_inputs_does_not_matter():
    evaluated, training = twins(), twins()
    for model in training:
        model.train()
    assert same_bytes(merge(evaluated), merge(training))


# ------------------------------------------------------------------------------------------------- loaders


def _generator():
    yield from DATA.split(16)


LOADERS = {
    "list": lambda: list(DATA.split(16)),
    "generator": _generator,
    "iterator": lambda: iter(DATA.split(16)),
    "labels": lambda: [(x, torch.zeros(len(x), dtype=torch.long)) for x in DATA.split(16)],
    "dicts": lambda: [{"x": x} for x in DATA.split(16)],
    "dicts with labels": lambda: [{"x": x, "labels": torch.zeros(len(x))} for x in DATA.split(16)],
    "DataLoader": lambda: DataLoader(TensorDataset(DATA, torch.zeros(64)), batch_size=16),
    "more than needed": lambda: [*DATA.split(16), *DATA.flip(0).split(16)],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_any_iterable_of_batches_will_do(kind):
    models = twins()
    reference = merge(models, list(DATA.split(16)), calibration=64)
    with unchanged(models):
        assert same_bytes(merge(models, LOADERS[kind](), calibration=64), reference)


def test_one_loader_per_task_is_read_in_turn():
    a, b = twins()
    first, second = DATA[:32], DATA[32:]
    found = merge({"a": a, "b": b}, {"a": first.split(8), "b": second.split(8)})
    order = [x for pair in zip(first.split(8), second.split(8), strict=True) for x in pair]
    assert same_bytes(found, merge({"a": a, "b": b}, order))


def test_calibration_counts_samples():
    models = [digits(1), digits(2)]
    cut = merge(models, [DATA], calibration=40)
    assert same_bytes(cut, merge(models, [DATA[:40]]))
    assert not same_bytes(cut, merge(models, [DATA]))


def test_moments_can_be_reused():
    models = [digits(1), digits(2)]
    moments = fxzip.collect(models, [DATA], progress=False)
    for method in ("permute", "zip", "select"):
        assert same_bytes(merge(models, method=method, moments=moments), merge(models, method=method))


def test_moments_from_a_file_are_enough(tmp_path):
    """Statistics measured elsewhere: no batch is needed any more, only batch norms lose by it."""
    models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2)]
    moments = fxzip.collect(models, [DATA], progress=False)
    moments.save(tmp_path / "moments.safetensors")
    again = fxzip.Moments.load(tmp_path / "moments.safetensors")
    assert again.form == moments.form == ({"shape": [2, 1, 8, 8], "dtype": "float32"},)
    with_data = fxzip.merge(models, [DATA], method="zip", moments=moments, progress=False)
    assert same_bytes(with_data, fxzip.merge(models, moments=again, method="zip", progress=False))
    with pytest.raises(InputError, match="loader is missing: this method reads batches"):
        fxzip.merge(models, moments=again, method="solve", progress=False)
    with pytest.raises(InputError, match="moments= were collected from these models in another order"):
        fxzip.merge(models[::-1], moments=again, method="zip", progress=False)
    with pytest.raises(InputError, match="moments= were collected from other models, or other weights"):
        fxzip.merge([models[0], fxzip.scramble(models[1], DATA[:2])], moments=again, method="zip", progress=False)


# ------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name, method", [("permute", Permute()), ("zip", Zip()), ("select", Select())])
def test_a_method_by_name_and_by_object(name, method):
    models = [digits(1), digits(2)]
    assert same_bytes(merge(models, method=name), merge(models, method=method))


def test_options_of_a_method_matter():
    models = [digits(1), digits(2)]
    assert not same_bytes(merge(models, method=Zip(alpha=0.1, beta=0.5)), merge(models, method=Zip(beta=0.0)))


def test_an_unknown_method_gets_a_hint():
    with pytest.raises(InputError, match="did you mean 'permute'"):
        merge([digits(1), digits(2)], method="permut")


def test_every_problem_of_a_call_at_once():
    with pytest.raises(InputError) as caught:
        fxzip.merge([digits(1), "model"], 3, calibration=0)  # type: ignore[list-item]
    text = str(caught.value)
    assert text.startswith("fxzip.merge: 3 problems")
    for part in ("models[1] is of type str", "loader is not iterable: int", "calibration must be a positive number"):
        assert part in text
