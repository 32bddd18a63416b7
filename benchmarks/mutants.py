"""Mutation testing: which small changes of inference and of the solver would no test notice?

    OMP_NUM_THREADS=1 python benchmarks/mutants.py rules --sample 300
    OMP_NUM_THREADS=1 python benchmarks/mutants.py fxzip/infer/solver.py --tests tests/test_soundness.py

A change is one operator, number, condition, truth value or statement in one function. torch and the tests are
imported once; each mutant is a fork in which the function gets other code. It runs the tests that reach the changed
line, those that killed its neighbours first, then the cheapest, until one fails, `--cpu` seconds are spent (it
survives) or ten times as much within one test (it does not end: killed). Survivors are printed with their line;
those of mutants.txt, where the reason is written why nothing can or need notice, apart. `--keep` names a file for
which tests reach which lines and which mutants were killed by which test, valid as long as sources and tests stay as
they are. SIGTERM ends it after the mutant at hand. `--again OUTPUT` tries those that an earlier run printed as
survivors or unreached.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import inspect
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from mutations import REACHED, ROOT, Mutant, become, function_objects, mutants, probes

TESTS = ROOT / "tests"
EXPLAINED = Path(__file__).with_name("mutants.txt")
SOLVE = sorted(p.stem for p in TESTS.glob("test_solve_*.py"))
RULES = ["test_rule_laws", "test_soundness", "test_broken_rules", "test_proof", "test_random_graphs"]
SPACES = ["test_fixpoint", "test_closure", *RULES]
SETS = {  # name -> files, tests
    "rules": (["fxzip/infer/rules"], RULES),
    "spaces": (["fxzip/infer/solver.py", "fxzip/infer/closure.py"], SPACES),
    "inference": (["fxzip/infer"], SPACES),
    "solve": (["fxzip/solve"], [*SOLVE, "test_solve", "test_determinism"]),
}


class Experiment:
    """A pytest plugin that, instead of running the tests, mutates code and runs them in forks."""

    def __init__(self, options: argparse.Namespace, paths: list[Path]) -> None:
        self.options, self.paths = options, paths
        self.reach: dict[str, tuple[float, dict[str, list[int]]]] = {}  # test -> (CPU seconds, file -> lines)
        self.killers: dict[tuple[Path, str], Counter[str]] = {}
        self.alive: list[Mutant] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        leave = self.options.without
        skipped = [i for i in session.items if i.get_closest_marker("skip") or i.originalname in leave]  # type: ignore[attr-defined]
        self.items = {i.nodeid: i for i in session.items if i not in skipped}
        _warm(list(self.items.values()))
        self.functions = function_objects({str(p) for p in self.paths})
        gc.collect()
        gc.freeze()  # forks share what they do not touch
        signal.signal(signal.SIGTERM, lambda *_: setattr(self.options, "seconds", 0.0))  # ends with its summary
        try:
            self.survey()
            self.mutate()
        finally:
            self.save()
        return True

    def survey(self) -> None:
        """Which lines each test reaches, and what it costs; each in a fork, so that nothing is cached here."""
        sources = {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in self.paths}
        kept = self.options.keep
        tests = {n: hashlib.sha256(inspect.getsource(i.function).encode()).hexdigest() for n, i in self.items.items()}  # type: ignore[attr-defined]
        old = {"root": "", "sources": {}, "tests": {}, "reach": {}, "killed": {}}
        old |= json.loads(kept.read_text()) if kept and kept.exists() else {}
        same = {p for p, digest in sources.items() if old["sources"].get(p) == digest}
        there = {n for n, digest in tests.items() if old["tests"].get(n) == digest}
        killed = {k: by for k, by in old["killed"].items() if k.split()[0] in same and (not by or by in there)}
        whole = (old["root"], old["sources"]) == (str(ROOT), sources)
        reach = {n: found for n, found in old["reach"].items() if n in there} if whole else {}
        self.kept = {"root": str(ROOT), "sources": sources, "tests": tests, "reach": reach, "killed": killed}
        new = [(n, i) for n, i in self.items.items() if n not in self.kept["reach"]]
        with probes(self.paths, self.functions) if new else contextlib.nullcontext():
            for k, (name, item) in enumerate(new):
                found = _forked(lambda item=item: self._reached(item), self.options.cpu * 20)
                self.kept["reach"][name] = found if found is not None else (None, {})
                self.save(k)
        self.save()
        self.reach = {n: self.kept["reach"][n] for n in self.items if self.kept["reach"][n][1]}
        left_out = [n for n in self.items if n not in self.reach]
        spent = sum(cost for cost, _ in self.reach.values())
        print(f"{len(self.reach)} tests, {spent:.0f} s; {len(left_out)} fail or reach nothing", file=sys.stderr)

    def save(self, k: int = 0) -> None:
        """Now and then: every twentieth time."""
        if self.options.keep and k % 20 == 0:
            self.options.keep.write_text(json.dumps(self.kept))

    def _reached(self, item: pytest.Item) -> tuple[float | None, dict[str, list[int]]]:
        start = time.process_time()
        if not _passes(item):
            return None, {}
        files: dict[str, set[int]] = {}
        for path, line in REACHED:
            files.setdefault(path, set()).add(line)
        return time.process_time() - start, {p: sorted(s) for p, s in files.items()}

    def mutate(self) -> None:
        every = [m for p in self.paths for m in mutants(p) if self.options.only in str(m)]
        if self.options.again:
            before = [_unnumbered(line) for line in self.options.again.read_text().splitlines()]
            every = [m for m in every if any(b.startswith(_unnumbered(f": {m}")) for b in before)]
        random.Random(self.options.seed).shuffle(every)
        reasons = dict(line.rsplit(" | ", 1) for line in EXPLAINED.read_text().splitlines() if " | " in line)
        found: Counter[str] = Counter()
        used: set[str] = set()  # of the reasons
        tried = every[: self.options.sample or len(every)]
        for k, m in enumerate(tried):
            self.save(k + 1)
            if _cpu() > self.options.seconds:
                break
            outcome, by = ("killed", "") if m.key in self.kept["killed"] else self.outcome(m)
            explained = outcome in ("survives", "unreached") and m.key in reasons
            found["explained" if explained else outcome] += 1
            used.update([m.key] * explained)
            if outcome in ("killed", "endless"):
                self.kept["killed"].setdefault(m.key, by)
            if outcome != "killed" or self.options.verbose:
                tail = f" ({reasons[m.key]})" if explained else ""
                print(f"{outcome}: {m}{tail}{' by ' + by if by else ''}", flush=True)
        self.save()
        chosen = self.options.only or self.options.again
        if len(tried) == len(every) == sum(found.values()) and not chosen:
            files = {str(p.relative_to(ROOT)) for p in self.paths}
            idle = [k for k in reasons if k.split()[0] in files and k not in used]
            print(*(f"explained without need: {k}" for k in idle), sep="\n", end="\n" * bool(idle))
        count = sum(found.values())
        dead = found["killed"] + found["endless"]
        print(f"{count} of {len(every)} mutants: {dead} killed ({dead / max(count, 1):.1%}), ", end="")
        print(", ".join(f"{n} {what}" for what, n in found.items() if what not in ("killed", "endless")), end="")
        print(f"; {_cpu():.0f} CPU seconds, seed {self.options.seed}", flush=True)

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """("killed", test), ("endless", ""), ("survives", "") or ("unreached", "")."""
        killers = self.killers.setdefault((mutant.path, mutant.inside), Counter())
        path = str(mutant.path)
        lines = [(n, cost) for n, (cost, files) in self.reach.items() if mutant.statement in files.get(path, ())]
        if not lines:
            return "unreached", ""
        order = [n for n, _ in sorted(lines, key=lambda x: (-min(killers[x[0]], 1), x[1]))]
        by = _forked(lambda: self._noticed(mutant, order), self.options.cpu * 10)
        if by is None:
            return "endless", ""
        if by:
            killers[by] += 1
        return ("killed", by) if by else ("survives", "")

    def _noticed(self, mutant: Mutant, names: Sequence[str]) -> str:
        """The first test that fails, "" when none does within the seconds."""
        become(mutant, self.functions)
        start = time.process_time()
        for name in names:
            if not _passes(self.items[name]):
                return name
            if time.process_time() - start > self.options.cpu:
                break
        return ""


def _warm(items: Sequence[pytest.Item]) -> None:
    """Import what is imported late, by one test of each file; what the tests cached meanwhile is forgotten."""
    for item in {i.path: i for i in reversed(items)}.values():
        runtestprotocol(item, log=False, nextitem=None)
    names = {p.stem for p in TESTS.glob("*.py")}
    for cached in gc.get_objects():
        if isinstance(cached, functools._lru_cache_wrapper) and cached.__module__ in names:
            cached.cache_clear()


def _passes(item: pytest.Item) -> bool:
    try:
        return not any(r.failed for r in runtestprotocol(item, log=False, nextitem=None))
    except BaseException:
        return False


def _forked(work: Any, seconds: float) -> Any:
    """What `work` returns in a fork; None when it runs out of CPU seconds, of memory, or dies."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(null, stream)
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
                file.write(json.dumps(work()).encode())
                file.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        data = file.read()
    return json.loads(data) if data else None


