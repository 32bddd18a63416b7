"""Every rule, on the smallest module that exercises it: golden types, invariants, and a numerical proof.

A random element of the inferred group leaves the output unchanged, and shifting weight between two copies of
a unit does too. test_broken_rules.py breaks rules on purpose: if that went unnoticed, the proof would prove nothing.
"""

from __future__ import annotations

import operator
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxzip
from examples import EXAMPLES, UNREACHABLE, Example
from fxzip.infer import Spaces, analyse
from fxzip.infer.rules import names
from fxzip.infer.show import typed
from fxzip.trace import Traced, trace
from fxzip.verify import Verification, verify_spaces

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
            assert s.positions.max() < shapes[s.parameter][s.axis] * s.blocks
            assert s.blocks == 1 or (s.axis == 1 and shapes[s.parameter][0] % s.blocks == 0)
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
        for g in s.segments:
            blocks = f" in {g.blocks} blocks" if g.blocks > 1 else ""
            lines.append(f"    {'+'.join(sorted(g.roles))} {g.parameter}[{g.axis}]{_span(g.positions)}{blocks}")
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
