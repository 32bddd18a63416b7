"""The small changes that benchmarks/mutants.py makes to functions, and the probes that tell which statements run."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Div: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}




@dataclass(frozen=True)
class Mutant:
    """The `index`-th possible change of one file, in the function `inside`. statement: the first line of the one it is
    in; text: what it is, for people."""

    path: Path
    index: int
    line: int
    statement: int
    inside: str
    text: str
    source: str
    again: int  # how many before it read the same

    @property
    def key(self) -> str:
        """Its name in mutants.txt, without a line number: files move."""
        number = f" #{self.again + 1}" if self.again else ""
        return f"{self.path.relative_to(ROOT)} {self.inside}: {self.source}: {self.text}{number}"

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}: {self.source}"


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of this file."""
    text = path.read_text()
    lines = text.splitlines()
    found: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    tree = ast.parse(text)
    spans = [(n.lineno, n.end_lineno or n.lineno, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    spans += [(f.lineno, f.body[0].lineno, f.body[0].lineno) for _, f in _functions(tree)]  # defaults count when called
    for k, (line, inside, what, _) in enumerate(_changes(tree)):
        source = lines[line - 1].strip()
        statement = max(said for first, last, said in spans if first <= line <= last)
        found.append(Mutant(path, k, line, statement, inside, what, source, seen[inside, source, what]))
        seen[inside, source, what] += 1
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Top-level functions and methods by qualified name; what is defined inside them belongs to them."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef))


def _changes(tree: ast.Module) -> Iterator[tuple[int, str, str, Any]]:
    """(line, function, what, change) of every possible change; calling `change` makes it, in `tree`."""
    for name, function in _functions(tree):
        for part in [*function.args.defaults, *function.body]:
            said = _said(part)
            for node in ast.walk(part):
                if node not in said:
                    yield from ((line, name, what, change) for line, what, change in _of(node))
        yield from ((line, name, what, change) for line, what, change in _without(function.body))


def _said(part: ast.AST) -> set[ast.AST]:
    """What is raised: texts for people, mostly; `strict=`, a check of the code by itself; types of local names."""
    spoken = [n for n in ast.walk(part) if isinstance(n, (ast.Raise, ast.JoinedStr))]
    spoken += [n for n in ast.walk(part) if isinstance(n, ast.keyword) and n.arg == "strict"]
    spoken += [n.annotation for n in ast.walk(part) if isinstance(n, ast.AnnAssign)]
    return {inner for n in spoken for inner in ast.walk(n)}


def _of(node: ast.AST) -> Iterator[tuple[int, str, Any]]:
    line = getattr(node, "lineno", 0)
    yield from _of_operator(node, line)
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        value = not node.value if node.value is True or node.value is False else node.value + 1  # type: ignore[operator]
        yield line, f"{node.value} -> {value}", lambda: setattr(node, "value", value)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield line, f"{node.id} -> {NAMES[node.id]}", lambda: setattr(node, "id", NAMES[node.id])
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield node.test.lineno, "if -> if not", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension):
        for k, test in enumerate(node.ifs):
            change = functools.partial(node.ifs.__setitem__, k, ast.Constant(True))
            yield test.lineno, f"without if {ast.unparse(test)}", change
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        if isinstance(body, list):
            yield from _without(body)


def _of_operator(node: ast.AST, line: int) -> Iterator[tuple[int, str, Any]]:
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        new = SWAPS[type(node.op)]
        yield line, f"{type(node.op).__name__} -> {new.__name__}", lambda: setattr(node, "op", new())
    elif isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            new = SWAPS[type(op)]
            yield line, f"{type(op).__name__} -> {new.__name__}", lambda k=k, new=new: node.ops.__setitem__(k, new())


def _without(body: list[ast.stmt]) -> Iterator[tuple[int, str, Any]]:
    for k, statement in enumerate(body):
        call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        if call or isinstance(statement, (ast.Continue, ast.Break, ast.AugAssign)):
            text = f"without {ast.unparse(statement)[:60]}"
            yield statement.lineno, text, lambda k=k: body.__setitem__(k, ast.Pass())


def become(mutant: Mutant, functions: dict[tuple[str, str], list[FunctionType]]) -> None:
    """Give every function object of the mutant's name the changed code, and the changed defaults; those that a call of
    it has returned before, the code too."""
    tree = ast.parse(mutant.path.read_text())
    [change for *_, change in _changes(tree)][mutant.index]()
    module = compile(ast.fix_missing_locations(tree), str(mutant.path), "exec", dont_inherit=True)
    codes = {(c.co_qualname, c.co_firstlineno): c for c in _codes(module)}
    changed = {name: f for name, f in _functions(tree)}[mutant.inside]
    inner = f"{mutant.inside}.<locals>."
    found = [(name, f) for (path, name), fs in functions.items() if path == str(mutant.path) for f in fs]
    for name, function in found:
        if name != mutant.inside and not name.startswith(inner):
            continue
        function.__code__ = codes[function.__code__.co_qualname, function.__code__.co_firstlineno]
        defaults = changed.args.defaults if name == mutant.inside and function.__defaults__ else [None]
        if all(isinstance(d, ast.Constant) for d in defaults):
            function.__defaults__ = tuple(ast.literal_eval(d) for d in defaults)


REACHED: set[tuple[str, int]] = set()  # file and line of every statement that ran


@contextlib.contextmanager
def probes(paths: Sequence[Path], functions: dict[tuple[str, str], list[FunctionType]]) -> Iterator[None]:
    """In the block every statement of the functions says that it is reached, before it runs."""
    codes: dict[tuple[str, str, int], CodeType] = {}
    for path in paths:
        tree = ast.parse(path.read_text())
        for _, function in _functions(tree):
            for node in list(ast.walk(function)):
                for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                    if isinstance(body, list):
                        body[:] = [part for statement in body for part in (_probe(path, statement), statement)]
        module = compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
        codes |= {(str(path), c.co_qualname, c.co_firstlineno): c for c in _codes(module)}
    before = [(f, f.__code__) for found in functions.values() for f in found]
    for f, code in before:
        f.__globals__["__reached__"] = REACHED.add
        f.__code__ = codes.get((code.co_filename, code.co_qualname, code.co_firstlineno), code)
    try:
        yield
    finally:
        for f, code in before:
            f.__code__ = code


def _probe(path: Path, statement: ast.stmt) -> ast.stmt:
    probe = ast.parse(f"__reached__(({str(path)!r}, {statement.lineno}))").body[0]
    for node in ast.walk(probe):
        ast.copy_location(node, statement)
    return probe


def function_objects(files: set[str]) -> dict[tuple[str, str], list[FunctionType]]:
    """Every function whose code is in these files, by file and qualified name."""
    found: dict[tuple[str, str], list[FunctionType]] = {}
    for f in gc.get_objects():
        if type(f) is FunctionType and f.__code__.co_filename in files:
            found.setdefault((f.__code__.co_filename, f.__code__.co_qualname), []).append(f)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)
