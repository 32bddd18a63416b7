"""The commands that look at a model or a merge: inspect, verify, coverage, plot."""

from pathlib import Path

import pytest
from test_cli import run

import fxzip


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
