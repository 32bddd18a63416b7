"""Every rule, on the smallest module that exercises it: golden types, invariants, and a numerical proof.

A random element of the inferred group leaves the output unchanged, and shifting weight between two copies of
a unit does too. The last part breaks rules on purpose: if that went unnoticed, the proof would prove nothing.
"""

from __future__ import annotations

import operator
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Residual, randomise

import fxzip
from examples import EXAMPLES, UNREACHABLE, Example
from fxzip.infer import FeatureSpace, Parent, Segment, Spaces, analyse, counted_outputs
from fxzip.infer.engine import Inference, tensor_nodes
from fxzip.infer.families import read_spaces
from fxzip.infer.labels import Group, LabelledType
from fxzip.infer.rules import names
from fxzip.infer.rules.registry import _RULES, Rule
from fxzip.infer.sampling import sample
from fxzip.infer.show import typed
from fxzip.infer.spaces import MAKES
from fxzip.trace import Traced, lower, trace
from fxzip.verify import Verification, _distance, verify_spaces

GOLDEN = Path(__file__).parent / "golden"
BY_NAME = {e.name: e for e in EXAMPLES}


def analysed(example: Example) -> tuple[Traced, Spaces, tuple]:
    model, inputs = example.make(), example.inputs()
    traced = trace(model, inputs)
    return traced, analyse(traced.graph_module, inputs), inputs


once = cache(analysed)  # nothing below changes what it returns


def proof(example: Example) -> Verification:
    """Inference and proof, afresh: for rules that a test replaced."""
    return verify_spaces(*analysed(example))


every_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)


# ------------------------------------------------------------------------------------------- every example


@every_example
def test_sound(example):
    traced, spaces, inputs = once(example)
    found = verify_spaces(traced, spaces, inputs)
    assert found.ok, str(found)
    assert found.error < 1e-9 and found.spaces == len(spaces)


@every_example
def test_frozen_as_expected(example):
    spaces = once(example)[1]
    if not example.frozen:
        assert not spaces.frozen, [str(f) for f in spaces.frozen]
        return
    assert len(spaces.frozen) == 1
    frozen = spaces.frozen[0]
    assert example.frozen in frozen.op
    assert re.fullmatch(r"frozen: %\w+ \(aten\.[\w.]+\) at \w+\.py:\d+.*, .*", str(frozen)), str(frozen)


@every_example
def test_invariants(example):
    spaces = once(example)[1]
    shapes = {name: node.meta["shape"] for name, node in spaces.lowered.parameters.items()}
    nodes = {node.name: node for node in spaces.lowered.graph.nodes}
    seen: set[str] = set()
    taken: dict[tuple[str, int], list[np.ndarray]] = {}
    for space in spaces:
        assert {p.space for p in space.parents} <= seen, "parents come before children"
        seen.add(space.name)
        for parent in space.parents:
            assert len(parent.index) == space.size and parent.index.max() < spaces[parent.space].size
        for s in space.segments:
            assert len(s.positions) == space.size
            assert s.roles and s.roles <= {"produce", "consume", "vector", "tangled"}
            assert s.positions.max() < shapes[s.parameter][s.axis]
            taken.setdefault((s.parameter, s.axis), []).append(s.positions)
        for a in space.anchors:
            assert len(a.positions) == space.size
            assert a.positions.max() < np.prod([nodes[a.node].meta["shape"][x] for x in a.axes])
    for use, positions in taken.items():
        every = np.concatenate(positions)
        assert len(np.unique(every)) == len(every), f"{use}: an index lies in two spaces"


@every_example
def test_golden(example, update_golden):
    path = GOLDEN / (re.sub(r"\W+", "-", example.name) + ".txt")
    text = labelled(once(example)[1])
    if update_golden:
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is missing: run pytest {Path(__file__).name} --update-golden"
    assert text == path.read_text(), f"{path.name} differs: if that is right, --update-golden and read the diff"


