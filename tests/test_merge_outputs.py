"""What comes out of a merge: its outputs and report, what extract gives, batch-norm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from merging import DATA, Digits, digits, far, merge, outputs, twins
from torch import Tensor, nn
from toys import randomise

import fxzip
from fxzip import InputError
from fxzip.rewrite import recompute_statistics

torch.set_num_threads(1)


def test_a_list_gives_a_tuple_and_a_dict_a_dict():
    models = [digits(1, 3), digits(2, 5)]
    listed, named = merge(models), merge({"cats": models[0], "dogs": models[1]})
    a, b = outputs(listed), outputs(named)
    assert isinstance(a, tuple) and list(b) == ["cats", "dogs"]
    assert torch.equal(a[0], b["cats"]) and torch.equal(a[1], b["dogs"])
    assert fxzip.report(named).tasks == ("cats", "dogs")
    assert {n for n, _ in named.named_parameters() if n.startswith("fc")} == {
        "fc_cats.weight", "fc_cats.bias", "fc_dogs.weight", "fc_dogs.bias"}  # fmt: skip


def test_three_models_of_one_function():
    model, twin = twins(4)
    third = fxzip.scramble(model, DATA[:2], seed=8)
    wanted = outputs(model)
    for method in ("permute", fxzip.Zip(alpha=1.0)):  # alpha < 1 damps groups of three: the published algorithm
        found = outputs(merge([twin, model, third], method=method))
        assert len(found) == 3 and all(far(y, wanted) < 1e-4 for y in found)


def test_average_of_heads():
    models = [digits(1), digits(2)]
    separate, averaged = merge(models), merge(models, heads="average")
    found = outputs(averaged)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, torch.stack(outputs(separate)).mean(0))
    with pytest.raises(InputError, match=r'outputs of one shape.*\[2, 3\].*\[2, 5\].*heads="separate"'):
        merge([digits(1, 3), digits(2, 5)], heads="average")
    with pytest.raises(InputError, match="heads='mean' is unknown"):
        merge(models, heads="mean")


def test_report_states_the_facts():
    models = {"cats": digits(1, 3), "dogs": digits(2, 5)}
    zipped = merge(models, method="zip", verify=True)
    result = fxzip.report(zipped)
    text = str(result)
    assert text.startswith("fxzip: 2 models merged by zip (cats, dogs)")
    for fact in ("parameters", "FLOPs", "are shared by all tasks", "quality", "verification: sound", "seconds: trace"):
        assert fact in text, fact
    assert [s.name for s in result.inputs] == ["cats", "dogs"]
    assert result.inputs[0].parameters == sum(p.numel() for p in models["cats"].parameters())
    assert result.result.parameters == sum(p.numel() for p in zipped.parameters())
    private = sum(p.numel() for n, p in zipped.named_parameters() if n.startswith("fc"))
    assert result.shared == pytest.approx(1 - private / result.result.parameters)
    assert {(r.width, r.width_in) for r in result.spaces} == {(8, (8, 8)), (12, (12, 12))}
    for row in result.spaces:
        assert row.baseline is not None and row.quality is not None and row.baseline <= row.quality <= 1
    assert not result.frozen and not result.notices


def test_double_precision():
    model, data = digits().double(), DATA.double()
    recompute_statistics(model, [data], lambda batch: (batch,))
    twin = fxzip.scramble(model, data[:2])
    for method in ("permute", "zip", "solve"):
        zipped = merge([model, twin], [data], method)
        assert {p.dtype for p in zipped.parameters()} == {torch.float64}
        tolerance = 1e-4 if method == "solve" else 1e-7
        assert all(far(y, outputs(model, data)) < tolerance for y in outputs(zipped, data))


# ------------------------------------------------------------------------------------------------- extract


@pytest.mark.parametrize("method", ["permute", "cca"])
def test_what_needs_an_operator_of_ours_does_not_load_into_the_users_class(method):
    """Half of such a network, under the user's own names, would be another function."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Sigmoid(), nn.Linear(12, 3)) for _ in "ab")
    x = torch.randn(64, 8)
    zipped = fxzip.merge([a, b], [x], method=method, until="1", progress=False)
    single = fxzip.extract(zipped, 1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_0_unmerge_task1"):
        copy.deepcopy(b).load_state_dict(single.state_dict())
    assert torch.equal(single(x), zipped(x)[1])


def test_a_tie_across_the_cut_is_said_to_be_cut():
    """A language model's class would take both weights, by their names, for one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6), nn.Linear(6, 9))
    model[4].weight = model[0].weight
    zipped = fxzip.merge([model, copy.deepcopy(model)], [torch.randint(9, (40, 3))], method="zip", progress=False)
    assert "0.weight and 4.weight are one in the models and two in the result: a class that ties them cannot hold the" \
        " state_dict that extract gives" in fxzip.report(zipped).notices  # fmt: skip


def test_extract_loads_strictly():
    model, twin = twins(5)
    zipped = merge({"a": model, "b": twin})
    for task in ("a", "b", 0, 1):
        single = fxzip.extract(zipped, task)
        own = Digits(5)
        own.load_state_dict(single.state_dict(), strict=True)
        assert far(outputs(own.eval()), outputs(model)) < 1e-4
        assert far(outputs(single), outputs(model)) < 1e-4
    with pytest.raises(InputError, match="no task 'c'"):
        fxzip.extract(zipped, "c")


class Dated(nn.Module):
    """Its file format has changed once: files without a version are read the old way."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise RuntimeError(f"an old file: {local_metadata}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_extract_keeps_the_versions_of_the_users_state_dict(tmp_path):
    x = torch.randn(32, 4)
    zipped = fxzip.merge([Dated(), Dated()], [x], method="permute", progress=False)
    fxzip.save(zipped, tmp_path)
    for network in (zipped, fxzip.load(tmp_path, Dated)):
        own = Dated()
        own.load_state_dict(fxzip.extract(network, 1).state_dict(), strict=True)
        torch.testing.assert_close(own(x), zipped(x)[1])


# ---------------------------------------------------------------------------------------------- statistics


def test_average_without_data_warns_about_statistics():
    models = [digits(1), digits(2)]
    zipped = merge(models, None, "average", example_inputs=DATA[:2])
    assert any("batch-norm statistics were averaged" in n for n in fxzip.report(zipped).notices)
    with pytest.raises(InputError, match="loader is missing"):
        merge(models, None, "zip", example_inputs=DATA[:2])


def test_equal_models_keep_their_statistics_however_long_they_were_trained():
    a = digits(1)
    b = copy.deepcopy(a)
    b.get_buffer(next(n for n, _ in b.named_buffers() if n.endswith("num_batches_tracked"))).add_(7)
    zipped = merge([a, b], [DATA[:8] * 3], "average")
    assert any("the models agree" in n for n in fxzip.report(zipped).notices)
    assert all(far(y, outputs(a)) < 1e-6 for y in outputs(zipped))


@pytest.mark.parametrize("method", ["average", "permute", "zip", "solve"])
def test_equal_models_keep_their_own_batch_norm_statistics(method):
    """Statistics of a sample of other data would change the function; there is no need of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    randomise(model)
    other = model if method == "average" else fxzip.scramble(model, DATA[:2])
    zipped = fxzip.merge([model.eval(), other], [DATA], method=method, progress=False)
    wanted = model(DATA)
    for output in zipped(DATA):
        assert (output - wanted).abs().max() < 1e-3 * wanted.abs().max()
    if method != "solve":
        assert "batch-norm statistics are their own" in str(fxzip.report(zipped))


def test_models_that_only_look_alike_get_new_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder[1].weight.mul_(2)  # every correlation is 1
    report = str(fxzip.report(fxzip.merge([model, louder], [DATA], method="permute", progress=False)))
    assert "statistics are their own" not in report
