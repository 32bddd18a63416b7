"""Files that cannot be loaded and networks that cannot be saved are refused, with a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from file_nets import TOKENS, Conv, Renamed, Tied, by_task, folder_of
from helpers import unchanged
from safetensors.torch import load_file, save_file
from torch import nn

import fxzip
from fxzip.errors import InputError
from fxzip.files.save import sha256_of

torch.set_num_threads(1)


# ---- load


def refused(folder: Path, model_fn: Any = Conv) -> str:
    with unchanged([]), pytest.raises(InputError) as caught:
        fxzip.load(folder, model_fn)
    return str(caught.value)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A saved network that may be spoilt."""
    fxzip.save(saved[1]["explicit unmerge"], tmp_path / "net")
    return tmp_path / "net"


def edit(folder: Path, change: Any) -> None:
    """Change plan.json; the sha256 of the tensors follows."""
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    plan["sha256"] = sha256_of(folder / "model.safetensors")
    (folder / "plan.json").write_text(json.dumps(plan))


def test_missing_files(folder):
    assert "no file" in refused(folder / "elsewhere") and "fxzip.save wrote" in refused(folder / "elsewhere")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors', which belongs to plan.json" in refused(folder)


def test_damaged_or_exchanged_tensors(folder, saved):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "is not the file that plan.json was written with: its sha256 is" in refused(folder)
    path.write_bytes((folder_of(saved, "tuple") / "model.safetensors").read_bytes())
    assert "damaged, or of another save" in refused(folder)
    path.write_bytes(b"not tensors at all")
    edit(folder, lambda plan: None)
    assert "is not a safetensors file" in refused(folder)


def test_header_and_plan_must_agree(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for change, text in (
        ({"conv1.weight": tensors["conv1.weight"][:4].clone()},
         "conv1.weight is float32[4, 2, 3, 3] in model.safetensors and float32[8, 2, 3, 3] in plan.json"),
        ({"conv1.weight": tensors["conv1.weight"].double()}, "is float64[8, 2, 3, 3] in model.safetensors"),
        ({"extra": torch.ones(1)}, "tensor extra is in model.safetensors and not in plan.json"),
        ({"conv1.bias": None}, "tensor conv1.bias is in plan.json and not in model.safetensors"),
    ):  # fmt: skip
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, path)
        edit(folder, lambda plan: None)
        assert text in refused(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "was not written by fxzip.save"),
        ('{"version": 1}', "was not written by fxzip.save"),
        ('{"format": "fxzip", "version": 2, "fxzip": "9.0"}', "format version 2 (fxzip 9.0), newer than 1"),
        ('{"format": "fxzip", "version": 1}', "malformed: the plan lacks fxzip, torch, tasks"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_what_is_no_plan(folder, content, text):
    (folder / "plan.json").write_text(content)
    assert text in refused(folder)


def facts(name: str, **changes: Any) -> Any:
    """Change of what plan.json says about one tensor."""
    return lambda plan: plan["tensors"][name].update(changes)


def move_mean(plan: dict) -> None:
    """A shared node after a private one."""
    plan["cut"]["private"].remove("mean")
    plan["cut"]["shared"].append("mean")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.update(tasks="a"), 'malformed: tasks must be a list, not "a"'),
        (lambda p: p.update(as_dict=1), "malformed: as_dict must be true or false, not 1"),
        (lambda p: p["cut"].pop("shared"), "malformed: cut lacks shared"),
        (facts("conv1.bias", shape=[True]), "tensors.conv1.bias.shape[0] must be a number"),
        (facts("conv1.bias", dtype="float31"), "conv1.bias has dtype 'float31'"),
        (facts("conv1.weight", strides=[0, 0, 0, 0]), "strides [0, 0, 0, 0] of conv1.weight"),
        (facts("conv1.weight", strides=[1 << 40, 9, 3, 1]), "they leave holes"),
        (lambda p: p["tensors"].pop("conv1.bias"), "malformed: tensors: conv1.bias is missing"),
        (lambda p: p.update(tasks=[], originals=[], targets={}, untouched={}), "malformed: tasks: there is none"),
        (lambda p: p.update(heads="average", shares=[1.0]), "malformed: shares: 1 for 2 tasks"),
        (lambda p: p["originals"].pop(), "malformed: originals: 1 models for 2 tasks"),
        (lambda p: p["untouched"].update(zebra={}), "malformed: 'zebra' is none of its tasks"),
        (lambda p: p.update(example={"tuple": []}), "malformed: example has not one entry per input ['x']"),
        (lambda p: p.update(example={"tuple": [{"tensor": ["x", "float32"]}]}), "malformed: example holds"),
        (lambda p: p.update(example={"tuple": [{"code": "exit()"}]}), "example holds {'code': 'exit()'}"),
        (lambda p: p["report"]["result"].pop("name"), "malformed: report.result lacks name"),
        (lambda p: p["signature"]["nodes"][0].pop(), "signature.nodes[0] has 3 items instead of 4"),
        (lambda p: p["unmerges"].popitem(), "targets, nodes or unmerges are not those of the graph"),
        (lambda p: p["nodes"].update(fc_task0="aux"), "targets, nodes or unmerges are not"),
        (move_mean, "plan.json and model_fn give no network that runs"),
        (lambda p: p.update(heads="median"), "heads='median' is unknown"),
    ],
)  # fmt: skip
def test_malformed_plans(folder, change, text):
    edit(folder, change)
    assert text in refused(folder)


