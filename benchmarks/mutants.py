"""Mutants of the inference rules: one small change each, run against the examples of the tests in a fork.

A mutant is killed when, on some example, inference crashes, the spaces or types differ from tests/golden, or the proof
fails. `mutants(folder)` lists them, `survives(mutant)` tries one.
"""

from __future__ import annotations

import ast
import copy
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from test_soundness import GOLDEN, labelled, once  # noqa: E402

from examples import EXAMPLES  # noqa: E402
from fxzip.infer import analyse  # noqa: E402
from fxzip.infer.rules.registry import _RULES  # noqa: E402

SECONDS = 120  # of one mutant at most: an endless loop is a death, too
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """The `index`-th possible change of one file. text: what it is, for people."""

    path: Path
    index: int
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}"


def mutants(paths: Sequence[Path]) -> list[Mutant]:
    """Every mutant of these files."""
    found = []
    for path in paths:
        tree = ast.parse(path.read_text())
        found += [Mutant(path, k, line, text) for k, (line, text, _) in enumerate(_changes(tree))]
    return found


def _changes(tree: ast.Module) -> Iterator[tuple[int, str, Any]]:
    """(line, what, change) of every possible change; calling `change` makes it, in `tree`."""
    for function in (n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))):
        for node in ast.walk(function):
            yield from _of(node)


def _of(node: ast.AST) -> Iterator[tuple[int, str, Any]]:
    line = getattr(node, "lineno", 0)
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        new = SWAPS[type(node.op)]
        yield line, f"{type(node.op).__name__} -> {new.__name__}", lambda: setattr(node, "op", new())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new = SWAPS[type(node.ops[0])]
        yield line, f"{type(node.ops[0]).__name__} -> {new.__name__}", lambda: node.ops.__setitem__(0, new())
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield line, f"{node.value} -> {node.value + 1}", lambda: setattr(node, "value", node.value + 1)
    elif isinstance(node, ast.If):
        yield line, "if -> if not", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        for k, statement in enumerate(body if isinstance(body, list) else ()):
            call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if call:
                text = f"without {ast.unparse(statement)[:60]}"
                yield statement.lineno, text, lambda body=body, k=k: body.__setitem__(k, ast.Pass())


def survives(mutant: Mutant) -> bool:
    """Whether no example notices, in a fork that nothing comes back from."""
    child = os.fork()
    if child == 0:
        os.close(1)
        os.close(2)
        signal.alarm(SECONDS)
        try:
            _become(mutant)
            os._exit(0 if all(_as_ever(e) for e in EXAMPLES) else 1)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _become(mutant: Mutant) -> None:
    """Run the changed source in its module; whoever imported a function from there gets the changed one."""
    name = ".".join(mutant.path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    tree = ast.parse(mutant.path.read_text())
    [c for _, _, c in _changes(tree)][mutant.index]()
    before = dict(vars(module))
    for packet in [p for p, r in _RULES.items() if r.function.__module__ == name]:
        del _RULES[packet]
    exec(compile(ast.fix_missing_locations(tree), str(mutant.path), "exec"), vars(module))
    for other in [m for n, m in sys.modules.items() if n.startswith("fxzip.") and m is not module]:
        for key, value in list(vars(other).items()):
            if key in before and value is before[key] and callable(value):
                setattr(other, key, getattr(module, key))


def _as_ever(example: Any) -> bool:
    traced, _, inputs = once(example)
    spaces = analyse(copy.deepcopy(traced.graph_module), inputs)
    return labelled(spaces) == (GOLDEN / (re.sub(r"\W+", "-", example.name) + ".txt")).read_text()
