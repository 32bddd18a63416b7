"""Laws of the whole pipeline, on small nets: what goes in stays as it was, what comes out is what was promised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy_attention
import toys
from helpers import unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy_attention import VisionTransformer
from toys import randomise

import fxzip
from examples import EXAMPLES, Example
from fxzip import METHODS, InputError, Permute, Select, SpaceError, Zip
from fxzip.rewrite import recompute_statistics
from fxzip.trace import trace

torch.set_num_threads(1)
DATA = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
# Their first layer's features are read by position, too (or the blocks they vote for); spaces that remain belong to
# the heads alone, or lie inside such a block.
PINNED_BEFORE = {
    "features: addr", "features: argmax of votes", "features: max of votes", "tokens: index_add by features",
    "volume: grid_sampler_3d",
}  # fmt: skip
STRUCTURES = [e for e in EXAMPLES if e.name in {t[0] for t in [*toys.TOYS, *toy_attention.TOYS]}]


class Digits(nn.Module):
    """A stem and two residual blocks with batch norm, for 8 x 8 digits."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block1, self.block2 = self._block(width), self._block(width)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(width, classes)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.block1(x))
        x = F.relu(x + self.block2(x))
        return self.fc(self.drop(x.mean((2, 3))))


def digits(seed: int = 0, classes: int = 10) -> Digits:
    """A random net whose batch-norm statistics are those of DATA, as a merge recomputes them."""
    model = Digits(classes)
    randomise(model, seed).eval()
    recompute_statistics(model, [DATA], lambda batch: (batch,))
    return model


def twins(classes: int = 10) -> tuple[Digits, nn.Module]:
    """A net, and another with the same function on other coordinates."""
    model = digits(classes=classes)
    return model, fxzip.scramble(model, DATA[:2], seed=3)


def merge(models: Any, loader: Any = (DATA,), method: Any = "permute", **options: Any) -> Any:
    return fxzip.merge(models, loader, method=method, **{"progress": False, "verify": False, **options})


def outputs(module: nn.Module, *inputs: Any) -> Any:
    with torch.no_grad():
        return module(*(inputs or (DATA,)))


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def scrambled(example: Example) -> tuple[nn.Module, nn.Module, list[tuple]]:
    """A model, its scrambled copy, and two batches of 24 whose statistics its batch norms have."""
    model = example.make()
    torch.manual_seed(3)
    columns = [torch.cat(c) for c in zip(*(example.data() for _ in range(24)), strict=True)]
    batches = [tuple(c[:24] for c in columns), tuple(c[24:] for c in columns)]
    recompute_statistics(model, batches, lambda batch: batch)
    return model, fxzip.scramble(model, batches[0]), batches


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


def test_a_merged_strangers_private_part_is_its_own():
    """With everything but the stem private, each output stays near its parent's; a swap would show."""
    models = [digits(1), digits(2)]
    zipped = merge(models, method=Zip(), until="block1", budget=None)
    a, b = outputs(zipped)
    own = [outputs(m) for m in models]
    assert far(a, own[0]) < far(a, own[1]) and far(b, own[1]) < far(b, own[0])


# ----------------------------------------------------------------------------------------- inputs untouched


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


# -------------------------------------------------------------------------------------------------- outputs


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


def test_double_precision():
    model, data = digits().double(), DATA.double()
    recompute_statistics(model, [data], lambda batch: (batch,))
    twin = fxzip.scramble(model, data[:2])
    for method in ("permute", "zip", "solve"):
        zipped = merge([model, twin], [data], method)
        assert {p.dtype for p in zipped.parameters()} == {torch.float64}
        tolerance = 1e-4 if method == "solve" else 1e-7
        assert all(far(y, outputs(model, data)) < tolerance for y in outputs(zipped, data))


# -------------------------------------------------------------------------------------------------- loaders


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


# -------------------------------------------------------------------------------------------------- methods


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


# --------------------------------------------------------------------------------------------- transformers


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


@pytest.mark.parametrize("name", ["flip", "roll", "stack", "_trilinear"])
def test_select_keeps_equal_models_even_on_data_of_low_rank(name):
    """Fewer samples than features: least squares has many answers, and only one survives what follows."""
    example = next(e for e in EXAMPLES if e.name == f"features: {name}")
    model, data = example.build(), example.data()
    zipped = fxzip.merge([model, model], [data], method="select", progress=False)
    wanted = model(*data) if isinstance(data, tuple) else model(data)
    for output in zipped(*data) if isinstance(data, tuple) else zipped(data):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


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