class NoBuffer(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1, bias=False)


class Padded(Conv):
    """The same nodes and parameters, another constant in the graph."""

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x * self.scale)))
        x = self.act(self.norm2(self.conv2(x)) + x).mean((3, 2)) + torch.ones(1)
        return self.fc(x)


def meta_conv() -> nn.Module:
    with torch.device("meta"):
        return Conv()


@pytest.mark.parametrize(
    ("model_fn", "text"),
    [
        (lambda: Conv(act=nn.Tanh), "act is torch.nn.modules.activation.ReLU as saved and"
         " torch.nn.modules.activation.Tanh from model_fn"),
        (lambda: Conv(eps=1e-3), "norm1.eps is 1e-05 as saved and 0.001 from model_fn"),
        (lambda: Conv(width=6), "conv1.weight of task0 was float32[8, 2, 3, 3] when merged and is"
         " float32[6, 2, 3, 3] in model_fn's"),
        (lambda: Conv().half(), "when merged and is float16[8, 2, 3, 3] in model_fn's"),
        (Renamed, "its graph has a node %tanh, which that of task0 had not"),
        (NoBuffer, "it has no conv1.bias, which task0 had"),
        (Padded, "node %mean_task0 is call_method %mean_task0 mean ((%act_1_task0, (2, 3)), {}) as saved and"
         " call_method %mean_task0 mean ((%act_1_task0, (3, 2)), {}) from model_fn"),
        (Tied, "cannot be traced as the saved one was"),
        (Conv(), "model_fn must be a function that builds the model, or a dict or list with one entry per"
         " task, not Conv"),
        (3, "model_fn must be a function that builds the model, not int"),
        ({"task0": Conv}, "model_fn has no entry for 'task1'; tasks: task0, task1"),
        ({"task0": Conv, "task1": 3}, "model_fn gives a int for 'task1'"),
        ([Conv()], "1 models given for 2 tasks: task0, task1"),
        ([Conv(), Conv(act=nn.Tanh)], "model_fn: task0 and task1 are not the same architecture: act is ReLU"),
        (lambda: 3, "model_fn returns a int, not an nn.Module"),
        (by_task, "model_fn('task0') fails: KeyError"),
        (lambda: Conv(**{"depth": 3}),  # pyright: ignore
         "model_fn() fails: TypeError"),
        (meta_conv, "conv1.weight of model_fn's module for 'task0' is on the meta device"),
    ],
)  # fmt: skip
def test_wrong_model_fn(saved, model_fn, text):
    assert text in refused(folder_of(saved, "explicit unmerge"), model_fn)


def test_one_class_count_for_heads_that_differ(saved):
    text = refused(folder_of(saved, "dict, heads differ"), Conv)
    assert "fc.weight of big-dogs was float32[4, 8] when merged and is float32[3, 8]" in text
    assert "model_fn needs the task's name as its argument" in text


def test_a_model_that_ties_what_the_saved_one_does_not(saved, tmp_path):
    untied = copy.deepcopy(saved[1]["tied"])
    untied.mid2.weight = nn.Parameter(untied.mid2.weight * 2)
    fxzip.save(untied, tmp_path)
    again = fxzip.load(tmp_path, Tied)
    for name in ("mid.weight", "mid2.weight"):
        assert torch.equal(again.get_parameter(name), untied.get_parameter(name))
    assert all(torch.equal(a, b) for a, b in zip(again(TOKENS), untied(TOKENS), strict=True))


# ---- save


def test_what_cannot_be_saved(saved, tmp_path):
    def not_saved(network: Any, where: Any = tmp_path / "x") -> str:
        with pytest.raises(InputError) as caught:
            fxzip.save(network, where)
        return str(caught.value)

    assert "expected the result of fxzip.merge, got a Conv" in not_saved(Conv())
    twin = copy.deepcopy(saved[1]["tuple"])
    twin.fc_task0 = nn.Linear(8, 20)
    assert "changed after the merge: fc_task0.weight is [3, 8] as merged and [20, 8] now" in not_saved(twin)
    twin = copy.deepcopy(saved[1]["tuple"])
    twin.act = nn.GELU()
    assert "act is torch.nn.modules.activation.ReLU as merged and" in not_saved(twin)
    twin = copy.deepcopy(saved[1]["tuple"])
    output = next(n for n in twin.graph.nodes if n.op == "output")
    with twin.graph.inserting_before(output):
        twin.graph.call_function(torch.relu, (output.args[0][0],))
    assert "relu is called 0 times as merged and 1 times now" in not_saved(twin)
    assert "conv1.weight is a meta tensor" in not_saved(copy.deepcopy(saved[1]["tuple"]).to("meta"))
    twin = copy.deepcopy(saved[1]["tuple"])
    del twin.meta["fxzip"]["signature"]
    assert "merged by an older fxzip" in not_saved(twin)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    assert "file' cannot be a folder" in not_saved(saved[1]["tuple"], tmp_path / "file")
