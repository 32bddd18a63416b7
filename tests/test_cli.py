"""The command line as a user types it: exit codes, messages, what is written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fxzip
from fxzip import cli, demo
from fxzip.cli.models import architecture, build
from fxzip.errors import InputError, TraceError

ROOT = Path(__file__).parent.parent
COMMANDS = ("merge", "demo", "inspect", "verify", "coverage", "plot", "eval", "report", "push", "pull")
FLAGS = ("--model", "net.py:net", "--weights", "a.pt", "b.pt", "--trust-code", "--method", "zip")


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_the_commands_in_groups_and_exit_codes(capsys):
    code, text, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"│ {word} " in text for word in COMMANDS) and "Exit codes: 0 done" in text
    assert all(f" {group} ─" in text for group in ("Merge", "Look", "Share"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, text, _ = run(capsys, command, "-h")
    assert code == 0 and " Messages ─" in text and "--quiet" in text


@pytest.mark.parametrize(
    "argv",
    [
        [], ["mrege"], ["merge"], ["merge", "recipe.yaml"], ["merge", "--weights", "a.pt"], ["inspect"],
        ["demo", "--width", "x"], ["demo", "-q", "-v"], ["merge", "recipe.yaml", "out", "--method", "zip"],
        ["merge", *FLAGS, "--name", "a", "--out", "x"], ["plot", "recipe.yaml", "-o", "x.txt"],
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(capsys, argv):
    code, _, err = run(capsys, *argv)
    assert code == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "torchvision:resnet5"], "did you mean resnet50"),
        (["verify", "torchvision:fasterrcnn_resnet50_fpn"], "no classification, segmentation or video model"),
        (["inspect", "resnet50"], "write torchvision:NAME"),
        (["inspect", "keras:resnet50"], "write torchvision:NAME"),
        (["inspect", "net.py:net"], "read it, then pass --trust-code"),
        (["inspect", "net.py:ne", "--trust-code"], "net.py has no function 'ne' did you mean net?"),
        (["inspect", "net.py:net", "--trust-code"], "fxzip cannot know what it takes; pass --data"),
        (["inspect", "timm:resnet10t?checkpoint_path=a.pt"], "checkpoint_path may run code that is in files: give the"),
        (["inspect", "hf:net?trust_remote_code=true"], "trust_remote_code may run code that is in files: write path"),
        (["inspect", "gone.py:net"], "no such file: 'gone.py'"),
        (["inspect", "torchvision:resnet18?depth=3"], "cannot be built: TypeError"),
        (["inspect", "torchvision:resnet18?depth"], "write options as name=value"),
        (["verify", "net.py:net", "--trust-code", "--weights", "c.pt", "--data", "x.npz"], "'c.pt': no such file"),
        (["verify", "net.py:net", "--trust-code", "--data", "y.npz"], "data 'y.npz': no such file"),
        (["report", "nowhere"], "is this a folder that fxzip.save wrote?"),
        (["eval", "nowhere", "--data", "x.npz"], "is this a folder that fxzip.save wrote?"),
        (["coverage", "--only", "nothing*"], "no such model in the table"),
        (["demo", "--width", "0"], "width 0"),
        (["push", "nowhere", "./there"], "is this a folder that fxzip.save wrote?"),
    ],
)
def test_bad_calls_exit_with_2_and_say_why(capsys, place, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_verbose_shows_the_traceback(capsys):
    code, _, err = run(capsys, "inspect", "-v", "torchvision:resnet5")
    assert code == 2 and "Traceback" in err and "did you mean" in err


def test_work_that_fails_exits_with_1(capsys, monkeypatch):
    def fail(*_):
        raise TraceError("forward branches on data")

    monkeypatch.setattr(fxzip, "inspect", fail, raising=False)
    code, out, err = run(capsys, "inspect", "torchvision:squeezenet1_1", "--image-size", "64")
    assert (code, out, err) == (1, "", "fxzip: forward branches on data\n")


# -------------------------------------------------------------------------------------------------- commands


def test_merge_by_options_writes_a_folder_that_merges_again(capsys, place):
    code, out, err = run(capsys, "merge", *FLAGS, "--data", "x.npz", "--out", "out")
    assert code == 0 and not err and "2 models merged by zip (a, b)" in out
    assert "  matched features hardly correlate" in out  # the warnings, as notices
    assert "wrote out: README.md, model.safetensors, plan.json, recipe.yaml" in out
    assert run(capsys, "merge", "out/recipe.yaml", "out2", "--trust-code", "-q") == (0, "", "")
    assert run(capsys, "merge", "out", "out", "--trust-code", "-q") == (0, "", "")
    for file in sorted((place / "out").iterdir()):
        assert file.read_bytes() == (place / "out2" / file.name).read_bytes(), file.name
    assert str(place) not in (place / "out" / "recipe.yaml").read_text()


def test_a_recipe_of_a_data_set_by_name_merges_again_from_where_it_went(capsys, place):
    """The data lie in the recipe's own folder, which is not that of the result."""
    (place / "MNIST" / "raw").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("images-idx3", (30, 28, 28)), ("labels-idx1", (30,))):
        sizes = b"".join(n.to_bytes(4, "big") for n in shape)
        values = torch.randint(10, shape, generator=generator, dtype=torch.uint8)
        for part in ("train", "t10k"):
            path = place / "MNIST" / "raw" / f"{part}-{name}-ubyte"
            path.write_bytes(bytes([0, 0, 8, len(shape)]) + sizes + values.numpy().tobytes())
    (place / "gray.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    made = architecture("gray.py:net", place, trust_code=True)
    for seed, name in enumerate(("g.pt", "h.pt")):
        torch.save(build(made, seed=seed).state_dict(), place / name)
    (place / "gray.yaml").write_text(
        "model: gray.py:net\nmodels: [g.pt, h.pt]\n"
        'data: {source: "torchvision:MNIST?train=false", mean: [0.5], std: [0.5]}\n'
    )
    assert run(capsys, "merge", "gray.yaml", "deep/out", "--trust-code", "-q") == (0, "", "")
    assert run(capsys, "merge", "deep/out", "again", "--trust-code", "-q") == (0, "", "")
    for name in ("model.safetensors", "plan.json", "README.md"):
        assert (place / "deep" / "out" / name).read_bytes() == (place / "again" / name).read_bytes()


def test_merge_by_recipe_then_everything_that_reads_its_folder(capsys, place):
    assert run(capsys, "merge", "recipe.yaml", "out", "--trust-code", "-q", "--pt2") == (0, "", "")
    assert torch.export.load(place / "out" / "model.pt2").module()(torch.zeros(7, 3, 8, 8))["dogs"].shape == (7, 2)
    assert run(capsys, "merge", "recipe.yaml", "out", "--trust-code", "-q") == (0, "", "")
    assert not (place / "out" / "model.pt2").exists()  # it would be that of another merge
    code, out, _ = run(capsys, "eval", "out", "--data", "x.npz", "--trust-code")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and [row[0] for row in lines[2:6]] == ["cats", "dogs", "ensemble", "merged"]
    assert lines[2][2] == "-" and "30 samples" in out
    assert lines[4][1:3] == [lines[2][1], lines[3][2]]  # the ensemble is its parts
    code, out, _ = run(capsys, "report", "out")
    assert code == 0 and "2 models merged by zip (cats, dogs)" in out
    assert run(capsys, "verify", "out", "--trust-code", "-q") == (0, "", "")
    code, out, _ = run(capsys, "inspect", "out", "--trust-code")
    assert code == 0 and "s0" in out
    assert run(capsys, "push", "out", "./hub", "-q") == (0, "", "")
    (place / "mine").mkdir()
    (place / "mine" / "README.md").write_text("mine")
    code, _, err = run(capsys, "pull", "./hub", "mine")
    assert code == 2 and "'mine' has a README.md that fxzip did not write: choose another folder" in err
    assert run(capsys, "pull", "./hub", "mine", "--force", "-q") == (0, "", "")
    (place / "a.pt").unlink()  # weights are not needed to open a folder
    assert run(capsys, "eval", "out", "--data", "x.npz", "--trust-code", "--no-parents")[0] == 0
    code, _, err = run(capsys, "merge", "out", "again", "--trust-code")
    assert code == 2 and "models[0].weights: no file" in err
    data = bytearray((place / "out" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "out" / "model.safetensors").write_bytes(data)
    code, _, err = run(capsys, "verify", "out", "--trust-code")
    assert code == 1 and "It is damaged" in err


def test_eval_with_data_per_task_and_with_named_classes(capsys, place):
    import numpy as np

    assert run(capsys, "merge", *FLAGS, "--data", "x.npz", "--out", "out", "-q")[0] == 0
    held = np.load("x.npz")
    for name, low, high in (("a", 0, 3), ("b", 3, 5)):
        own = (held["y"] >= low) & (held["y"] < high)
        np.savez(f"{name}.npz", x=held["x"][own], y=held["y"][own] - low)
    code, out, _ = run(capsys, "eval", "out", "--data", "a=a.npz", "--data", "b=b.npz", "--trust-code")
    listed = ("--classes", "a=0,1,2", "--classes", "b=3,4")
    assert code == 0 and run(capsys, "eval", "out", "--data", "x.npz", *listed, "--trust-code")[1] == out
    for argv, message in (
        (["--data", "x.npz"], "which classes are the outputs of 'a'?"),
        (["--data", "a=a.npz"], "once, or as TASK=DATA for each of the tasks a, b"),
        (["--data", "x.npz", "--classes", "c=1"], "write TASK=0,1,2 for one of the tasks a, b"),
        (["--data", "x.npz", "--classes", "a=0,1,z", "--classes", "b=3,4"], "class 'z': the data has no names"),
        (["--data", "random:3x8x8", "--classes", "a=0,1,2", "--classes", "b=3,4"], "has no labels"),
    ):
        code, _, err = run(capsys, "eval", "out", *argv, "--trust-code")
        assert code == 2 and message in err


def test_merge_refuses_to_replace_what_is_not_its_own(capsys, place):
    (place / "out").mkdir()
    (place / "out" / "README.md").write_text("mine")
    code, _, err = run(capsys, "merge", *FLAGS, "--data", "x.npz", "--out", "out")
    assert code == 2 and "has a README.md that fxzip did not write: choose another folder, or force it" in err
    assert (place / "out" / "README.md").read_text() == "mine"
    assert run(capsys, "merge", *FLAGS, "--data", "x.npz", "--out", "out", "--force", "-q")[0] == 0


def test_merge_in_another_dtype_without_data(capsys, place):
    argv = ["merge", *FLAGS[:-1], "rebasin", "--dtype", "bfloat16", "--out", "out"]
    code, _, err = run(capsys, *argv)
    assert code == 2 and "neither loader nor example_inputs" in err
    assert run(capsys, *argv, "--data", "random:3x8x8?count=8", "-q")[0] == 0
    assert load_file(place / "out" / "model.safetensors")["0.weight"].dtype == torch.bfloat16
    classes = ("--classes", "a=0,1,2", "--classes", "b=3,4")
    assert run(capsys, "eval", "out", "--data", "x.npz", *classes, "--trust-code")[0] == 0


def test_plot_draws_the_frontier(capsys, place):
    pytest.importorskip("matplotlib", reason="not installed")
    code, out, _ = run(capsys, "plot", "recipe.yaml", "--trust-code", "--budget", "1", "--until", "3", "-o", "f.svg")
    assert code == 0 and "until 3" in out and "ensemble" in out and "<svg" in (place / "f.svg").read_text()


def test_plot_takes_what_the_recipe_says(capsys, place):
    for text, said in (("memory: 1KB\n", "memory=1KB"), ("model_weights: [1, -1]\n", "model_weights")):
        (place / "r.yaml").write_text((place / "recipe.yaml").read_text() + text)
        for command in (["plot", "r.yaml"], ["merge", "r.yaml", "o"]):
            code, _, err = run(capsys, *command, "--trust-code")
            assert code == 2 and said in err


def test_plot_draws_a_merge_and_a_model(capsys, place):
    pytest.importorskip("matplotlib", reason="not installed")
    assert run(capsys, "merge", "recipe.yaml", "out", "--trust-code", "-q") == (0, "", "")
    (place / "a.pt").unlink()  # neither weights nor data are needed
    (place / "x.npz").unlink()
    for figure, *more in (["correlations"], ["similarity", "--space", "s0"], ["spaces", "--trust-code"]):
        code, out, err = run(capsys, "plot", "out", "--figure", figure, "-o", f"{figure}.svg", *more)
        assert (code, out, err) == (0, f"wrote {figure}.svg\n", "") and "<svg" in Path(f"{figure}.svg").read_text()
    assert run(capsys, "plot", "torchvision:squeezenet1_1", "--figure", "graph", "-q") == (0, "", "")
    assert Path("graph.png").stat().st_size > 10_000
    for argv, message in (
        (["out", "--figure", "layers"], 'this merge fitted no layers (method="solve" does)'),
        (["out", "--figure", "similarity", "--space", "s9"], "no merged space 's9'; there are s0, s1"),
        (["nowhere", "--figure", "correlations"], "is this a folder that fxzip.save wrote?"),
        (["out", "--figure", "layers", "--until", "3"], "belong to the frontier, not to layers"),
        (["out", "--space", "s0"], "belongs to similarity, not to frontier"),
    ):
        code, _, err = run(capsys, "plot", *argv)
        assert code == 2 and message in " ".join(err.replace("│", " ").split()), err


def test_the_page_of_a_merge(capsys, place):
    assert run(capsys, "merge", "recipe.yaml", "out", "--trust-code", "-q", "--html") == (0, "", "")
    first = (place / "out" / "report.html").read_bytes()
    (place / "a.pt").unlink()
    code, out, _ = run(capsys, "report", "out", "--html", "again.html")
    assert code == 0 and "wrote again.html" in out and Path("again.html").read_bytes() == first
    assert run(capsys, "report", "out", "-q") == (0, "", "") and (place / "out" / "report.html").read_bytes() == first
    code, _, err = run(capsys, "report", "out", "--html", "gone/page.html")
    assert code == 2 and "'gone/page.html' cannot be written" in err


def test_a_page_is_never_of_another_merge(capsys, place):
    assert run(capsys, "merge", "recipe.yaml", "out", "--trust-code", "-q", "--html") == (0, "", "")
    argv = ["merge", *FLAGS, "--data", "x.npz", "--until", "3", "--out"]
    assert run(capsys, *argv, "out", "-q")[0] == 0  # without --html
    assert b"until=&#x27;3&#x27;" in (place / "out" / "report.html").read_bytes()
    (place / "mine").mkdir()
    (place / "mine" / "report.html").write_text("mine")
    code, _, err = run(capsys, *argv, "mine", "--html")
    assert code == 2 and "has a report.html that fxzip did not write" in err
    assert run(capsys, *argv, "mine", "-q")[0] == 0 and (place / "mine" / "report.html").read_text() == "mine"


def test_an_average_of_heads_answers_for_every_task(capsys, place):
    argv = ["--model", "net.py:net", "--weights", "a.pt", "a.pt", "--trust-code", "--method", "average"]
    assert run(capsys, "merge", *argv, "--heads", "average", "--data", "x.npz", "--out", "out", "-q")[0] == 0
    classes = ["--classes", "task0=0,1,2", "--classes", "task1=0,1,2"]
    code, out, err = run(capsys, "eval", "out", "--data", "x.npz", *classes, "--trust-code")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[5][0] == "merged" and lines[5][1] == lines[5][2] == lines[2][1], err


def test_a_plan_of_another_program_is_not_ours(capsys, place):
    (place / "other").mkdir()
    (place / "other" / "plan.json").write_text('{"steps": []}')
    code, _, err = run(capsys, "merge", "recipe.yaml", "other", "--trust-code")
    assert code == 2 and "has a plan.json that fxzip did not write" in err


def test_all_that_a_merge_lacks_is_said_at_once(capsys, place):
    (place / "b.pt").unlink()
    (place / "other").mkdir()
    (place / "other" / "README.md").write_text("mine")
    code, _, err = run(capsys, "merge", "recipe.yaml", "other")
    assert code == 2 and "4 problems" in err
    for text in ("'other' has a README.md", "models[1].weights: no file 'b.pt'", *(
        f"models[{i}]: model 'net.py:net' runs 'net.py': read it, then pass --trust-code" for i in (0, 1)
    )):
        assert text in err


def test_merge_resumes_and_goes_on_without_a_proof(capsys, place):
    argv = ["merge", *FLAGS, "--data", "x.npz", "-q"]
    assert run(capsys, *argv, "--out", "plain")[0] == 0
    for out in ("first", "second"):
        assert run(capsys, *argv, "--resume", "kept", "--out", out)[0] == 0
        assert (place / out / "plan.json").read_bytes() == (place / "plain" / "plan.json").read_bytes()
    assert any((place / "kept").iterdir())
    assert run(capsys, *argv, "--verify", "report", "--out", "out")[0] == 0
    assert "verify: report" in (place / "out" / "recipe.yaml").read_text()
    assert run(capsys, *argv, "--verify", "false", "--out", "out")[0] == 0
    assert "verify: false" in (place / "out" / "recipe.yaml").read_text()
    code, _, err = run(capsys, *argv, "--verify", "perhaps", "--out", "out")
    assert code == 2 and "verify: input should be True, False or 'report', not 'perhaps'" in err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fxzip {fxzip.__version__}\n", "")


def test_inspect_prints_spaces_and_explains(capsys):
    model = ("torchvision:squeezenet1_1", "--image-size", "64")
    code, out, _ = run(capsys, "inspect", *model)
    assert code == 0 and "s0" in out
    code, out, _ = run(capsys, "inspect", *model, "--explain", "features.3.squeeze")
    assert code == 0 and "features.3.squeeze" in out


def test_verify_exit_codes(capsys, monkeypatch, place):
    command = ("verify", "net.py:net", "--trust-code", "--data", "random:3x8x8")
    code, out, _ = run(capsys, *command)
    assert code == 0 and out.startswith("sound")
    assert run(capsys, *command, "-q") == (0, "", "")

    class Failed:
        ok = False

        def __str__(self):
            return "NOT SOUND"

    monkeypatch.setattr(fxzip, "verify", lambda *_, **__: Failed())
    assert run(capsys, *command, "-q") == (1, "NOT SOUND\n", "")


def test_coverage_of_the_table_and_of_one_model(capsys, place):
    code, out, _ = run(capsys, "coverage", "--only", "bert")
    assert code == 0 and "transformers:bert" in out and "1 models, 1 traced, 1 sound" in out
    code, out, _ = run(capsys, "coverage", "net.py:net", "--trust-code", "--data", "random:3x8x8")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()] == [
        ["traced", "yes"], ["spaces", "yes"], ["sound", "yes"], ["recovered", "yes"]
    ]  # fmt: skip
    (place / "bad.py").write_text(
        "from torch import nn\n\nclass Bad(nn.Module):\n    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
    )
    code, out, _ = run(capsys, "coverage", "bad.py:Bad", "--trust-code", "--data", "random:3x8x8")
    assert code == 1 and out.startswith("traced    no")


# ---------------------------------------------------------------------------------------------------- models


def test_random_weights_are_reproducible_and_leave_the_random_state():
    state = torch.get_rng_state()
    made = architecture("torchvision:squeezenet1_1")
    weights = [next(build(made, seed=s).parameters()) for s in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


def test_classes_are_read_off_the_weights_and_nothing_else_is_guessed():
    made = architecture("torchvision:squeezenet1_1")
    state = architecture("torchvision:squeezenet1_1?num_classes=7").make().state_dict()
    assert torch.equal(build(made, state).classifier[1].weight, state["classifier.1.weight"])
    state["features.0.weight"] = state["features.0.weight"][:3]
    with pytest.raises(InputError, match=r"features.0.weight is \[3, 3, 3, 3\], in the model \[64, 3, 3, 3\]"):
        build(made, state)


def test_timm_and_transformers(tmp_path, capsys):
    pytest.importorskip("timm", reason="not installed")
    transformers = pytest.importorskip("transformers", reason="not installed")
    timm = architecture("timm:resnet10t?in_chans=1")
    assert build(timm).conv1[0].weight.shape[1] == 1
    with pytest.raises(InputError, match="did you mean resnet10t"):
        architecture("timm:resnet10")
    small = "hidden_size=8&num_hidden_layers=1&num_attention_heads=2&intermediate_size=16&vocab_size=20"
    made = architecture(f"hf:bert?{small}&head=SequenceClassification")
    model = build(made)
    assert type(model).__name__ == "BertForSequenceClassification" and "input_ids" in made.example(model)
    model.save_pretrained(tmp_path / "bert")
    again = build(architecture("hf:bert", tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    for text, message in (("hf:brt", "did you mean bert"), ("hf:bert?head=Sequence", "has no head 'Sequence'")):
        with pytest.raises(InputError, match=message):
            architecture(text)
    assert transformers.__version__
    tokens = ("--data", "random:6?high=20&name=input_ids")
    assert run(capsys, "verify", f"hf:{tmp_path}/bert", *tokens, "-q")[:2] == (0, "")


def test_missing_libraries_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="needs timm: pip install timm"):
        architecture("timm:resnet10t")
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "fxzip.cli.app")
    code, _, err = run(capsys, "--help")
    assert code == 1 and err == 'fxzip: the command line needs typer: pip install "fxzip[cli]"\n'


def test_the_library_does_not_import_the_command_line():
    names = ("typer", "pydantic", "yaml", "timm", "transformers")
    code = f"import sys, fxzip; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_python_m_fxzip():
    command = [sys.executable, "-m", "fxzip", "inspect", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "write torchvision:NAME" in done.stderr


# ------------------------------------------------------------------------------------------------------ demo
def test_digits_are_split_without_overlap():
    data = demo.digits(0)
    images = torch.cat([data.train[0], data.calibration, data.test[0]])
    assert [len(p) for p in (data.train[0], data.calibration, data.test[0])] == [800, 397, 600]
    assert abs(data.train[0].mean()) < 1e-5 and images.shape[1:] == (1, 8, 8)
    rows = {x.numpy().tobytes() for x in images}
    assert len(rows) == len(images)  # no image twice, so none in two parts
    assert not torch.equal(data.train[0], demo.digits(1).train[0])


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r'pip install "fxzip\[demo\]"'):
        demo.digits(0)


def test_training_learns_and_repeats():
    data, state = demo.digits(0), torch.get_rng_state()
    nets = [demo.train(data, demo.CLASSES[1], seed, 8, 12, False, "") for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    own = demo._parent_row("b", 1, nets[0], data, 0.0).per_task
    assert own[0] is None and own[1] is not None and own[1] > 75  # chance is 20
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)


def test_demo_prints_every_network(capsys):
    code, out, _ = run(capsys, "demo", "-q", "--width", "4", "--epochs", "4")
    table, notes = out.split("\n\n")
    names = [line.split("  ")[0] for line in table.splitlines()[2:]]
    assert code == 0 and names[:4] == ["a (0-4)", "b (5-9)", "ensemble", "plain averaging"]
    assert set(fxzip.METHODS) - {"average"} <= set(names)
    assert all(f'{m}, until="{c}"' in names for m in ("permute", "zip") for c in demo.CUTS)
    assert "seed 0, width 4, 4 epochs" in notes and torch.__version__ in notes and "no label" in notes


def test_demo_rows_cost_what_they_should():
    rows = {row.name: row for row in demo.run(demo.digits(0), 0, 4, 2, False)}
    order = ("zip", 'zip, until="layer3"', 'zip, until="layer2"', "ensemble")
    flops = [rows[name].cost.flops for name in order]
    assert flops == sorted(flops) and len(set(flops)) == len(order)
    scores = [s for row in rows.values() for s in (*row.per_task, row.joint) if s is not None]
    assert all(0 <= s <= 100 for s in scores)
