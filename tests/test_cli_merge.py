"""Merges on the command line, and what reads the folder that they write: eval, report, push and pull."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from test_cli import FLAGS, run

from fxzip.cli.models import architecture, build


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


def test_budgets_and_widths_by_option_and_by_recipe(capsys, place):
    """A number, widths by space, and the step; the recipe that is written holds them."""
    argv = ["merge", *FLAGS, "--data", "x.npz", "-q", "--out"]
    assert run(capsys, *argv, "out", "--budget", "s0=12")[0] == 0
    assert load_file(place / "out" / "model.safetensors")["0.weight"].shape[0] == 12
    assert run(capsys, "merge", "out/recipe.yaml", "out2", "--trust-code", "-q")[0] == 0
    assert (place / "out2/model.safetensors").read_bytes() == (place / "out/model.safetensors").read_bytes()
    assert run(capsys, *argv, "wide", "--budget", "1.6", "--round-to", "3")[0] == 0
    assert "budget: 1.6" in (place / "wide/recipe.yaml").read_text()
    assert "round_to: 3" in (place / "wide/recipe.yaml").read_text()
    for given, said in (
        ("much", "--budget much: a number, such as 1.33, or a width for each space, such as s0=48,s4=96"),
        ("s0=wide", "--budget s0=wide: a number"),
        ("s0=4,s0=5", "--budget s0=4,s0=5: a number"),
        ("=4", "--budget =4: a number"),
        ("-1", "budget must be a positive number"),
        ("s9=4", "s9 is no shared space"),
    ):
        code, _, err = run(capsys, *argv, "bad", f"--budget={given}")
        assert code and said in " ".join(err.replace("│", " ").split())


def test_private_stems_by_option_and_by_recipe(capsys, place):
    argv = ["merge", *FLAGS, "--data", "x.npz", "--since", "2", "-q", "--out"]
    assert run(capsys, *argv, "out")[0] == 0
    assert {"0_a.weight", "0_b.weight"} <= set(load_file(place / "out" / "model.safetensors"))
    assert "since: '2'" in (place / "out" / "recipe.yaml").read_text()
    assert run(capsys, "merge", "out/recipe.yaml", "out2", "--trust-code", "-q")[0] == 0
    for name in ("model.safetensors", "plan.json"):
        assert (place / "out" / name).read_bytes() == (place / "out2" / name).read_bytes()


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


def test_one_set_of_logits_is_scored_like_several(capsys, place):
    """Heads made comparable answer each task as before; all classes together they may answer otherwise."""
    tables = {}
    for heads in ("separate", "concat", "joint"):
        (place / "heads.yaml").write_text((place / "recipe.yaml").read_text() + f"heads: {heads}\n")
        assert run(capsys, "merge", "heads.yaml", heads, "--trust-code", "-q") == (0, "", "")
        code, out, err = run(capsys, "eval", heads, "--data", "x.npz", "--trust-code")
        assert code == 0, err
        tables[heads] = next(line.split() for line in out.splitlines() if line.startswith("merged"))
    assert tables["separate"] == tables["concat"]
    *per_task, mean, joint = tables["joint"]
    assert [*per_task, mean] == tables["concat"][:-1] and joint != tables["concat"][-1]
