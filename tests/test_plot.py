"""Figures, notebook tables, and the line and plane between networks."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from helpers import unchanged
from torch import Tensor, nn

import fxzip
from fxzip import InputError, landscape
from fxzip.evaluate import Accuracy, Cost

plot = pytest.importorskip("fxzip.plot")
pytest.importorskip("matplotlib", reason="figures need the report extra")
torch.set_num_threads(1)
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {"a": network(0), "b": network(1)}


@pytest.fixture(scope="module")
def zipped(models):
    return fxzip.merge(models, [X], progress=False)


def drift(model):
    def of(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(X) - model(X)).square().mean())

    return of


def test_figures_show_every_space_and_layer(zipped, models, tmp_path):
    found = fxzip.inspect(models["a"], X[:2])
    report = fxzip.report(zipped)
    assert len(plot.spaces(found).axes[0].patches) == len(found)
    assert [len(line.get_xdata()) for line in plot.correlations(zipped).axes[0].lines] == [len(report.spaces)] * 2
    assert len(plot.layers(report).axes[0].get_xticklabels()) == len(report.layers)
    name = report.spaces[0].name
    figure = plot.similarity(zipped, name)
    assert figure.axes[1].images[0].get_array().shape == (report.spaces[0].matched.side,) * 2
    assert plot.graph(found).axes[0].collections
    figure.savefig(tmp_path / "similarity.png")


def test_accuracies_stand_beside_what_they_cost():
    found = {"one": Accuracy((90.0, 80.0), 85.0, 60.0), "both": Accuracy((91.0, 83.0), 87.0, 66.0)}
    (bars,) = plot.accuracies(found).axes
    assert [[p.get_height() for p in row] for row in bars.containers] == [[90, 91], [80, 83], [60, 66]]
    _, points = plot.accuracies(found, {"both": Cost(2, 300), "one": Cost(1, 200)}).axes
    assert [line.get_xydata().tolist() for line in points.lines] == [[[1, 85], [1.5, 87]], [[1, 60], [1.5, 66]]]
    for wrong, costs, said in (
        ({}, None, "there is no network"),
        ({**found, "third": Accuracy((1.0,), 1.0, 1.0)}, None, "other numbers of tasks: {'one': 2, 'both': 2, 'third'"),
        (found, {"one": Cost(1, 200)}, "no cost of both"),
    ):
        with pytest.raises(InputError, match=f"plot.accuracies: .*{said}"):
            plot.accuracies(wrong, costs)


class Branches(nn.Module):
    """Three ways of 3, 1 and 2 layers from the stem to the sum, and one round them all."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.ways = nn.ModuleList(nn.Sequential(*(nn.Linear(8, 8) for _ in range(k))) for k in (3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + sum(way(x) for way in self.ways))


def test_every_branch_of_the_graph_has_a_row():
    found = fxzip.inspect(Branches().eval(), X[:2])
    drawn = plot.graph(found).axes[0].collections[0].get_offsets().tolist()
    assert len(drawn) == len({tuple(place) for place in drawn})
    rows = {y: sorted(x for x, other in drawn if other == y) for y in {y for _, y in drawn}}
    assert sorted(map(len, rows.values())) == [1, 2, len(drawn) - 3]
    assert all(xs == list(range(int(xs[0]), int(xs[0]) + len(xs))) for xs in rows.values())  # without a gap


def test_what_cannot_be_drawn_says_why(zipped, models):
    plain = fxzip.merge(models, [X], method="rebasin", progress=False)
    with pytest.raises(InputError, match="fitted no layers"):
        plot.layers(plain)
    with pytest.raises(InputError, match="no merged space 's9'; there are s0"):
        plot.similarity(zipped, "s9")
    with pytest.raises(InputError, match="measured no activations on s0"):
        plot.similarity(plain, "s0")


def test_alignment_removes_the_barrier_between_copies(models):
    pair = {"a": models["a"], "b": fxzip.scramble(models["a"], X[:2], seed=3)}
    with unchanged(pair):
        found = landscape.line(pair, [X], drift(models["a"]), steps=5)
    before, after = found.barriers
    assert before > 1e-3 and abs(after) < 1e-6 * before + 1e-9
    assert "barrier:" in str(found) and len(found.plot().axes[0].lines) == 2


