"""The command line: exit codes, messages, the demo's parts and its whole run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxzip
from fxzip import cli, demo
from fxzip.errors import InputError, TraceError

ROOT = Path(__file__).parent.parent


def run(capsys, *argv):
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_the_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("demo", "inspect", "verify", "exit codes"))


@pytest.mark.parametrize("argv", [[], ["merge"], ["inspect"], ["demo", "--width", "x"], ["demo", "-q", "-v"]])
def test_usage_errors_exit_with_2(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "torchvision:resnet5"], "did you mean resnet50"),
        (["verify", "torchvision:fasterrcnn_resnet50_fpn"], "no classification model"),
        (["inspect", "resnet50"], "write torchvision:NAME"),
        (["inspect", "timm:resnet50"], "write torchvision:NAME"),
        (["verify", "torchvision:resnet18", "--image-size", "0"], "--image-size 0: must be at least 1"),
        (["demo", "--width", "0"], "width 0"),
    ],
)
def test_bad_calls_exit_with_2_and_say_why(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_verbose_shows_the_traceback():
    with pytest.raises(InputError, match="did you mean"):
        cli.main(["inspect", "-v", "torchvision:resnet5"])


def test_work_that_fails_exits_with_1(capsys, monkeypatch):
    def fail(*_):
        raise TraceError("forward branches on data")

    monkeypatch.setattr(fxzip, "inspect", fail, raising=False)
    code, out, err = run(capsys, "inspect", "torchvision:squeezenet1_1", "--image-size", "64")
    assert (code, out, err) == (1, "", "fxzip: forward branches on data\n")


def test_loading_is_reproducible_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first, image = cli.load("torchvision:squeezenet1_1", 64, 3)
    again, _ = cli.load("torchvision:squeezenet1_1", 64, 3)
    other, _ = cli.load("torchvision:squeezenet1_1", 64, 4)
    weights = [next(m.parameters()) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert image.shape == (1, 3, 64, 64) and not first.training
    assert torch.equal(state, torch.get_rng_state())


def test_inspect_prints_spaces_and_explains(capsys):
    model = ("torchvision:squeezenet1_1", "--image-size", "64")
    code, out, _ = run(capsys, "inspect", *model)
    assert code == 0 and "s0" in out
    code, out, _ = run(capsys, "inspect", *model, "--explain", "features.3.squeeze")
    assert code == 0 and "features.3.squeeze" in out


def test_verify_exit_codes(capsys, monkeypatch):
    command = ("verify", "torchvision:squeezenet1_1", "--image-size", "64")
    assert run(capsys, *command)[0] == 0
    assert run(capsys, *command, "-q") == (0, "", "")

    class Failed:
        ok = False

        def __str__(self):
            return "NOT SOUND"

    monkeypatch.setattr(fxzip, "verify", lambda *_, **__: Failed())
    assert run(capsys, *command, "-q") == (1, "NOT SOUND\n", "")


def test_cli_imports_only_the_standard_library_at_the_top():
    for name in ("cli.py", "__main__.py"):
        body = ast.parse((ROOT / "fxzip" / name).read_text()).body
        absolute = [a.name for n in body if isinstance(n, ast.Import) for a in n.names]
        absolute += [n.module for n in body if isinstance(n, ast.ImportFrom) and not n.level and n.module]
        assert absolute and all(a.split(".")[0] in sys.stdlib_module_names for a in absolute)


def test_python_m_fxzip():
    command = [sys.executable, "-m", "fxzip", "inspect", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "write torchvision:NAME" in done.stderr


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
