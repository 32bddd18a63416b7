"""Imports go downward only, and nothing in fxzip knows a module class or an architecture."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parent.parent / "fxzip"
LAYERS = (  # lowest first
    "errors version allocator memory processes products markup drawing trace infer evaluate measure match rewrite "
    "solve distill comparable repair verification verify loaders check options padding nested prepared prepare "
    "planning calibration inspection widths assemble heatmap report describe sanity passes postpass merge frontier "
    "landscape plot html soup "
    "files __init__ demo cli __main__"
)
LEVEL = {name: level for level, name in enumerate(LAYERS.split())}
FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(absolute module, name or ""), of every import in the file, wherever it stands."""
    package = ["fxzip", *file.parts[:-1]]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((module, alias.name) for alias in node.names)


def layer(module: str, name: str) -> str | None:
    """The layer an import belongs to; None outside fxzip."""
    if module.split(".")[0] != "fxzip":
        return None
    parts = [*module.split("."), name]
    return parts[1] if parts[1] in LEVEL else "__init__"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_downward(file):
    own = file.parts[0].removesuffix(".py")
    assert own in LEVEL, f"{file}: give it a layer in {Path(__file__).name}"
    used = {name for i in imports(file) if (name := layer(*i)) and name != own}
    upward = [name for name in used if LEVEL[name] >= LEVEL[own]]
    assert not upward, f"{file} ({own}) imports upward: {upward}"


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "rewrite"], ids=str)
def test_rewriter_takes_matchings_never_matchers(file):
    names = {name for module, name in imports(file) if layer(module, name) == "match"}
    assert names <= {"Matching"}


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "match"], ids=str)
def test_matchers_see_numbers_never_graphs(file):
    assert not {module for module, _ in imports(file) if module.startswith("torch.fx")}
    assert not [i for i in imports(file) if layer(*i) == "trace"]


@pytest.mark.parametrize("file", [f for f in FILES if "rules" in f.parts], ids=str)
def test_rules_see_operators_never_modules(file):
    seen = {f"{module}.{name}" for module, name in imports(file)}
    assert not [s for s in seen if s.startswith("torch.nn")]


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "demo.py" and f.parts[0] != "cli"], ids=str)
def test_no_architectures(file):
    packages = {module.split(".")[0] for module, _ in imports(file)}
    assert not packages & {"torchvision", "timm", "transformers"}


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "demo.py"], ids=str)
def test_no_module_classes(file):
    """By attribute (nn.Conv2d, torch.nn.modules.conv._ConvNd) or by import; containers and wrappers are none."""
    nodes = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.Attribute)]
    names = [n.attr for n in nodes if "nn" in ast.unparse(n.value).split(".")]
    names += [name for module, name in imports(file) if module.split(".")[:2] == ["torch", "nn"]]
    known = ("Module", "ModuleList", "ModuleDict", "DataParallel")
    layers = {n for n in dir(nn) if isinstance(getattr(nn, n), type) and issubclass(getattr(nn, n), nn.Module)}
    assert not [n for n in names if n in layers.difference(known) or n.startswith("_") and n[1:2].isupper()]
