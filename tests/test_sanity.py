"""A merge that is likely to disappoint says so, in plain words and with the next thing to try; a good one is silent."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_determinism import X, small
from torch import nn

import fxzip
from fxzip import InputError, MergeWarning
from fxzip.rewrite import recompute_statistics
from fxzip.sanity import refuse_broken

torch.set_num_threads(1)


def trained(seed: int = 0):
    """Norm statistics as if X had been the training data."""
    model = small(seed)
    recompute_statistics(model, [X], lambda batch: (batch,))
    return model


def twins():
    model = trained()
    return {"a": model, "b": fxzip.scramble(model, X[:2])}


def said(models, data=X, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zipped = fxzip.merge(models, [data], progress=False, verify=False, **{"method": "permute", **options})
    texts = [str(w.message) for w in caught if w.category is MergeWarning]
    assert tuple(texts) == fxzip.report(zipped).notices[: len(texts)]
    return texts


def test_a_good_merge_is_silent():
    assert said(twins()) == []
    assert said(twins(), method="solve") == []


def test_next_to_nothing_is_shared():
    models = [nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 400)) for _ in range(2)]
    (text,) = said(models, torch.randn(64, 6), method="average")
    assert text.startswith("only 0.7% of the merged parameters are shared, so next to nothing was merged: see what")


def test_few_samples():
    assert said(twins(), X[:3]) == [
        "features were compared on 3 samples only, and correlations of so few say little: give a loader with some"
        " hundred samples of every task"
    ]


def test_inputs_that_are_all_the_same():
    wanted = "all 40 calibration inputs are the same: features cannot be compared on them, give real data"
    assert wanted in said(twins(), X[:1].repeat(40, 1, 1, 1))


def test_matching_near_chance():
    """Features of unrelated networks on inputs without any structure."""
    torch.manual_seed(0)
    models = []
    for k in range(2):
        net = nn.Sequential(nn.Linear(400, 8), nn.Linear(8, 3)).eval()
        with torch.no_grad():
            net[0].weight.zero_()[:, 200 * k : 200 * k + 200].normal_()
        models.append(net)
    (text,) = said(models, torch.randn(2048, 400))
    assert text.startswith("matched features hardly correlate (0.0")
    assert "chance in 8 of 8 merged features): are the calibration data what the models were trained on?" in text


@pytest.mark.parametrize("spoil", [lambda x: 255 * (x + 2), lambda x: x + 5, lambda x: x / 10])
def test_data_that_is_not_normalised_as_in_training(spoil):
    texts = said(twins(), spoil(X))
    assert [t.split(":")[0] for t in texts] == [
        f"the calibration data do not look like what {task} was trained on" for task in "ab"
    ]
    assert "check the normalisation of the inputs" in texts[0]


def test_the_users_own_measure():
    models = {"a": trained(0), "b": trained(1)}
    seen = []

    def evaluate(network, task):
        seen.append(task)
        with torch.no_grad():
            right = models[task](X).argmax(1)
            return float((network(X).argmax(1) == right).float().mean())

    texts = said(models, method="average", evaluate=evaluate)
    assert seen == ["a", "a", "b", "b"]
    lost = [t for t in texts if t.startswith("on ")]
    assert lost and "the merged network measures 0." in lost[0] and "the model itself 1: merge less (until=)" in lost[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zipped = fxzip.merge(twins(), [X], method="permute", progress=False, verify=False, evaluate=lambda n, t: 0.5)
    assert "evaluate: a 0.5, merged 0.5" in fxzip.report(zipped).notices
    with pytest.raises(InputError, match="evaluate returned 'good' for a, not a number"):
        fxzip.merge(twins(), [X], method="permute", progress=False, evaluate=lambda n, t: "good")


def test_nan_never_comes_out(monkeypatch):
    import importlib

    module = importlib.import_module("fxzip.passes.finish")
    assemble = module.assemble

    def spoiled(*args):
        zipped = assemble(*args)
        with torch.no_grad():
            next(zipped.parameters()).fill_(float("nan"))
        return zipped

    monkeypatch.setattr(module, "assemble", spoiled)
    with pytest.raises(fxzip.VerificationError, match="the merged network has NaN or infinite values in conv1.weight"):
        fxzip.merge(twins(), [X], method="average", progress=False)


def test_infinity_is_refused_in_what_is_learned_and_let_be_in_a_mask():
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    refuse_broken(net)
    nn.init.constant_(net.bias, torch.inf)
    with pytest.raises(fxzip.VerificationError, match=r"infinite values in bias \(1 tensors do\)"):
        refuse_broken(net)


class Limited(nn.Module):
    """Has a mask and a limit that nobody has set, both in its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(16, 12), nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(12)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("most", torch.tensor(torch.inf))

    def forward(self, x):
        kept = self.norm(torch.clamp(torch.relu(self.inner(x)), max=self.most))
        return self.head(kept)[:, :, None, None] + torch.softmax(x[:, None, :4, None] + self.mask, -1)[:, :3]


def test_infinity_that_a_buffer_means_is_kept():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Limited().eval())
    zipped = fxzip.merge(models, [torch.randn(64, 16)], method="permute", progress=False)
    assert all(bool(y.isfinite().all()) for y in zipped(torch.randn(5, 16)))
    assert {name.split("_")[0] for name, t in zipped.state_dict().items() if t.isinf().any()} == {"mask", "most"}
    models[1].norm.running_var[3] = torch.inf
    models[0].inner.bias.data[:2] = torch.inf
    models[0].mask[1, 0] = torch.nan
    with pytest.raises(InputError) as error:
        fxzip.merge(models, [torch.randn(64, 16)], progress=False)
    said = ["task0: inner.bias holds infinite values (2 of 12 entries)", "task0: mask holds NaN (1 of 16 entries)",
            "task1: norm.running_var holds infinite values (1 of 12 entries)"]  # fmt: skip
    assert [line.split(". ", 1)[1] for line in str(error.value).splitlines()[1:]] == said
