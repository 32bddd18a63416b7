"""What is saved comes back bit for bit in a new process."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from file_nets import CASES, IMAGES, Conv, by_task, folder_of
from helpers import unchanged
from safetensors.torch import load_file

import fxzip
from fxzip.errors import InputError
from fxzip.files.example import example_from_json, example_to_json
from fxzip.files.plan import decode, encode
from fxzip.files.save import sha256_of
from fxzip.rewrite import Unmerge
from fxzip.trace import state_by_all_names

torch.set_num_threads(1)


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
