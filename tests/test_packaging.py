"""The sdist and the wheel made from it hold what they should, and nothing else; and the wheel works on its own."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
NEEDED = ("fxzip", "docs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
DATA = {"fxzip/py.typed", "fxzip/html/assets/page.html", "fxzip/html/assets/vendor/dagre.min.js"}
USE = """
import sys, torch, fxzip
from torch import nn

assert fxzip.__file__.startswith(sys.argv[1]), fxzip.__file__
nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, k)).eval() for k in (2, 3)]
x = torch.randn(64, 4)
zipped = fxzip.merge({"a": nets[0], "b": nets[1]}, [x], progress=False)
assert zipped(x)["b"].shape == (64, 3)
assert fxzip.html.write(zipped, "report.html").stat().st_size > 100_000  # the scripts are in it
"""


def run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist of a copy (building leaves folders behind), and the wheel that is built from it."""
    pytest.importorskip("build", reason="not installed")
    pytest.importorskip("setuptools", "77", reason="not installed, or older than pyproject.toml asks for")
    folder = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, folder / name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_x.py").write_text("")
    run(sys.executable, "-m", "build", "-q", "--no-isolation", "-o", str(folder / "dist"), str(folder))
    return folder / "dist"


def test_sdist(built):
    with tarfile.open(next(built.glob("fxzip-*.tar.gz"))) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    assert DATA | {"docs/coverage.json", "LICENSE", "README.md", "CHANGELOG.md", "setup.py"} <= names
    assert not [n for n in names if n.startswith("tests/")]


def test_wheel(built):
    wheel = zipfile.ZipFile(next(built.glob("fxzip-*.whl")))
    names = wheel.namelist()
    tops = {n.split("/")[0] for n in names}
    assert all(t == "fxzip" or t.endswith(".dist-info") for t in tops), tops
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "fxzip").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {n for n in names if n.startswith("fxzip/")} == package | {"fxzip/coverage.json"} >= DATA
    text = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Provides-Extra: cli" in text and "Provides-Extra: hub" in text


def test_the_wheel_works_outside_of_the_checkout(built, tmp_path):
    home = tmp_path / "site"
    wheel = str(next(built.glob("fxzip-*.whl")))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(home), wheel)
    there = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(home)}}
    run(sys.executable, "-c", USE, str(home), **there)
    if importlib.util.find_spec("typer") is None:
        pytest.skip("the command line needs typer")
    table = run(sys.executable, "-m", "fxzip", "coverage", "--only", "resnet18", **there)
    assert "torchvision:resnet18" in table and "1 models" in table


def test_import_leaves_the_slow_libraries_for_later():
    """They cost more than half of what `import fxzip` would; torch itself brings none of them."""
    slow = ["sympy", "scipy", "networkx", "triton", "matplotlib", "torchvision", "typer"]
    code = f"import sys, torch; before = set(sys.modules); import fxzip; print(set({slow}) & set(sys.modules) - before)"
    assert run(sys.executable, "-c", code).strip() == "set()"


def test_tracing_a_small_network_leaves_the_compiler_for_later():
    """torch.fx and dispatch modes import torch._dynamo for what fxzip does not need: two seconds at the first call."""
    code = (
        "import sys, torch, fxzip; net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU());"
        "print(len(fxzip.inspect(net, torch.ones(2, 3, 8, 8))), {'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code).split() == ["0", "set()"]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
BY_NAME = {"timm", "transformers"}  # asked for by `timm:NAME` and `hf:NAME`, with an error that says what to install


def _names(requirements):
    found = [re.split(r"[\[<>=!;~ ]", r)[0] for r in requirements]
    return [IMPORTED_AS.get(n, n) for n in found]


def test_the_core_dependencies_are_those_that_the_readme_names():
    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(r"The core depends on (.*?) only;", text)
    assert said and re.split(", | and ", said[1]) == _names(PROJECT["dependencies"])


def test_no_hole_is_known_in_what_the_core_needs(tmp_path):
    """Asks PyPI; where it does not answer nothing is known, and that is said."""
    pytest.importorskip("pip_audit", reason="not installed")
    wanted, needed = [PROJECT["dependencies"]], {}
    while wanted:
        for text in wanted.pop():
            need = Requirement(text)
            if need.name not in needed and (need.marker is None or need.marker.evaluate({"extra": ""})):
                needed[need.name] = Version(metadata.version(need.name)).public  # torch has +cu in its own
                wanted.append(metadata.requires(need.name) or [])
    (tmp_path / "needed.txt").write_text("".join(f"{n}=={v}\n" for n, v in needed.items()))
    asked = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "5"]
    command = [sys.executable, "-m", "pip_audit", *asked, "-r", str(tmp_path / "needed.txt")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    except subprocess.TimeoutExpired:
        pytest.skip("PyPI does not answer: nothing is known")
    if not done.stdout and any(word in done.stderr for word in ("ServiceError", "ConnectionError", "timed out")):
        pytest.skip("PyPI cannot be reached: nothing is known")
    assert done.returncode in (0, 1), done.stderr  # 1: something was found, or it broke off
    if not done.stdout:  # an index that breaks off in the middle, in whatever words
        pytest.skip(f"nothing is known: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    answers = json.loads(done.stdout)["dependencies"]
    assert not [(d["name"], hole["id"], hole["fix_versions"]) for d in answers for hole in d.get("vulns", ())]
    if unknown := [d["name"] for d in answers if "skip_reason" in d]:
        pytest.skip(f"the package index says nothing of {', '.join(unknown)}")


def test_nothing_is_imported_that_is_not_declared():
    """pydantic_core comes with pydantic."""
    extras = PROJECT["optional-dependencies"]
    core, declared = set(_names(PROJECT["dependencies"])), {"fxzip", "pydantic_core"} | BY_NAME
    declared |= core | {n for extra in ("cli", "demo", "report", "hub") for n in _names(extras[extra])}
    for path in (ROOT / "fxzip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            foreign = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)
            assert foreign <= declared, f"{path.relative_to(ROOT)}:{node.lineno} imports {foreign - declared}"
