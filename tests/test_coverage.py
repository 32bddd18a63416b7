"""The coverage benchmark on its toys: what it measures, and what it writes."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import coverage
import coverage_model
import coverage_table as table
import zoo
import zoo_others

torch.set_num_threads(1)


def test_a_toy_is_recovered():
    row = coverage_model.measure("toys", "nn.TransformerEncoder")
    assert row["sound"] and row["recovered"] and row["scrambled"] and not row["frozen"], row
    assert row["exports"] and row["compiles"], row
    assert row["rung"] == "symbolic" and row["free"] > 0.98 and row["proof_error"] < 1e-9


def test_large_graphs_are_not_compiled():
    row = coverage_model.measure("toys", "gru", nodes=0)
    assert row["recovered"] and "compiles" not in row


def test_a_relative_for_other_classes_keeps_its_own_head():
    three, five = (torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, k)) for k in (3, 5))
    row: dict = {}
    coverage_model.related(row, three, five, [torch.randn(8, 6), torch.randn(8, 6)])
    assert row["other_classes"] and row["other_classes_error"] < 1e-5
    assert torch.equal(three[0].weight, five[0].weight)


def test_processor_time_ends(monkeypatch):
    def endless():
        while True:
            pass

    monkeypatch.setitem(zoo.SUITES, "endless", lambda: {"a": endless})
    row = coverage._process("endless", "a", Namespace(limit=1, memory=8, nodes=0, analysis=False))
    assert row["error"] == "more than 1 s of processor time"


def test_urgent_is_what_teaches_most():
    good = {"sound": True, "recovered": True, "code": "now"}
    rows = [None, {"error": "x"}, {"sound": True}, {**good, "code": "then"}, good]
    assert [coverage.urgency(row, "now") for row in rows] == [0, 1, 2, 3, coverage.DONE]


def test_an_analysis_does_not_replace_a_merge(tmp_path):
    row = {"suite": "toys", "name": "a", "code": "1"}
    lines = [{**row, "recovered": True}, row, {**row, "name": "b"}, {**row, "name": "b", "code": "2"}]
    (tmp_path / "c").write_text("\n".join(map(json.dumps, lines)))
    assert [r.get("recovered") or r["code"] for r in table.latest(tmp_path / "c").values()] == [True, "2"]


def test_documents_count_and_say_why(tmp_path):
    good = {"suite": "toys", "name": "a", "rung": "exported", "sound": True, "recovered": True, "spaces": 2}
    good |= {"block_spaces": 1, "free": 0.5, "frozen": ["aten.x: no rule for aten.x"], "proof_error": 1e-16}
    bad = {"suite": "toys", "name": "b", "rung": "symbolic", "sound": False}
    refused = {"suite": "toys", "name": "c", "error": "TraceError: one\nmore"}
    table.write({f"toys:{r['name']}": r for r in (good, bad, refused)}, tmp_path)
    text = (tmp_path / "COVERAGE.md").read_text()
    assert "| toys | 4 | 3 | 2 | 1 | 1 | 1 | 1 | 0 | 0 | 0 |" in text
    assert "| a | recovered | exported | - | 2 + 1 | 50.0 % | 1.0e-16 |" in text and "no rule for aten.x |" in text
    assert "| b | UNSOUND | symbolic |" in text
    assert "| c | refused |" in text and "TraceError: one |" in text and "more" not in text.split("| c |")[1]
    assert [r["name"] for r in json.loads((tmp_path / "coverage.json").read_text())] == ["a", "b", "c"]


def test_every_suite_has_models():
    suites = {*coverage.LIBRARIES, "torchvision", "timm", "transformers"}
    assert len(zoo.ARCHITECTURES) == 30 and set(zoo_others.SUITES) == suites
    assert suites == set(table.SUITES) and len(zoo.timm()) == 98