def labelled(spaces: Spaces) -> str:
    """Spaces with the axes they lie on, then the lowered graph with its types."""
    lines = []
    for s in spaces:
        inside = f" of {s.structure} in {' '.join(p.space for p in s.parents)}" if s.parents else ""
        notes = "".join(f", {n}" for n in [*sorted(s.nonlinear), *["permutation only"] * s.orthogonal_only])
        lines.append(f"{s.name}: {s.size}{inside}{notes}")
        lines += [f"    {'+'.join(sorted(g.roles))} {g.parameter}[{g.axis}]{_span(g.positions)}" for g in s.segments]
        lines += [
            f"    {'seen' if a.weight == 1 else 'hardly seen'} at %{a.node}{list(a.axes)}{_span(a.positions[:, 0])}"
            for a in s.anchors
        ]
    lines += [re.sub(r" at \w+\.py:\d+", "", str(f)) for f in spaces.frozen]
    lines += [f"per model: {' '.join(sorted(spaces.opaque))}" if spaces.opaque else "", ""]
    for node in spaces.lowered.graph.nodes:
        if node.op == "placeholder" or (node.op == "call_function" and "const" not in node.meta):
            used = "" if node.op == "placeholder" else f" = {_op(node.target)}({_names(node.all_input_nodes)})"
            lines.append(f"%{node.name} : {typed(node, spaces)}{used}")
    return "\n".join(lines) + "\n"


def _op(target) -> str:
    return "getitem" if target is operator.getitem else str(target).removeprefix("aten.").removesuffix(".default")


def _names(nodes) -> str:
    return ", ".join(f"%{n.name}" for n in nodes)


def _span(positions: np.ndarray) -> str:
    """Nothing for 0..n-1, `@8` for a run from 8, else the positions."""
    n, first = len(positions), int(positions[0])
    if (positions == np.arange(first, first + n)).all():
        return f"@{first}" if first else ""
    return f"@{','.join(map(str, positions.tolist()))}"


def test_golden_files_are_of_examples():
    expected = {re.sub(r"\W+", "-", e.name) + ".txt" for e in EXAMPLES}
    assert len(expected) == len(EXAMPLES), "two examples share a golden file"
    assert {p.name for p in GOLDEN.glob("*.txt")} == expected


def test_every_rule_has_an_example():
    reached = {
        node.target._schema.name.split("::")[1]
        for example in EXAMPLES
        for node in once(example)[1].lowered.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    }
    assert sorted(names() - reached - set(UNREACHABLE)) == [], "rules without an example"
    assert sorted(set(UNREACHABLE) - names()) == [], "UNREACHABLE lists ops without a rule"
    assert sorted(set(UNREACHABLE) & reached) == [], "UNREACHABLE lists ops that examples reach"


# -------------------------------------------------------------------------------------- single statements


