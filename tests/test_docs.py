"""What the documentation says is true: its Python runs, its commands and recipes parse, its links lead somewhere.

Blocks of one file share a namespace. `<!-- not run: why -->` on the line above a block keeps it from running.
"""

import ast
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import fxzip

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL = [*FILES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<note>not run: .+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(file: Path, kind: str) -> list[tuple[str, int, str]]:
    """(text, line, why it is not run or "") of every block of a kind."""
    page = file.read_text()
    found = [m for m in BLOCK.finditer(page) if m["kind"] == kind]
    return [(m["text"], page.count("\n", 0, m.start("text")) + 1, m["note"] or "") for m in found]


def called(path: Path) -> str:
    return str(path.relative_to(ROOT))


def given(file: Path) -> dict:
    """What a reader of the README has; the other pages bring all they use."""
    if file.name != "README.md":
        return {}
    from fxzip.demo import DigitNet

    torch.manual_seed(0)
    cats, dogs, twin = DigitNet(4, 12).eval(), DigitNet(4, 25).eval(), DigitNet(4, 12).eval()
    images = torch.randn(64, 1, 8, 8)
    return {
        "cat_model": cats, "dog_model": dogs, "a": cats, "b": twin, "images": images, "loader": images.split(16),
        "loss": lambda network: network(images).square().mean().item(),
    }  # fmt: skip


@pytest.mark.parametrize("file", [f for f in FILES if blocks(f, "python")], ids=called)
def test_python_runs(file, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="not installed")
    pytest.importorskip("matplotlib", reason="not installed")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    space = given(file)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", fxzip.MergeWarning)  # untrained networks, noise for data
        for text, line, note in blocks(file, "python"):
            code = compile("\n" * (line - 1) + text, str(file), "exec")
            if not note:
                exec(code, space)


def commands(file: Path) -> list[str]:
    """Shell lines and inline code, a command each, its comment with it; `torchrun ... -m fxzip` is fxzip's, too."""
    lines = [line for text, _, _ in blocks(file, "sh") for line in text.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.M | re.S)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [re.sub(r"^torchrun .* -m fxzip ", "fxzip ", part.strip()) for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("file", ALL, ids=called)
def test_commands_exist_with_their_options(file):
    import typer

    from fxzip.cli.app import app

    known = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    for line in commands(file):
        found = re.match(r"fxzip ([a-z]+)\b(.*)", line)
        if found:
            assert set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", found[2])) <= known[found[1]], line


def options(script: Path) -> set[str]:
    """What a benchmark takes, by its source: some import what is not installed here."""
    text, found = script.read_text(), {"--help"}
    for name in ("papers/paper.py", "common.py"):
        if re.search(rf"from {Path(name).stem} import .*\b(main|options)\b", text):
            found |= options(ROOT / "benchmarks" / name)
    if script.name not in ("common.py", "paper.py") and "options(__doc__, methods=True)" not in text:
        found -= {"--methods"}
    return found | set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))


@pytest.mark.parametrize("file", ALL, ids=called)
def test_benchmarks_exist_with_their_options(file):
    scripts = {path.name: path for path in (ROOT / "benchmarks").rglob("*.py")}
    methods = set(re.findall(r'^    "(\S+)": \{"method"', (ROOT / "benchmarks" / "common.py").read_text(), re.M))
    for line in commands(file):
        found = re.search(r"(?:^|\bbenchmarks/(?:papers/)?)(\w+\.py)\b(.*)", line)
        if found and (found[1] in scripts or "benchmarks/" in line):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", found[2])) <= options(scripts[found[1]]), line
            named = re.search(r"--methods ((?:[^-\s]\S* ?)+)", found[2])
            assert not named or set(named[1].split()) <= methods, line


@pytest.mark.parametrize("file", ALL, ids=called)
def test_names_exist(file):
    for path in set(re.findall(r"(?<![/\w.-])fxzip\.([A-Za-z_][\w.]*\w)", file.read_text())):
        found = fxzip
        for k, name in enumerate(path.split(".")):
            if not hasattr(found, name):
                importlib.import_module(".".join(["fxzip", *path.split(".")[: k + 1]]))
            found = getattr(found, name)


@pytest.mark.parametrize("file", [f for f in FILES if blocks(f, "yaml")], ids=called)
def test_recipes_are_valid(file, tmp_path):
    from fxzip.cli.recipe import check

    for text, _, _ in blocks(file, "yaml"):
        check(yaml.safe_load(text), tmp_path, called(file), files=False)


def anchors(file: Path) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("file", ALL, ids=called)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)", re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.M | re.S)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = file.parent / path if path else file
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_every_page_is_in_the_navigation():
    def pages(entry) -> list[str]:
        inner = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [p for e in inner for p in pages(e)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(f.relative_to(ROOT / "docs")) for f in FILES if f.parent != ROOT)


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: fxzip\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(set(fxzip.__all__))
    assert all(getattr(fxzip, n).__doc__ for n in listed if n not in ("MATCHERS", "METHODS"))


def test_pages_are_formatted():
    for file in FILES:
        for text, line, _ in blocks(file, "python"):
            ast.parse(text)
            assert max(map(len, text.splitlines())) <= 120, f"{file}:{line}"
