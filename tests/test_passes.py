"""The stages as torch.fx passes: in a PassManager, with passes of a user's between them."""

from __future__ import annotations

import operator
import re
from dataclasses import replace

import pytest
import torch
from helpers import unchanged
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxzip
from fxzip import InputError, passes
from fxzip.infer.annotate import resized

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(torch.add(self.fc(x), 0).relu())


def models() -> dict[str, nn.Module]:
    return {"a": Net(0).eval(), "b": Net(1).eval()}


def batches() -> list[Tensor]:
    return [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def stages(method: str = "", **given) -> list:
    return [
        passes.Infer(), passes.Cut(), passes.Prove(), passes.Read(), passes.Measure(),
        passes.Match(method or fxzip.Zip(), **given), passes.Average(), passes.Build(), passes.Calibrate(),
        passes.Describe(),
    ]  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_pass_manager_gives_what_merge_gives():
    given = models()
    with unchanged(given):
        found = PassManager(stages())(passes.start(given, batches(), progress=False)).graph_module
    expected = fxzip.merge(given, batches(), method="zip", progress=False)
    assert same(found, expected)
    a, b = (replace(fxzip.report(z), seconds={}) for z in (found, expected))
    assert a == b and "Match" in a.settings
    assert passes.JOB not in found.meta


@pytest.mark.parametrize("method", ["solve", "permute+repair", "rebasin"])
def test_merge_says_which_stages_ran(method):
    report = fxzip.report(fxzip.merge(models(), batches(), method=method, progress=False))
    assert report.method == method
    assert ("Solve" in report.settings, "Respread" in report.settings, "Measure" in report.settings) == {
        "solve": (True, False, True), "permute+repair": (False, True, True), "rebasin": (False, False, False),
    }[method]  # fmt: skip
    assert bool(report.layers) == (method == "solve")


def test_users_passes_see_spaces_and_matchings():
    seen = {}

    def look(graph: fx.GraphModule) -> PassResult:
        notes = {n.name: n.meta["fxzip"] for n in graph.graph.nodes}
        space = notes["conv"]["spaces"][0]
        seen.update(type=notes["conv"]["type"], state=notes["head"]["state"], found=notes["norm"]["matchings"][space])
        seen["same"] = passes.job(graph).matchings[space] is seen["found"]
        return PassResult(graph, False)

    plan = stages()
    zipped = PassManager([*plan[:6], look, *plan[6:]])(passes.start(models(), batches(), progress=False)).graph_module
    assert seen["type"] == "[1, s0:8, 4, 4]" and seen["state"] == "per model" and seen["same"]
    assert seen["found"].merge.shape == (8, 16)
    assert not any("matchings" in n.meta.get("fxzip", {}) for n in zipped.graph.nodes)
    assert {n.meta["fxzip"]["state"] for n in zipped.graph.nodes if n.op == "call_module"} == {"merged", "per model"}


def test_nodes_of_a_merged_network_have_its_own_sizes():
    given = models()
    given["b"].head = nn.Linear(16, 5)
    zipped = fxzip.merge(given, batches(), method="zip", budget=1.5, progress=False)
    sizes = {}

    class Sizes(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            sizes[n.name] = tuple(result.shape) if isinstance(result, torch.Tensor) else ()
            return result

    with torch.no_grad():
        Sizes(zipped).run(batches()[0][:1])
    widths = {s.name: s.width for s in fxzip.report(zipped).spaces}
    assert any(s.width != s.width_in[0] for s in fxzip.report(zipped).spaces)
    typed = {n.name: n.meta["fxzip"]["type"] for n in zipped.graph.nodes if n.op not in ("get_attr", "output")}
    for name, text in typed.items():
        assert [int(d.rpartition(":")[2]) for d in text[1:-1].split(", ")] == list(sizes[name]), (name, text)
        assert all(int(n) == widths[s] for s, n in re.findall(r"(\w+):(\d+)", text)), (name, text)
    heads = {t: typed[f"head_{t}"] for t in "ab"}
    assert heads["a"] != heads["b"] and all(f": {heads[t]}" in fxzip.readable(zipped) for t in "ab")


def test_types_at_another_shape():
    widths = {"s0": (64, 96), "s1": (8, 4)}
    for text, shape, expected in (
        ("[1, s0:64+s1:8, 8]", (1, 100, 2), "[1, s0:96+s1:4, 2]"),
        ("[1, s0:64+s1:8, 8]", (1, 72, 2), "[1, s0:64+s1:8, 2]"),  # what a model keeps
        ("[1, (s0:64, 8), 3]", (1, 24, 4, 3), "[1, (s0:96, 4), 3]"),
        ("[]", (), "[]"), ("(several results)", (3,), "(several results)"),
    ):  # fmt: skip
        assert resized(text, shape, widths) == expected


def test_a_users_pass_may_replace_what_was_found():
    def identity(graph: fx.GraphModule) -> PassResult:
        now = passes.job(graph)
        averaged = {n: fxzip.Average()(now.moments[n], m.width) for n, m in now.matchings.items()}
        passes.give(graph, replace(now, matchings=averaged))
        return PassResult(graph, True)

    plan = stages("permute")
    zipped = PassManager([*plan[:6], identity, *plan[6:]])(passes.start(models(), batches(), progress=False))
    assert same(zipped.graph_module, fxzip.merge(models(), batches(), method="average", progress=False))


def no_adds(graph: fx.GraphModule) -> None:
    """Removes x + 0, in place."""
    for node in graph.graph.nodes:
        if node.target in (torch.add, operator.add) and node.args[1] == 0:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def test_a_rewrite_on_every_model():
    plan = [passes.EveryModel(no_adds), *stages()]
    zipped = PassManager(plan)(passes.start(models(), batches(), progress=False)).graph_module
    plain = fxzip.merge(models(), batches(), method="zip", progress=False)
    assert not [n for n in zipped.graph.nodes if n.name.startswith("add")]
    assert [n for n in plain.graph.nodes if n.name.startswith("add")]
    x = batches()[0]
    for name in "ab":
        torch.testing.assert_close(zipped(x)[name], plain(x)[name])


def run(*plan) -> None:
    graph = passes.start(models(), batches(), progress=False)
    for stage in plan:
        result = stage(graph)
        graph = graph if result is None else result.graph_module


@pytest.mark.parametrize(
    "plan, said",
    [
        ([passes.Cut()], r"passes.Cut needs what passes.Infer finds"),
        ([passes.Infer(), passes.Cut(), passes.Match("zip")], r"passes.Match needs what passes.Measure finds"),
        ([passes.Infer(), passes.Cut(), passes.Widths(1.5)], r"passes.Widths needs what passes.Measure finds, or"),
        ([passes.Infer(), passes.Cut(), passes.Widths({"s0": 2.5}, 0)], r"passes.Widths: 2 problems"),
        ([passes.Infer(), passes.Cut(), passes.Match("average"), passes.Widths({"s0": 9})], r"before passes.Match"),
        ([passes.Infer(), passes.Cut(), passes.Widths({"s9": 4})], r"budget as widths: s9 is no shared space"),
        ([passes.Infer(), passes.Measure()], r"passes.Measure needs what passes.Cut and passes.Read finds"),
        ([passes.Infer(), passes.Describe()], r"passes.Describe needs what passes.Build makes"),
        ([no_adds, passes.Infer()], r"not the same architecture"),
        ([passes.Infer(), no_adds, passes.Cut()], r"wrap it, passes.EveryModel\(your_pass\), and run it before"),
        ([*stages()[:8], passes.Infer()], r"passes.Infer runs before passes.Build"),
        ([*stages(), passes.Infer()], r"carries no Job"),
    ],
)  # fmt: skip
def test_a_plan_out_of_order_says_so(plan, said):
    with pytest.raises(InputError, match=said):
        run(*plan)


def test_the_lowered_graph_reads_a_line_per_operator():
    spaces = fxzip.inspect(Net(0).eval(), torch.randn(2, 2, 6, 6))
    lines = spaces.readable(lowered=True).splitlines()
    assert len(lines) == sum(n.op == "call_function" for n in spaces.lowered.graph.nodes)
    assert any("fc.weight [s1:16, s0:8]" in line and "[1, s1:16]" in line and "%fc" in line for line in lines), lines
