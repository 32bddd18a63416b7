"""The command line as a user types it: help, exit codes, messages, what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest

import fxzip
from fxzip import cli
from fxzip.cli.models import architecture
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


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fxzip {fxzip.__version__}\n", "")


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
