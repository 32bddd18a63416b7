"""Laws of the whole pipeline, on small nets: what is the same comes back, and strangers merge to something of use."""

from __future__ import annotations

import pytest
import torch
from helpers import unchanged
from merging import STRUCTURES, digits, far, merge, outputs, scrambled, twins
from torch import nn
from toy_attention import VisionTransformer
from toys import randomise

import fxzip
from examples import EXAMPLES
from fxzip import METHODS, InputError, SpaceError, Zip
from fxzip.trace import trace

torch.set_num_threads(1)
# Their first layer's features are read by position, too (or the blocks they vote for); spaces that remain belong to
# the heads alone, or lie inside such a block.
PINNED_BEFORE = {
    "features: addr", "features: argmax of votes", "features: max of votes", "tokens: index_add by features",
    "volume: grid_sampler_3d",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ recovery


@pytest.mark.parametrize("example", STRUCTURES, ids=str)
def test_a_scrambled_copy_merges_back(example):
    """Every structure: residuals, concatenations, heads, gates, groups, recurrence, tied weights."""
    model, twin, batches = scrambled(example)
    wanted = outputs(model, *batches[0])
    assert far(outputs(twin, *batches[0]), wanted) < 1e-4
    for method in ("permute", "zip", "solve"):
        zipped = merge([model, twin], batches, method)
        for output in outputs(zipped, *batches[0]):
            assert far(output, wanted) < 1e-4, f"{method}\n{fxzip.report(zipped)}"


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e not in STRUCTURES], ids=str)
def test_every_rule_merges_back(example):
    model, twin, batches = scrambled(example)
    try:
        zipped = merge([model, twin], batches)
    except SpaceError as refusal:
        assert "nothing can be merged: %before cannot be shared" in str(refusal)
        assert bool(fxzip.inspect(model, batches[0]).spaces) == (example.name in PINNED_BEFORE)
        return
    wanted = outputs(model, *batches[0])
    for output in outputs(zipped, *batches[0]):
        assert far(output, wanted) < 1e-4, str(fxzip.report(zipped))