class Tables(nn.Module):
    """The same scale from a parameter, a buffer in the checkpoint, one outside, and a plain attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 3)
        value = torch.linspace(1, 2, 8)
        if kind == "parameter":
            self.scale = nn.Parameter(value)
        elif kind == "attribute":
            self.scale = value
        else:
            self.register_buffer("scale", value, persistent=kind == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x) * self.scale)


@pytest.mark.parametrize("kind, moves", [("parameter", 1), ("buffer", 1), ("table", 0), ("attribute", 0)])
def test_only_what_a_checkpoint_holds_may_be_permuted(kind, moves):
    model, x = Tables(kind), torch.randn(2, 6)
    spaces = fxzip.inspect(model, x)
    assert len(spaces) == moves
    assert fxzip.verify(model, x)
    twin = fxzip.scramble(model, x)
    torch.testing.assert_close(twin(x), model(x))
    assert torch.equal(twin.get_parameter("before.weight"), model.before.weight) == (moves == 0)


def test_uniform_tables_stay_free():
    model = Tables("table")
    model.scale.fill_(0.5)
    assert [s.size for s in fxzip.inspect(model, torch.randn(2, 6))] == [8]


def test_roles_are_not_claimed_where_no_unit_can_be_copied():
    found = proof(BY_NAME["features: repeat"])
    assert found.ok and np.isnan(found.roles) and np.isnan(found.roles_control)


# ------------------------------------------------------------------------------- rules broken on purpose


def _conv_without_groups(ctx, out, input, weight, bias, **_):
    w = ctx.project(weight.type, [0])
    for group in w:
        ctx.role(group.labels, "produce")
    return LabelledType(out[0].shape, tuple(g.renamed({0: 1}) for g in w))


def _cat_without_order(ctx, out, tensors, dim=0, **_):
    from fxzip.infer.rules.join import concatenate

    return concatenate(ctx, [t.type for t in reversed(tensors)], dim % len(out[0].shape), out[0].shape)


def _unmixed(ctx, out, self, **_):
    return self.type


def _first_operand(ctx, out, self, other, **_):
    return self.type


def _linear_with_swapped_roles(ctx, out, input, weight, bias=None, **_):
    for group in weight.type.groups:
        ctx.role(group.labels, "produce" if 1 in group.axes else "consume")
    lead = "abc"[: input.dim - 1]
    product = ctx.einsum([(input.type, f"{lead}y"), (weight.type, "zy")], f"{lead}z", out[0].shape)
    return product if bias is None else ctx.pointwise([product, bias.type], out[0].shape)


def _linear_that_only_consumes(ctx, out, input, weight, bias=None, **_):
    for group in weight.type.groups:
        ctx.role(group.labels, "consume")
    product = ctx.einsum([(input.type, "abcy"[-input.dim :]), (weight.type, "zy")], "abcz"[-input.dim :], out[0].shape)
    return product if bias is None else ctx.pointwise([product, bias.type], out[0].shape)


def _transposed_mm(ctx, out, self, mat2, **_):
    return ctx.contract("ik,jk->ij", [self, mat2], out[0].shape)


def _batch_norm_without_statistics(ctx, out, input, weight=None, bias=None, **_):
    names = range(input.dim)
    affine = [(v.type, [1]) for v in (weight, bias) if v is not None]
    result = ctx.einsum([(input.type, names), *affine], names, out[0].shape)
    return [result, *(LabelledType(o.shape) for o in out[1:])]


def _group_norm_without_groups(ctx, out, input, **_):
    return [input.type, *(LabelledType(o.shape) for o in out[1:])]


def _attention_without_heads(ctx, out, self, **_):
    """A reshape that forgets which axis was split: fresh labels for every axis."""
    shape = out[0].shape
    groups = tuple(Group((a,), ctx.relations.fresh([d])) for a, d in enumerate(shape) if d > 1 and a)
    return LabelledType(shape, groups)


def _reduction_without_labels(ctx, out, self, **_):
    return [LabelledType(o.shape) for o in out]


BROKEN = [
    ("convolution", _conv_without_groups, "image: convolution grouped"),
    ("convolution", _conv_without_groups, "inverted bottleneck"),
    ("cat", _cat_without_order, "features: cat constant"),
    ("cat", _cat_without_order, "u-net"),
    ("_softmax", _unmixed, "features: reshape"),
    ("flip", _unmixed, "features: flip"),
    ("cumsum", _unmixed, "tokens: cumsum features"),
    ("add", _first_operand, "residual with a zero-padded shortcut"),
    ("mul", _first_operand, "inverted bottleneck"),
    ("native_group_norm", _group_norm_without_groups, "image: native_group_norm"),
    ("native_batch_norm", _batch_norm_without_statistics, "residual with a zero-padded shortcut"),
    ("reshape", _attention_without_heads, "vision transformer"),
    ("min", _reduction_without_labels, "tokens: min"),
    ("linear", _linear_with_swapped_roles, "reused module"),
    ("linear", _linear_that_only_consumes, "tokens: native_layer_norm"),
]


@pytest.mark.parametrize("op, wrong, name", BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_rule_is_noticed(monkeypatch, op, wrong, name):
    monkeypatch.setitem(_RULES, op, Rule(wrong, True))
    found = proof(BY_NAME[name])
    assert not found.ok, f"unnoticed: {found}"
    with pytest.raises(fxzip.VerificationError, match="Nothing was merged"):
        found.check()


class Product(nn.Module):
    """A square matrix product, where exchanging its two axes fits all shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.w, self.after = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(torch.mm(F.relu(self.before(x)), self.w)))


def test_a_transposed_product_is_noticed(monkeypatch):
    model, x = randomise(Product()).eval(), torch.randn(2, 6)
    assert fxzip.verify(model, x).ok
    monkeypatch.setitem(_RULES, "mm", Rule(_transposed_mm, False))
    assert not fxzip.verify(model, x).ok
    assert not torch.allclose(fxzip.scramble(model, x)(x), model(x), atol=1e-3)


def test_a_wrong_role_breaks_recovery(monkeypatch):
    """Swapped roles survive permutations: only zipping, which applies M and U, goes wrong."""
    model, x = randomise(Residual()).eval(), torch.randn(32, 3, 6, 6)
    twin = fxzip.scramble(model, x)
    monkeypatch.setitem(_RULES, "linear", Rule(_linear_with_swapped_roles, False))
    with pytest.raises(fxzip.VerificationError):
        fxzip.merge([model, twin], [x], progress=False)


