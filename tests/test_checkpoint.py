"""Checkpoints are read without running them; files of a merge travel whole or not at all."""

import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from file_nets import IMAGES, Conv
from safetensors.torch import save_file
from torch import nn
from toys import randomise

import fxzip
from fxzip.errors import InputError
from fxzip.files import hub
from fxzip.files.checkpoint import load_weights, read_checkpoint

ROOT = Path(__file__).parent.parent
FOUR = ["README.md", "model.safetensors", "plan.json", "recipe.yaml"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_what_is_read(tmp_path):
    state = nn.Linear(2, 1).state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"model": state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "d.safetensors")
    for name in ("a.pt", "b.pt", "c.pth", "d.safetensors"):
        found = read_checkpoint(tmp_path / name)
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_what_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = nn.Linear(2, 1).state_dict()
    torch.save(Evil(), "evil.pt")
    torch.save(nn.Linear(2, 1), "module.pt")
    torch.save({"model": state, "net": state}, "two.pt")
    torch.save({"epoch": 3}, "none.pt")
    torch.save([1], "list.pt")
    Path("text.pt").write_text("weights")
    Path("text.safetensors").write_text("weights")
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 10_000)
    for name, said in (
        ("evil.pt", "save model.state_dict() or safetensors instead"),
        ("module.pt", "A whole pickled module runs code"),
        ("two.pt", "tensors under more than one of state_dict"),
        ("none.pt", "a dict with the keys epoch, and tensors under none of"),
        ("list.pt", "holds a list, not a state_dict"),
        ("text.pt", "cannot be read as weights only"),
        ("text.safetensors", "not a safetensors file"),
        ("a.zip", "entry 'a/data.pkl' is compressed"),
        ("gone.pt", "no such file"),
    ):
        with pytest.raises(InputError) as caught:
            read_checkpoint(name)
        assert said in str(caught.value), name
    assert not Path("ran").exists()


def test_prefixes_go_only_if_that_makes_the_keys_equal():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {k: v.clone() + 1 for k, v in net.state_dict().items()}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        load_weights(net, {prefix + k: v for k, v in state.items()})
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    named = nn.ModuleDict({"module": nn.Linear(2, 1)})  # here "module." is a name
    load_weights(named, {k: torch.ones_like(v) for k, v in named.state_dict().items()})
    assert named["module"].weight.tolist() == [[1.0, 1.0]]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    more = {f"module.{k}": v * 0 for k, v in state.items()}
    for wrong, said in (
        (more | {"module.2.bias": torch.ones(1)}, "lacks 0.weight, 0.bias, 1.weight, 1.bias; has module.0.weight"),
        ({**state, "1.bias": torch.ones(2)}, "it 1.bias is [2], in the model [1]"),
        ({f"net.{k}": v for k, v in state.items()}, "has net.0.weight"),
    ):
        with pytest.raises(InputError) as caught:
            load_weights(net, wrong, "weights 'a.pt'")
        assert "weights 'a.pt' does not fit the model: it" in str(caught.value) and said in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_weights_stay_in_their_file(tmp_path):
    """What safetensors maps is used as it is, which takes no memory of the process's own."""
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_file(made.state_dict(), tmp_path / "a.safetensors")
    state, net = read_checkpoint(tmp_path / "a.safetensors"), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net[0].weight.requires_grad_(False)
    load_weights(net, state)
    for name, tensor in net.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr() and torch.equal(tensor, made.state_dict()[name])
    assert not net[0].weight.requires_grad and net[0].bias.requires_grad
    with torch.no_grad():
        net[0].weight.add_(1)
    again = read_checkpoint(tmp_path / "a.safetensors")["0.weight"]
    assert torch.equal(again, made[0].weight), "the file is as it was"


