"""frontier(): budgets and cuts side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import unchanged
from torch import nn

import fxzip
from fxzip import InputError

torch.set_num_threads(1)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 9, 4),
    ).eval()  # fmt: skip


def batches(count: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(32 * count, 1, 8, 8, generator=torch.Generator().manual_seed(7)).split(32))


@pytest.fixture(scope="module")
def found():
    models, seen = {"a": network(0), "b": network(1)}, []
    with unchanged(list(models.values())):
        result = fxzip.frontier(
            models, batches(), [1.0, 1.5], untils=["3"], calibration=128, holdout=64, progress=False,
            evaluate=lambda net: seen.append(sorted(net(batches(1)[0]))) or len(seen) / 10,
        )  # fmt: skip
    assert seen == [["a", "b"]] * 4  # three merges and the ensemble answer alike
    return result


def test_points_rise_in_cost_to_the_ensemble(found):
    names, costs = [p.name for p in found.points], [p.cost for p in found.points]
    assert names[0] == "1x" and names[-1] == "ensemble" and set(names[1:-1]) == {"1.5x", "until 3"}
    assert costs == sorted(costs) and costs[0] == pytest.approx(1, rel=0.03) and costs[-1] == 2
    assert 1.2 < next(p.cost for p in found.points if p.name == "1.5x") <= 1.5


def test_more_flops_drift_less(found):
    by_name = {p.name: sum(p.drift) for p in found.points}
    assert 2 > by_name["1x"] > by_name["1.5x"] > by_name["ensemble"] == 0
    assert by_name["until 3"] < by_name["1x"]


def test_table_and_figure(found):
    lines = str(found).splitlines()
    assert lines[0].split() == ["merge", "FLOPs", "parameters", "drift", "a", "drift", "b", "measured"]
    assert len(lines) == 6 and lines[-1].split()[:2] == ["ensemble", "2.00x"]
    pytest.importorskip("matplotlib", reason="Frontier.plot needs the report extra")
    figure = found.plot(label="accuracy")
    (axes,) = figure.axes
    assert axes.get_ylabel() == "accuracy" and len(axes.lines[1].get_xdata()) == 4


def test_the_drift_is_of_samples_that_were_not_fitted():
    """With fewer samples than parameters the fit is exact where it was fitted, and nowhere else."""
    models = [network(0), network(1)]
    fitted = fxzip.frontier(models, batches(1), [1.0], calibration=32, holdout=32, progress=False)
    fresh = fxzip.frontier(models, batches(2), [1.0], calibration=32, holdout=32, progress=False)
    assert sum(fresh.points[0].drift) > 1.2 * sum(fitted.points[0].drift)


def test_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        fxzip.frontier([network(0), network(1)], batches(), [0, "2"], evaluate=3, holdout=0, budget=2)  # type: ignore
    for part in (
        "budget 0 must be a number of at least 0.1", "budget '2' must be", "evaluate must be callable, not a int",
        "holdout must be a positive number of samples, got 0", "budget= is what frontier varies",
    ):  # fmt: skip
        assert part in str(caught.value)
    for options, said in (({"method": "permute"}, "permute keeps the models'"), ({"round_to": 0}, "round_to must")):
        with pytest.raises(InputError, match=f"fxzip.frontier: {said}"):
            fxzip.frontier([network(0), network(1)], iter(()), [1, 1.3], **options)  # before a batch is read
    with pytest.raises(InputError, match="both empty: nothing to merge"):
        fxzip.frontier([network(0), network(1)], batches(), [])


def test_what_was_measured_is_kept_for_every_cut(tmp_path):
    """Once the second cut refused what the first had left in the folder."""
    given = {"untils": ["2", "4"], "calibration": 32, "holdout": 32, "progress": False}
    models = [network(0), network(1)]
    plain = fxzip.frontier(models, batches(), [1.0], **given)
    for _ in range(2):
        assert fxzip.frontier(models, batches(), [1.0], resume=tmp_path, **given) == plain
    assert sorted(p.parent.name for p in tmp_path.rglob("*.safetensors")) == [tmp_path.name, "until 2", "until 4"]
    with pytest.raises(InputError, match="heads= joins outputs"):
        fxzip.frontier(models, batches(), [1.0], heads="concat", progress=False)


def test_models_are_called_as_the_user_says():
    class Two(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            self.inner = network(seed)

        def forward(self, x):
            return {"other": x.sum(), "scores": self.inner(x)}

    models = [Two(0), Two(1)]
    options = {"forward_fn": lambda model, x: model(x)["scores"], "progress": False}
    one = fxzip.frontier(models, batches(), [1.0], **options).points
    assert one == fxzip.frontier([m.inner for m in models], batches(), [1.0], progress=False).points


def test_a_figure_of_what_is_no_number_says_how(found):
    pytest.importorskip("matplotlib", reason="Frontier.plot needs the report extra")
    words = fxzip.Frontier(tuple(replace(p, measured={}) for p in found.points), found.tasks)
    with pytest.raises(InputError, match="evaluate gave dict, which is no number: pass value="):
        words.plot()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x, mask=None):
        h = torch.relu(self.first(x))
        return self.second((h if mask is None else h * mask[..., None]).mean(1))


def test_arguments_that_need_not_be_given_are_not_lost():
    torch.manual_seed(0)
    loader = [{"mask": (torch.rand(48, 5) > 0.5).float(), "x": torch.randn(48, 5, 4)} for _ in range(2)]
    quick: dict = {"progress": False, "verify": False}
    found = fxzip.frontier([Masked(), Masked()], loader, [1.0], calibration=64, holdout=32, **quick)
    assert [p.name for p in found.points] == ["1x", "ensemble"] and max(found.points[0].drift) < 0.5