def test_units_that_are_silent_on_the_example_do_not_fail_the_proof():
    """A draw whose units say nothing is repeated on more samples: six units are sound whatever their weights."""
    for seed in range(24):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
        assert fxzip.verify(model, torch.randn(2, 4)).ok


# ------------------------------------------------------------------------- where no negative control can fire


class Quiet(nn.Module):
    """A straight path, and beside it features that change nothing: silenced, multiplied by zero, or averaged to it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last, self.past = kind, nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)
        self.register_buffer("nothing", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "silent":
            return self.past(x) + self.last(F.relu(h - 1000))
        if self.kind == "zero":
            return self.past(x) + self.nothing * self.last(F.relu(h))
        return self.past(x) + F.layer_norm(h, [8]).mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["silent", "zero", "mean"])
def test_features_that_change_nothing_are_proven_on_random_parameters(kind):
    model, x = randomise(Quiet(kind)).eval(), torch.randn(16, 6)
    found = fxzip.verify(model, x)
    assert found.ok and found.redrawn and "on random parameters" in str(found)
    zipped = fxzip.merge([model, fxzip.scramble(model, x)], [x], method="permute", progress=False)
    assert all(torch.allclose(y, model(x), atol=1e-4) for y in zipped(x))


def test_a_wrong_rule_is_noticed_behind_silent_units(monkeypatch):
    """The model's own units say nothing: random ones do."""

    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.past = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.past(x) + self.last(F.relu(self.first(x)).flip(-1) * self.scale)

    model, x = randomise(Flipped()).eval(), torch.randn(4, 6)
    with torch.no_grad():
        model.first.bias.fill_(-1000.0)
        model.first.weight.mul_(1e-3)
    assert fxzip.verify(model, x).ok
    monkeypatch.setitem(_RULES, "flip", Rule(_unmixed, True))
    found = fxzip.verify(model, x)
    assert not found.ok and found.redrawn and found.error > 1e-3


def test_an_output_that_is_constant_proves_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Softmax(-1)).eval()
    with pytest.raises(fxzip.VerificationError, match="the output hardly depends on the input"):
        fxzip.merge([model, model], [torch.randn(8, 4)], progress=False)


def test_every_space_moves_in_the_proof():
    """The identity is every second draw for two features."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(4)), nn.Linear(2, 2)).eval()
    spaces = fxzip.inspect(net, torch.randn(2, 2))
    for seed in range(20):
        drawn = sample(spaces, np.random.default_rng(seed), draws=32)
        assert len(drawn) == 4 and all(p.tolist() == [1, 0] for p in drawn.values())


def test_no_output_of_several_is_left_out_of_the_proof():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert all(np.isnan(_distance(given, [one, one])) for given in ([one, nan], [nan, one]))
    assert _distance([one, 2 * one, one[:0]], [one, one, one[:0]]) == 1


def test_indices_alone_are_no_proof_and_no_fault():
    class Labels(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    model = Labels(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(fxzip.VerificationError, match=r"(?s)^NOT PROVEN.*indices or truth values alone.*forward_fn="):
        fxzip.merge([model, model], [torch.randn(8, 4)], progress=False)
    assert fxzip.verify(model, torch.randn(8, 4), forward_fn=lambda m, x: nn.Sequential(*m)(x))


def test_spaces_that_are_no_group_are_named():
    """Two blocks of one and of two features cannot change places."""
    block = FeatureSpace("s0", 2)
    rows = Segment("fc.weight", 0, np.arange(3), MAKES)
    inside = FeatureSpace("s1", 3, (Parent("s0", np.array([0, 0, 1])),), (rows,))
    said = r"^s1 \(fc.weight\): it cannot follow .* blocks s0, .*; please report it, and merge a part of the model"
    with pytest.raises(fxzip.SpaceError, match=said):
        sample([block, inside], np.random.default_rng(0), draws=16)


def test_features_that_come_twice_along_an_axis_are_named():
    """As if inference had taken the first column of a weight for its second, too."""
    traced = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    inference = Inference(lower(traced.graph_module, (torch.randn(1, 4),)))
    solution = inference.run(tensor_nodes(counted_outputs(inference.lowered.outputs)))
    rows, columns = inference.axes["2.weight"]
    inference.axes["2.weight"] = rows, columns[[0, 0, *range(2, 8)]]
    said = r"^2.weight\[axis 1\]: the features of s0 do not .*; please report it, and merge a part of the model without"
    with pytest.raises(fxzip.SpaceError, match=said):
        read_spaces(inference, solution)
