"""The notebooks run offline: in a kernel where nbclient and ipykernel are installed, else by exec of their cells."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fxzip

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def cells(file: Path) -> list[str]:
    found = json.loads(file.read_text())
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    return ["".join(c["source"]) for c in found["cells"] if c["cell_type"] == "code"]


def test_there_are_notebooks_without_outputs():
    assert len(NOTEBOOKS) == 3
    for file in NOTEBOOKS:
        held = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
        assert not [c for c in held if c["outputs"] or c["execution_count"]]
        for text in cells(file):
            compile(text, file.name, "exec")


SLOW = {"vit_budgets"}


@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] if f.stem in SLOW else []) for f in NOTEBOOKS]
)
def test_notebooks_run(file, tmp_path, monkeypatch):
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed, reason="not installed")
    monkeypatch.chdir(tmp_path)
    if find_spec("nbclient") and find_spec("ipykernel"):
        _in_a_kernel(file)
    else:
        torch.set_num_threads(1)
        space: dict = {}
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", fxzip.MergeWarning)
            for text in cells(file):
                exec(compile(text, file.name, "exec"), space)


def _in_a_kernel(file: Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    kinds = {kind for o in shown for kind in o.get("data", {})}
    assert "text/html" in kinds and ("image/png" in kinds) == any(".plot" in text for text in cells(file))