def test_weights_are_copied_where_they_do_not_fit_as_they_are():
    state = {k: v.clone() for k, v in nn.Linear(4, 4, bias=False).state_dict().items()}
    wide = nn.Linear(4, 4, bias=False).double()
    load_weights(wide, state)
    assert wide.weight.dtype == torch.float64 and torch.equal(wide.weight.float(), state["weight"])
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    one = {"0.weight": state["weight"], "1.weight": state["weight"].clone()}
    load_weights(tied, one)
    assert tied[1].weight is tied[0].weight and tied[0].weight.data_ptr() not in {t.data_ptr() for t in one.values()}
    untied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    load_weights(untied, {"0.weight": state["weight"], "1.weight": state["weight"]})
    assert untied[0].weight.data_ptr() != untied[1].weight.data_ptr(), "two parameters, of which one may be trained"


# ------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def merged():
    torch.set_num_threads(1)
    return fxzip.merge([randomise(Conv(), s) for s in (1, 2)], [IMAGES], method="zip", progress=False)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_the_same_merge_gives_the_same_bytes(merged, tmp_path):
    again = fxzip.merge([randomise(Conv(), s) for s in (1, 2)], [IMAGES], method="zip", progress=False)
    for name, zipped in (("a", merged), ("b", again)):
        fxzip.save(zipped, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(contents(tmp_path / "a")) == 3
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in (tmp_path / "a").iterdir())


FULL = """
import resource, signal, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
import fxzip, torch
from test_checkpoint import merged, Conv, IMAGES, randomise
zipped = fxzip.merge([randomise(Conv(), s) for s in (3, 4)], [IMAGES], method="zip", progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    fxzip.save(zipped, sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_loses_nothing(merged, tmp_path):
    fxzip.save(merged, tmp_path)
    before = contents(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), str(ROOT)], capture_output=True, text=True)
    assert "Error" in done.stdout and "large" in done.stdout, done.stderr
    assert contents(tmp_path) == before


def test_a_file_that_cannot_be_replaced_loses_nothing(merged, tmp_path):
    fxzip.save(merged, tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    before = (tmp_path / "model.safetensors").read_bytes()
    other = fxzip.merge([randomise(Conv(), s) for s in (3, 4)], [IMAGES], method="zip", progress=False)
    with pytest.raises(OSError):
        fxzip.save(other, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "model.safetensors", "plan.json"]
    assert torch.equal(fxzip.load(tmp_path, Conv)(IMAGES)[0], merged(IMAGES)[0])


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "plan.json", ".hidden", ""])
def test_further_files_stay_in_the_folder(merged, tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of a further file"):
        fxzip.save(merged, tmp_path / "out", texts={name: "x"})
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_not_read(merged, tmp_path, monkeypatch):
    fxzip.save(merged, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    image = {"tensor": [[2, 3, 4000, 4000], "float32"]}
    for example in ({"tensor": [[2, 2, 10**6, 10**6], "float32"]}, {"list": [image] * 3}):  # one too large, or all
        plan["example"] = {"tuple": [example]}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(InputError, match="more than 268,435,456 elements"):
            fxzip.load(tmp_path, Conv)
    monkeypatch.setattr("fxzip.files.plan.LIMIT", 100)
    with pytest.raises(InputError, match="more than any plan"):
        fxzip.load(tmp_path, Conv)


# --------------------------------------------------------------------------------------------------- the hub


def test_push_and_pull_by_a_folder(merged, tmp_path):
    fxzip.save(merged, tmp_path / "out", texts={"recipe.yaml": "x", "report.html": "y"})
    (tmp_path / "out" / "secret.txt").write_text("mine")
    assert hub.push(tmp_path / "out", str(tmp_path / "repository")) == str(tmp_path / "repository")
    assert sorted(contents(tmp_path / "repository")) == [*FOUR, "report.html"]
    (tmp_path / "repository" / "evil.py").write_text("")
    hub.pull(str(tmp_path / "repository"), tmp_path / "back")
    assert sorted(contents(tmp_path / "back")) == FOUR  # a page of a stranger's would run in the browser
    assert torch.equal(fxzip.load(tmp_path / "back", Conv)(IMAGES)[0], merged(IMAGES)[0])


def test_nothing_of_an_earlier_merge_is_left(merged, tmp_path):
    old, out = tmp_path / "old", tmp_path / "out"
    fxzip.save(merged, out)
    for call in (lambda: hub.push(out, str(old)), lambda: hub.pull(str(out), old)):
        fxzip.save(merged, old, texts={"recipe.yaml": "x", "report.html": "y", "notes.txt": "mine"})
        (old / "model.pt2").write_text("z")
        call()
        assert sorted(contents(old)) == sorted([*contents(out), "notes.txt"])


def test_files_of_other_programs_are_not_replaced(merged, tmp_path):
    """Neither by save nor by push and pull, unless forced; the refusal names every one."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    fxzip.save(merged, out)
    mine.mkdir()
    for name in ("README.md", "model.safetensors"):
        (mine / name).write_text("mine")
    calls = (
        lambda force: fxzip.save(merged, mine, force=force),
        lambda force: hub.push(out, str(mine), force=force),
        lambda force: hub.pull(str(out), mine, force=force),
    )
    for call in calls:
        with pytest.raises(InputError, match="that fxzip did not write: .* force it .force=True") as said:
            call(False)
        assert all(f"a {name}" in str(said.value) for name in ("README.md", "model.safetensors"))
        assert contents(mine) == {"README.md": b"mine", "model.safetensors": b"mine"}
        call(True)
        call(False)  # now they are of a merge
        assert contents(mine) == contents(out)
        (mine / "plan.json").unlink()
        for name in ("README.md", "model.safetensors"):
            (mine / name).write_text("mine")


