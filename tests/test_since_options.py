"""Private stems with everything else: until, heads, budgets, files, moments, the frontier, passes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from merging import DATA, Digits, digits, far, merge, outputs, same_bytes, twins
from torch.utils._pytree import tree_leaves

import fxzip
from fxzip import passes

pytestmark = pytest.mark.filterwarnings("ignore")


def test_with_until_the_middle_is_shared():
    a, b = digits(0, 3), digits(1, 5)
    zipped = merge({"a": a, "b": b}, since="block1", until="block2")
    names = set(zipped.state_dict())
    assert "block1.0.weight" in names and not any(n.startswith(("stem.", "block2.0.")) for n in names)
    assert {"stem_a.weight", "stem_b.weight", "block2.0_a.weight", "fc_b.weight"} <= names
    model, other = twins()
    for found in outputs(merge([model, other], since="block1", until="block2")):
        assert far(found, model(DATA)) < 1e-4


def test_a_tasks_network_has_all_stems():
    a, b = digits(0, 3), digits(1, 5)
    zipped = merge({"a": a, "b": b}, since="block1")
    for task, model in (("a", a), ("b", b)):
        single = fxzip.extract(zipped, task)
        assert torch.equal(outputs(single), outputs(zipped)[task])
        names = set(single.state_dict())
        other = "b" if task == "a" else "a"
        assert set(model.state_dict()) <= names and f"norm_{other}.running_var" in names
        assert torch.equal(single.stem.weight, model.stem.weight)
        with pytest.raises(RuntimeError, match="stem_"):
            Digits(3 if task == "a" else 5).load_state_dict(single.state_dict())


WIDER = {"method": "zip", "budget": 1.6}


@pytest.mark.parametrize("options", [{}, {"until": "block2"}, {"heads": "joint"}, WIDER], ids=str)
def test_saved_and_loaded(tmp_path, options):
    a, b = digits(0, 3), digits(1, 5)
    zipped = merge({"a": a, "b": b}, since="block1", **options)
    fxzip.save(zipped, tmp_path)
    again = fxzip.load(tmp_path, lambda task: Digits(3 if task == "a" else 5))
    assert same_bytes(again, zipped)
    assert all(torch.equal(x, y) for x, y in zip(*map(tree_leaves, (outputs(zipped), outputs(again))), strict=True))
    assert [n.name for n in again.graph.nodes] == [n.name for n in zipped.graph.nodes]
    assert torch.equal(outputs(fxzip.extract(again, "b")), outputs(fxzip.extract(zipped, "b")))


def test_another_architecture_is_not_loaded(tmp_path):
    fxzip.save(merge([digits(0), digits(1)], since="block1"), tmp_path)
    with pytest.raises(fxzip.InputError, match="model_fn builds another network"):
        fxzip.load(tmp_path, lambda: Digits(9))


def test_the_result_is_a_module_like_any_other():
    zipped = merge([digits(0), digits(1)], since="block1")
    exported = torch.export.export(zipped, (DATA,)).module()
    for other in (copy.deepcopy(zipped), pickle.loads(pickle.dumps(zipped)), exported):
        assert all(far(x, y) < 1e-6 for x, y in zip(outputs(other), outputs(zipped), strict=True))
    zipped(DATA)[0].sum().backward()
    assert all(p.grad is not None for n, p in zipped.named_parameters() if not n.startswith("fc_task1"))
    assert [y.shape[0] for y in outputs(zipped, torch.randn(3, 1, 12, 12))] == [3, 3]


def test_the_report_counts_the_models_whole():
    a, b = digits(0, 3), digits(1, 5)
    found = fxzip.report(merge({"a": a, "b": b}, since="block1"))
    assert [s.parameters for s in found.inputs] == [sum(p.numel() for p in m.parameters()) for m in (a, b)]
    stems = sum(p.numel() for m in (a, b) for p in (*m.stem.parameters(), *m.norm.parameters()))
    heads = sum(p.numel() for m in (a, b) for p in m.fc.parameters())
    assert found.shared == pytest.approx(1 - (stems + heads) / found.result.parameters)
    assert found.result.flops > max(s.flops for s in found.inputs)
    tasks = {row.name: (row.task, row.state) for row in found.nodes}
    assert tasks["stem_a"] == ("a", "per model") and tasks["stem_b"] == ("b", "per model")
    assert any(name.endswith("_enter") and state == "merged" for name, (_, state) in tasks.items())


@pytest.mark.parametrize("budget", [0.9, 1.6])
def test_a_budget_counts_the_stems(budget):
    a, b = digits(0), digits(1)
    one = fxzip.report(merge([a, b], method="zip", since="block1")).result.flops
    flops = fxzip.report(merge([a, b], method="zip", since="block1", budget=budget)).result.flops
    assert flops <= budget * one * 1.001 and flops != one


def test_moments_are_reused_and_resumed(tmp_path):
    a, b = digits(0), digits(1)
    moments = fxzip.collect([a, b], [DATA], since="block1", progress=False)
    want = merge([a, b], since="block1")
    assert same_bytes(merge([a, b], since="block1", moments=moments), want)
    assert same_bytes(merge([a, b], since="block1", resume=tmp_path), want)
    assert same_bytes(merge([a, b], since="block1", memory="3MB"), want)
    without = merge([a, b], None, since="block1", moments=moments)  # no loader: example inputs from the moments
    assert [y.shape for y in outputs(without)] == [y.shape for y in outputs(want)]


def test_planned_and_tried_on_a_frontier():
    a, b = digits(0), digits(1)
    made = fxzip.plan([a, b], [DATA], since="block1", method="zip")
    every = fxzip.plan([a, b], [DATA], method="zip")
    assert len(made.measuring.spaces) == len(every.measuring.spaces)  # that of the stem is of the border now
    solve = fxzip.Solve(fxzip.Zip(beta=1.0))
    found = fxzip.frontier([a, b], [DATA], [1.0], untils=["block2"], since="block1", calibration=48, holdout=16,
                           method=solve, progress=False)  # fmt: skip
    plain = fxzip.frontier([a, b], [DATA], [1.0], calibration=48, holdout=16, method=solve, progress=False)
    assert [p.name for p in found.points] == ["1x", "until block2", "ensemble"]
    assert found.points[0].cost > plain.points[0].cost and sum(found.points[0].drift) < sum(plain.points[0].drift)


def test_as_passes():
    a, b = digits(0), digits(1)
    graph = passes.start([a, b], [DATA], since="block1", progress=False)
    before = [passes.Infer(), passes.Cut(), passes.Read(), passes.Measure(), passes.Match("permute"), passes.Average(),
              passes.Build(), passes.Calibrate()]  # fmt: skip
    for stage in before:
        graph = stage(graph).graph_module
    with pytest.raises(fxzip.InputError, match="run passes.Prepend before"):
        passes.Describe()(graph)
    for stage in (passes.Prepend(), passes.Describe()):
        graph = stage(graph).graph_module
    assert same_bytes(graph, merge([a, b], since="block1"))


def test_evaluate_sees_whole_networks():
    seen = []
    merge({"a": digits(0), "b": digits(1)}, since="block1", evaluate=lambda m, t: seen.append(m(DATA).shape) or 1.0)
    assert seen == [(64, 10)] * 4