@pytest.mark.parametrize(
    "name", ["grouped-query attention", "vision transformer", "shifted windows", "grouped bottleneck", "shuffle block"]
)
def test_every_node_is_a_cut_or_refused(name):
    """A cut through the middle of attention, groups or a shuffle is exact, or says why it cannot be."""
    model, twin, batches = scrambled(next(e for e in STRUCTURES if e.name == name))
    wanted, legal = outputs(model, *batches[0]), 0
    nodes = [n for n in trace(model, batches[0]).graph_module.graph.nodes if n.op not in ("placeholder", "output")]
    for node in nodes[:: 1 + len(nodes) // 15]:
        try:
            zipped = merge([model, twin], batches, until=node.name)
        except SpaceError as refusal:
            assert "nothing can be merged" in str(refusal) or "is several tensors, so the cut" in str(refusal)
            continue
        legal += 1
        assert all(far(y, wanted) < 1e-4 for y in outputs(zipped, *batches[0])), node.name
    assert legal > 0.6 * len(nodes[:: 1 + len(nodes) // 15])


@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_the_model(method):
    model = digits()
    zipped = merge([model, model], method=method)
    wanted = outputs(model)
    tolerance = 1e-3 if method == "select" else 1e-4  # select fits its unmerge with a ridge
    assert all(far(y, wanted) < tolerance for y in outputs(zipped))


@pytest.mark.parametrize("name", ["flip", "roll", "stack", "_trilinear"])
def test_select_keeps_equal_models_even_on_data_of_low_rank(name):
    """Fewer samples than features: least squares has many answers, and only one survives what follows."""
    example = next(e for e in EXAMPLES if e.name == f"features: {name}")
    model, data = example.build(), example.data()
    zipped = fxzip.merge([model, model], [data], method="select", progress=False)
    wanted = model(*data) if isinstance(data, tuple) else model(data)
    for output in zipped(*data) if isinstance(data, tuple) else zipped(data):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


def test_every_cut_gives_the_models_back():
    model, twin = twins()
    wanted = outputs(model)
    shared = []
    for until in ("block1", "block1.3", "block2", "block2.4", "drop", "fc", None):
        zipped = merge([model, twin], until=until)
        assert all(far(y, wanted) < 1e-4 for y in outputs(zipped)), until
        shared.append(fxzip.report(zipped).shared)
    assert shared == sorted(shared) and shared[0] < 0.1 < 0.9 < shared[-1]
    assert shared[-1] == shared[-2], "the head is private anyway"


def test_cut_points_are_legal_cuts():
    model, twin = twins()
    points = fxzip.cut_points(torch.fx.symbolic_trace(model))
    assert points[0] == "stem" and points[-1] == "fc" and "block1_0" not in points
    wanted = outputs(model)
    for point in points[2:]:
        zipped = merge([model, twin], until=point)
        assert all(far(y, wanted) < 1e-4 for y in outputs(zipped)), point
    with pytest.raises(SpaceError, match='until="stem" keeps it and all that is downstream'):
        merge([model, twin], until="stem")
    with pytest.raises(InputError, match="Did you mean 'block1'"):
        merge([model, twin], until="blok1")


# ----------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_strangers(method):
    """Networks that have nothing in common merge to finite numbers, of the right sizes, at one model's cost."""
    models = [digits(1, 3), digits(2, 5), digits(3, 4)]
    zipped = merge(models, method=method)
    assert [tuple(y.shape) for y in outputs(zipped)] == [(64, 3), (64, 5), (64, 4)]
    assert all(y.isfinite().all() for y in outputs(zipped))
    result = fxzip.report(zipped)
    assert result.method == method and len(result.tasks) == 3
    assert result.result.parameters < 1.6 * result.inputs[0].parameters


def test_a_merged_strangers_private_part_is_its_own():
    """With everything but the stem private, each output stays near its parent's; a swap would show."""
    models = [digits(1), digits(2)]
    zipped = merge(models, method=Zip(), until="block1", budget=None)
    a, b = outputs(zipped)
    own = [outputs(m) for m in models]
    assert far(a, own[0]) < far(a, own[1]) and far(b, own[1]) < far(b, own[0])


def test_a_vision_transformer_through_the_whole_pipeline():
    a, b = (randomise(VisionTransformer(), seed).eval() for seed in (1, 2))
    images = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with unchanged([a, b]):
        zipped = fxzip.merge({"a": a, "b": b}, [images], progress=False)
    found = outputs(zipped, images)
    assert all(y.shape == (48, 3) and y.isfinite().all() for y in found.values())
    assert "2 x 4" in str(fxzip.report(zipped))
    average = outputs(merge({"a": a, "b": b}, [images], "average"), images)
    assert all(far(found[t], outputs(m, images)) < far(average[t], outputs(m, images)) for t, m in (("a", a), ("b", b)))


def test_solve_is_closer_to_its_parents_than_averaging():
    models = [digits(1), digits(2)]
    wanted = [outputs(m) for m in models]

    def error(method: str) -> float:
        found = outputs(merge(models, method=method))
        return sum(float((y - w).square().mean() / w.var()) for y, w in zip(found, wanted, strict=True))

    assert error("solve") < 0.7 * min(error("average"), error("permute"))


def test_nothing_in_common_is_refused():
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    with pytest.raises(SpaceError, match="nothing can be merged"):
        fxzip.merge(models, [torch.randn(8, 4)], progress=False)


def test_strict_refuses_what_no_rule_covers():
    build = next(e for e in EXAMPLES if e.name == "unknown op")
    models, x = [build.make(), build.make()], torch.randn(16, 3, 6, 6)
    with pytest.raises(InputError, match=r"frozen: %\w+ \(aten._fft_r2c.default\) at toys.py:\d+"):
        merge(models, [x], strict=True)
    zipped = merge(models, [x])
    assert len(fxzip.report(zipped).frozen) == 1 and "not merged:" in str(fxzip.report(zipped))