def test_what_is_not_whole_is_neither_sent_nor_fetched(merged, tmp_path):
    fxzip.save(merged, tmp_path / "out")
    fxzip.save(merged, tmp_path / "mine")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"0")
    before = contents(tmp_path / "mine")
    pull = lambda: hub.pull(str(tmp_path / "out"), tmp_path / "mine")  # noqa: E731
    for call in (lambda: hub.push(tmp_path / "out", "/there"), pull):
        with pytest.raises(InputError, match="damaged, or of another save"):
            call()
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a link"):
        hub.pull(str(tmp_path / "out"), tmp_path / "mine")
    assert contents(tmp_path / "mine") == before


def test_calls_of_the_hub_are_those_it_has(merged, tmp_path, monkeypatch):
    """The hub itself is out of reach here: a stand-in that checks every call against huggingface_hub's signatures."""
    real = pytest.importorskip("huggingface_hub", reason="not installed")
    store = tmp_path / "store"

    class Api:
        def __init__(self, **given):
            inspect.signature(real.HfApi).bind(**given)

        def create_repo(self, *args, **given):
            inspect.signature(real.HfApi.create_repo).bind(self, *args, **given)
            return f"https://huggingface.co/{args[0]}"

        def upload_folder(self, **given):
            inspect.signature(real.HfApi.upload_folder).bind(self, **given)
            assert set(given["allow_patterns"]) | set(given["delete_patterns"]) == {*FOUR, "model.pt2", "report.html"}
            store.mkdir()
            for name in given["allow_patterns"]:
                (store / name).write_bytes((Path(given["folder_path"]) / name).read_bytes())

    class Hub:
        HfApi = Api

        @staticmethod
        def snapshot_download(*args, **given):
            inspect.signature(real.snapshot_download).bind(*args, **given)
            for name, data in contents(store).items():
                (Path(given["local_dir"]) / name).write_bytes(data)

    monkeypatch.setattr(hub, "_hub", lambda: Hub)
    fxzip.save(merged, tmp_path / "out")
    assert hub.push(tmp_path / "out", "me/pair") == "https://huggingface.co/me/pair"
    assert contents(hub.pull("me/pair", tmp_path / "back")) == contents(tmp_path / "out")


def test_without_huggingface_hub(merged, tmp_path, monkeypatch):
    fxzip.save(merged, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r'pip install "fxzip\[hub\]"'):
        hub.push(tmp_path, "me/pair")
