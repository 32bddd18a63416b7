"""What is saved comes back bit for bit in a new process; everything else is refused, with a reason."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from file_nets import CASES, IMAGES, TOKENS, Conv, Renamed, Tied, by_task
from helpers import unchanged
from safetensors.torch import load_file, save_file
from torch import nn

import fxzip
from fxzip.errors import InputError
from fxzip.files.example import example_from_json, example_to_json
from fxzip.files.plan import decode, encode
from fxzip.files.save import sha256_of
from fxzip.rewrite import Unmerge
from fxzip.trace import state_by_all_names

torch.set_num_threads(1)
HERE = Path(__file__).parent
LOAD_ALL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path[:0] = [sys.argv[2], str(Path(sys.argv[2]).parent)]
torch.set_num_threads(1)
import fxzip
from file_nets import CASES
for k, (name, case) in enumerate(CASES.items()):
    outputs = case.run(fxzip.load(Path(sys.argv[1]) / str(k), case.model_fn))
    save_file({str(i): t.clone().contiguous() for i, t in enumerate(outputs)}, f"{sys.argv[1]}/{k}.out")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """Every case merged and saved, then loaded and run in one new process."""
    root, merged = tmp_path_factory.mktemp("saved"), {}
    for k, (name, case) in enumerate(CASES.items()):
        merged[name] = case.merged()
        with unchanged(merged[name]):
            fxzip.save(merged[name], root / str(k))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_ALL, str(root), str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, merged


def folder_of(saved: Any, name: str) -> Path:
    return saved[0] / str(list(CASES).index(name))


@pytest.mark.parametrize("name", CASES)
def test_outputs_in_a_new_process_are_equal_bit_for_bit(saved, name):
    expected = CASES[name].run(saved[1][name])
    found = load_file(f"{folder_of(saved, name)}.out")
    assert len(found) == len(expected) >= 1
    for i, tensor in enumerate(expected):
        assert torch.equal(found[str(i)], tensor)
    assert any(bool((t != 0).any()) for t in expected)


@pytest.mark.parametrize("name", CASES)
def test_everything_of_the_module_comes_back(saved, name):
    old, again = saved[1][name], fxzip.load(folder_of(saved, name), CASES[name].model_fn)
    assert again.code == old.code and [n.name for n in again.graph.nodes] == [n.name for n in old.graph.nodes]
    assert list(again.state_dict()) == list(old.state_dict())
    a, b = state_by_all_names(old), state_by_all_names(again)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(b[key], tensor) and b[key].dtype == tensor.dtype
        assert b[key].stride() == tensor.stride() or not tensor.numel()
        assert type(b[key]) is type(tensor) and b[key].requires_grad == tensor.requires_grad
    assert ties(b) == ties(a)
    assert not again.training
    assert str(fxzip.report(again)) == str(untimed(old))
    assert again.meta["fxzip"].keys() == old.meta["fxzip"].keys()


def untimed(zipped: Any) -> fxzip.Report:
    """What a file keeps of a report: the same merge gives the same bytes."""
    return fxzip.report(zipped).with_(seconds={})


def ties(state: dict[str, torch.Tensor]) -> list[set[str]]:
    """Names that are one object."""
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), set()).add(name)
    return list(groups.values())


def test_the_cases_hold_what_they_promise(saved):
    """Unmerges by matrix and by index, ties, complex and permuted layouts: else the above shows little."""
    modules = {name: [m for m in z.modules() if isinstance(m, Unmerge)] for name, z in saved[1].items()}
    assert any(m.groups for m in modules["unmerge by matrix"])
    assert any(m.index is not None for m in modules["unmerge by gather"])
    assert modules["skip unmerged"] and not modules["tuple"]
    assert {"mid.weight", "mid2.weight"} in ties(state_by_all_names(saved[1]["tied"]))
    assert {"mid_task1.weight", "mid2_task1.weight"} in ties(state_by_all_names(saved[1]["tied, cut"]))
    assert any(t.is_complex() for t in saved[1]["complex"].parameters())
    assert not saved[1]["channels last"].conv2.weight.is_contiguous()
    assert not saved[1]["trained"].conv1.weight.requires_grad
    assert isinstance(saved[1]["averaged heads"](IMAGES), torch.Tensor)
    names = load_file(folder_of(saved, "tied") / "model.safetensors")
    assert ("mid.weight" in names) + ("mid2.weight" in names) == 1


@pytest.mark.parametrize("name", ["dict, heads differ", "explicit unmerge", "tied, cut", "three models"])
def test_extract_of_a_loaded_network(saved, name):
    old, again = saved[1][name], fxzip.load(folder_of(saved, name), CASES[name].model_fn)
    for task in old.meta["fxzip"]["tasks"]:
        a, b = fxzip.extract(old, task), fxzip.extract(again, task)
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())
        x = CASES[name].batch
        assert torch.equal(a(x), b(x))


def test_an_extraction_loads_into_the_users_class(saved):
    case = CASES["dict, heads differ"]
    again = fxzip.load(folder_of(saved, "dict, heads differ"), by_task)
    plain = Conv(4)
    plain.load_state_dict(fxzip.extract(again, "big-dogs").state_dict(), strict=True)
    assert torch.equal(plain.aux.weight, case.models()[1].get_parameter("aux.weight"))


def test_copies_pickles_and_loaded_networks_can_be_saved(saved, tmp_path):
    case = CASES["explicit unmerge"]
    old = saved[1]["explicit unmerge"]
    for k, twin in enumerate((copy.deepcopy(old), pickle.loads(pickle.dumps(old)), None)):
        twin = twin or fxzip.load(folder_of(saved, "explicit unmerge"), Conv)
        fxzip.save(twin, tmp_path / str(k))
        again = fxzip.load(tmp_path / str(k), Conv)
        assert all(torch.equal(a, b) for a, b in zip(case.run(again), case.run(old), strict=True))
    ours, theirs = (
        sha256_of(f / "plan.json") for f in (tmp_path / "2", folder_of(saved, "explicit unmerge"))
    )
    assert ours == theirs


def test_other_dtypes(saved, tmp_path):
    half = copy.deepcopy(saved[1]["explicit unmerge"]).to(torch.bfloat16)
    fxzip.save(half, tmp_path)
    again = fxzip.load(tmp_path, Conv)
    assert again.get_parameter("conv1.weight").dtype == torch.bfloat16
    x = IMAGES.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(again(x), half(x), strict=True))


# ---- files


def test_the_folder_holds_three_files_and_no_pickle(saved):
    folder = folder_of(saved, "dict, heads differ")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors", "plan.json"]
    plan = json.loads((folder / "plan.json").read_text())
    assert (
        plan["version"] == 1 and plan["tasks"] == ["cats", "big-dogs"] and plan["torch"] == torch.__version__
    )
    assert plan["example"] == {"tuple": [{"tensor": [[2, 2, 5, 5], "float32"]}]}
    card = (folder / "README.md").read_text()
    report = untimed(saved[1]["dict, heads differ"])
    for text in ("# 2 networks in one", "`zip`", "`big-dogs`", "fxzip.load(", str(report), "without labels"):
        assert text in card
    parameters = sum(p.numel() for p in saved[1]["dict, heads differ"].parameters())
    assert f"| merged | {parameters} |" in card or f"| merged | {parameters / 1e3:.2f}k |" in card
    assert f"{report.shared:.1%} of the parameters are shared" in card


def test_a_failed_save_leaves_the_old_files(saved, tmp_path, monkeypatch):
    fxzip.save(saved[1]["tuple"], tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        fxzip.save(saved[1]["tied"], tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_overwriting_replaces_all_files(saved, tmp_path):
    fxzip.save(saved[1]["tied"], tmp_path)
    fxzip.save(saved[1]["tuple"], tmp_path)
    again = fxzip.load(tmp_path, Conv)
    assert torch.equal(again(IMAGES)[0], saved[1]["tuple"](IMAGES)[0])
    assert len(list(tmp_path.iterdir())) == 3


def test_an_exported_program_does_not_outlive_its_network(saved, tmp_path, monkeypatch):
    program = tmp_path / "model.pt2"
    program.write_text("a stranger's")
    fxzip.save(saved[1]["tuple"], tmp_path)
    assert program.read_text() == "a stranger's"  # the folder was none of ours
    before, replace = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, os.replace

    def full(path: Path, to: Path) -> None:
        if (path.suffix, to.name) == (".tmp", "plan.json"):  # the last; the program is gone by then
            raise OSError("disk full")
        replace(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            fxzip.save(saved[1]["tied"], tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    fxzip.save(saved[1]["tied"], tmp_path)
    assert not program.exists() and len(list(tmp_path.iterdir())) == 3


def test_model_fn_in_every_form(saved):
    folder = folder_of(saved, "dict, heads differ")
    want = saved[1]["dict, heads differ"](IMAGES)
    models = [Conv(3), Conv(4)]
    forms = [
        by_task,
        lambda task="cats": by_task(task),
        {"cats": Conv, "big-dogs": Conv(4)},
        models,
        models[:],
    ]
    for form in forms:
        with unchanged(models):
            found = fxzip.load(folder, form)(IMAGES)
        assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)


def test_optional_arguments_leave_one_default_call(saved):
    """Conv(classes=3, ...) is called without arguments, though it would take one."""
    again = fxzip.load(folder_of(saved, "tuple"), Conv)
    assert torch.equal(again(IMAGES)[1], saved[1]["tuple"](IMAGES)[1])


# ---- refusals of load


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


# ---- refusals of save


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


# ---- JSON


def test_examples_keep_structure_and_leave_the_rng_alone():
    value = ([torch.ones(2), {"k": torch.ones(1, 3, dtype=torch.int64)}], (True, None, 1.5, "s"))
    data = json.loads(json.dumps(example_to_json(value)))
    state = torch.get_rng_state()
    again = example_from_json(data, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert again[1] == value[1] and type(again[0]) is list
    assert again[0][0].shape == (2,) and torch.equal(again[0][1]["k"], torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="Path cannot be written to JSON"):
        example_to_json((Path(),))


def test_reports_survive_json(saved):
    report = fxzip.report(saved[1]["explicit unmerge"])
    assert decode(fxzip.Report, json.loads(json.dumps(encode(report))), "") == report
    odd = report.with_(spaces=(*report.spaces[:1],), shared=float("nan"))
    assert json.dumps(encode(odd), allow_nan=False).count("null") >= 1
    with pytest.raises(ValueError, match="shared must be a number, not null"):
        decode(fxzip.Report, encode(odd), "")
