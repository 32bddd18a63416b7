"""Which models fxzip traces, proves and merges: docs/COVERAGE.md and docs/coverage.json.

One process per model with limits on processor time and memory; results are appended to a cache of JSON lines, so that
a run can be interrupted and continued. Models come in the order of what is to be learned: those never tried, those
that failed, those analysed only, those measured with other code. `--only GLOBS` and `--suite` choose models, `--again`
measures what this code has measured, too, `--table` only writes the documents. The suite `others` needs ultralytics
and diffusers, which are no dependency.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coverage_model import MEMORY, apart, measure
from coverage_table import latest, outcome, write

ROOT = Path(__file__).parent.parent
CACHE = Path.home() / ".cache" / "fxzip-bench" / "coverage.jsonl"
LIBRARIES = {"toys": (), "others": ("ultralytics", "diffusers")}  # of a suite, where not named as it


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    published = args.docs / "coverage.json"
    if not args.cache.exists() and published.exists():  # on a new machine, go on from what is published
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(published.read_text(encoding="utf-8"))
        args.cache.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if not args.table:
        run(args)
    write(latest(args.cache), args.docs)
    return 0


def run(args: argparse.Namespace) -> None:
    """Measure what the cache lacks, one process per model, forked from this one, which has imported everything."""
    from zoo_others import SUITES

    known, code = latest(args.cache), code_state()
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    start, globs = time.monotonic(), args.only.split(",")
    wanted = []
    for suite in args.suite.split(","):
        for library in LIBRARIES.get(suite, (suite,)):
            import_module(library)
        for name in SUITES[suite]():
            old = known.get(f"{suite}:{name}")
            chosen = any(fnmatch(name, glob) for glob in globs)
            if chosen and (args.again or urgency(old, code) < args.urgent):
                wanted.append((urgency(old, code), len(wanted), suite, name))
    for toy in ("nn.TransformerEncoder", "nn.Transformer") if wanted else ():
        measure("toys", toy, nodes=0)  # what is imported late is imported here, once, and counts for no model
    for place, (_, _, suite, name) in enumerate(sorted(wanted), 1):
        if time.monotonic() - start > args.budget:
            return
        row = {"suite": suite, "name": name, "code": code, **facts(suite), **_process(suite, name, args)}
        with args.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        took = f"{row.get('seconds', args.limit):6.1f} s"
        key = f"{place}/{len(wanted)} {suite}:{name}"
        print(f"{key:52}{outcome(row):11}{took} {row.get('error') or row['verification']}"[:260], flush=True)


DONE = 4


def urgency(row: dict[str, Any] | None, code: str) -> int:
    """0 never tried, 1 failed, 2 analysed only, 3 measured with other code, DONE."""
    if row is None:
        return 0
    if row.get("code") == code:
        return DONE
    done = outcome(row)
    return 3 if done == "recovered" else 2 if done == "sound" and "error" not in row else 1


def code_state() -> str:
    """What names the code of fxzip that a row was measured with: seven digits of its files' hash."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "fxzip").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:7]


def facts(suite: str) -> dict[str, str]:
    """Where a row comes from."""
    cpu = Path("/proc/cpuinfo")
    names = [x.partition(":")[2].strip() for x in cpu.read_text().splitlines() if x.startswith("model name")] \
        if cpu.is_file() else []  # fmt: skip
    libraries = ("torch", *LIBRARIES.get(suite, (suite,)))
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": (names or [platform.machine()])[0],
        "versions": ", ".join(f"{name} {version(name)}" for name in libraries),
    }


def _process(suite: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    found = apart(args.limit, lambda: measure(suite, name, args.nodes, not args.analysis), args.memory)
    return found if isinstance(found, dict) else {"error": f"the process ended with exit code {found}"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="torchvision,timm,transformers,toys")
    parser.add_argument("--only", default="*", metavar="GLOBS", help="names of models: a,b*")
    parser.add_argument("--limit", type=int, default=600, help="seconds of processor time per model (600)")
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"GiB per model ({MEMORY})")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where COVERAGE.md and coverage.json go")
    parser.add_argument("--again", action="store_true", help="measure what this code has measured, too")
    parser.add_argument("--analysis", action="store_true", help="trace, infer and prove, but do not merge")
    parser.add_argument("--nodes", type=int, default=10**6, help="compile and export merged graphs up to this size")
    parser.add_argument("--urgent", type=int, default=DONE, help="only models of an urgency below this one")
    parser.add_argument("--table", action="store_true", help="only write the documents")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no model after so many seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
