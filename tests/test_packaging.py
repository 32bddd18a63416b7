"""The wheel and the sdist hold what they should, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ("fxzip", "docs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, folder / name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_x.py").write_text("")
    return folder


@pytest.mark.slow
def test_wheel(source, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("fxzip-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {"fxzip/py.typed", "fxzip/coverage.json", "fxzip/cli/app.py", "fxzip/files/hub.py"} <= set(names)
    assert all(t == "fxzip" or t.endswith(".dist-info") for t in tops), tops
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fxzip").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules
    text = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Provides-Extra: cli" in text and "Provides-Extra: hub" in text


@pytest.mark.slow
def test_sdist(source, tmp_path):
    pytest.importorskip("build", reason="not installed")
    command = [sys.executable, "-m", "build", "-q", "--sdist", "-o", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = tmp_path.glob("fxzip-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    assert {"fxzip/py.typed", "docs/coverage.json", "LICENSE", "README.md", "CHANGELOG.md", "setup.py"} <= names
    assert not [n for n in names if n.startswith("tests/")]


def test_import_leaves_the_slow_libraries_for_later():
    """They cost more than half of what `import fxzip` would; torch itself brings none of them."""
    slow = ["sympy", "scipy", "networkx", "triton", "matplotlib", "torchvision", "typer"]
    code = f"import sys, torch; before = set(sys.modules); import fxzip; print(set({slow}) & set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tracing_a_small_network_leaves_the_compiler_for_later():
    """torch.fx and dispatch modes import torch._dynamo for what fxzip does not need: two seconds at the first call."""
    code = (
        "import sys, torch, fxzip; net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU());"
        "print(len(fxzip.inspect(net, torch.ones(2, 3, 8, 8))), {'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "set()"]