def _unnumbered(line: str) -> str:
    """A mutant as it is printed, without the outcome and the number of its line: files move."""
    outcome, _, mutant = line.partition(": ")
    return re.sub(r":\d+:", ":", mutant, count=1) if outcome in ("", "survives", "unreached") else ""


def _cpu() -> float:
    return sum(os.times()[:4])


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("what", nargs="+", help=f"files, folders, or {', '.join(SETS)}")
    parser.add_argument("--tests", nargs="*", default=[], help="files of tests, beside those of the named sets")
    parser.add_argument("--without", nargs="*", default=[], help="names of tests to leave out")
    parser.add_argument("--sample", type=int, default=0, help="how many mutants, at random (0: all)")
    parser.add_argument("--only", default="", help="mutants whose line of output would contain this")
    parser.add_argument("--again", type=Path, help="what an earlier run printed: only its survivors")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of CPU in all, then no further mutant")
    parser.add_argument("--cpu", type=float, default=10, help="CPU seconds of tests per mutant")
    parser.add_argument("--keep", type=Path, help="file for what need not be found out again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print killed ones, too")
    options = parser.parse_args(argv)
    places = [p for w in options.what for p in SETS.get(w, ([w], []))[0]]
    tests = [f"tests/{t}.py" for w in options.what for t in SETS.get(w, ([], []))[1]] + options.tests
    found = [f for p in places for f in ([ROOT / p] if p.endswith(".py") else sorted((ROOT / p).rglob("*.py")))]
    os.chdir(ROOT)
    arguments = [*dict.fromkeys(tests), "-q", "-s", "-p", "no:cacheprovider"]
    return pytest.main(arguments, plugins=[Experiment(options, list(dict.fromkeys(found)))])


if __name__ == "__main__":
    sys.exit(main())