def test_repair_on_the_line(models):
    """The ends are the models; between them it is what merge gives with these weights."""
    plain = [nn.Sequential(*(m for m in net if not isinstance(m, nn.BatchNorm1d))) for net in models.values()]
    seen: list[Tensor] = []
    landscape.line(plain, [X], lambda net: seen.append(net(X)) or 0.0, method="permute+repair", steps=5)
    torch.testing.assert_close(seen[5], plain[0](X), atol=1e-4, rtol=1e-3)
    zipped = fxzip.merge(plain, [X], method="permute+repair", model_weights=[3, 1], heads="average", progress=False)
    torch.testing.assert_close(seen[6], zipped(X), atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="repair measures features: pass a loader"):
        landscape.line(plain, None, lambda net: 0.0, method="permute+repair", example_inputs=X[:2])


def test_ends_of_the_line_are_the_models(models):
    """At share 0 the first model's outputs are its own, at 1 the second's."""
    ends: list[Tensor] = []
    landscape.line(models, [X], lambda net: ends.append(net(X)) or 0.0, method="rebasin", steps=2)
    for k, output in enumerate(ends):
        torch.testing.assert_close(output, _own(models["ab"[k % 2]]), atol=1e-5, rtol=1e-4)


def test_a_line_needs_one_task(models):
    other = nn.Sequential(*network(2)[:5], nn.Linear(8, 2)).eval()
    with pytest.raises(InputError, match="two networks of one task"):
        landscape.line([models["a"], other], [X], lambda net: float(net(X).sum()), steps=2)


def test_what_a_line_and_a_plane_need_is_said_as_it_is(models):
    with pytest.raises(InputError, match="two models and at least 2 steps, not 1 models and 11 steps"):
        landscape.line([models["a"]], [X], lambda net: 0.0)
    zipped = fxzip.merge(models, [X], method="permute", progress=False)
    with pytest.raises(InputError, match="two models and at least 2 steps, not 2 models and 1 steps"):
        landscape.plane(models, zipped, lambda net: 0.0, steps=1)
    twins = [models["a"], models["a"]]
    found = landscape.plane(twins, fxzip.merge(twins, [X], method="average", progress=False), lambda net: 0.0, steps=2)
    assert found.points["merged"] == (0.0, 0.0)


def _own(model: nn.Module) -> Tensor:
    """With batch-norm statistics of the calibration data, as everywhere on the line."""
    from copy import deepcopy

    fresh = deepcopy(model)
    fresh[1].reset_running_stats()
    fresh[1].momentum = None
    fresh.train()(X)
    return fresh.eval()(X)


def test_only_one_to_one_methods_make_a_line(models):
    with pytest.raises(InputError, match="zip is not one-to-one on space"):
        landscape.line(models, [X], lambda net: 0.0, method="zip", steps=2)


def test_the_plane_passes_through_models_and_merge(models):
    zipped = fxzip.merge(models, [X], method="permute", progress=False)
    seen: dict[float, dict] = {}

    def evaluate(net: nn.Module) -> float:
        key = float(len(seen))
        seen[key] = {n: t.clone() for n, t in net.state_dict().items()}
        return key

    with unchanged([*models.values(), zipped]):
        found = landscape.plane(models, zipped, evaluate, steps=3, margin=0.0)
    assert found.points["a"] == (0.0, 0.0) and found.points["b"][1] == 0 and found.points["merged"][1] > 0
    corners = {"a": seen[found.values[0][0]], "b": seen[found.values[0][-1]]}
    for task, corner in corners.items():
        for name, tensor in models[task].state_dict().items():
            if name.startswith("0."):
                torch.testing.assert_close(corner[name], tensor)
        apart = [(corner[n] - t).double().flatten() for n, t in zipped.state_dict().items() if t.is_floating_point()]
        assert math.dist(found.points[task], found.points["merged"]) == pytest.approx(float(torch.cat(apart).norm()))
    assert len(found.values) == 3 and found.plot().axes


def test_a_wider_merge_has_no_plane(models):
    wide = fxzip.merge(models, [X], method="zip", budget=1.5, progress=False)
    with pytest.raises(InputError, match="merge at their own widths"):
        landscape.plane(models, wide, lambda net: 0.0)


def test_notebook_tables_are_escaped(zipped, models):
    from dataclasses import replace

    report = replace(fxzip.report(zipped), notices=("<b>",), tasks=("<i>", "b"))
    html = report._repr_html_()
    assert "&lt;b&gt;" in html and "&lt;i&gt;" in html and "<i>" not in html
    assert fxzip.inspect(models["a"], X[:2])._repr_html_().startswith("<table>")
    found = fxzip.Frontier((), ("<u>",))._repr_html_()
    assert "drift &lt;u&gt;" in found


def test_notebooks_show_figures_and_pickles_keep_them(models):
    figure = plot.spaces(fxzip.inspect(models["a"], X))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")
