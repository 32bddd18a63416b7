"""Which models fxzip traces, proves and merges: docs/COVERAGE.md and docs/coverage.json.

One process per model with limits on time and memory; results are appended to a cache of JSON lines, so that a run can
be interrupted and continued. `--only GLOB` and `--suite` choose models, `--again` measures what is in the cache too,
`--table` only writes the documents. The suite `others` needs ultralytics and diffusers, which are no dependency.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CACHE = Path.home() / ".cache" / "fxzip-bench" / "coverage.jsonl"
BATCH, SAMPLES = 4, 8
MEMORY = 10 << 30  # bytes a process may allocate
MOMENTS = 3 << 30  # bytes of second moments above which the models are matched by their weights
LIBRARIES = {"toys": (), "others": ("ultralytics", "diffusers")}  # of a suite, where not named as it
PATIENCE = 60  # seconds after which a result is not compiled and exported any more
RECOVERED = 1e-3  # relative error of a model recovered from its scrambled copy


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not args.table:
        run(args)
    write(latest(args.cache), args.docs)
    return 0


def run(args: argparse.Namespace) -> None:
    """Measure what the cache lacks, one process per model, forked from this one, which has imported everything."""
    from zoo_others import SUITES

    done = {} if args.again else latest(args.cache)
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for suite in args.suite.split(","):
        for library in LIBRARIES.get(suite, (suite,)):
            import_module(library)
        for name in SUITES[suite]():
            key = f"{suite}:{name}"
            if not fnmatch(name, args.only) or key in done:
                continue
            if time.monotonic() - start > args.budget:
                return
            row = {"suite": suite, "name": name, **_process(suite, name, args)}
            with args.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            took = f"{row.get('seconds', args.limit):6.1f} s"
            print(f"{key:44}{outcome(row):11}{took} {row.get('error') or row['verification']}"[:260], flush=True)


def _process(suite: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: theirs.send(measure(suite, name, args.analysis)))
    worker.start()
    theirs.close()
    try:
        return mine.recv() if mine.poll(args.limit) else {"error": f"more than {args.limit} s"}
    except EOFError:
        worker.join()
        return {"error": f"the process ended with exit code {worker.exitcode}"}
    finally:
        worker.kill()
        worker.join()


# --------------------------------------------------------------------------------------------- one model


def measure(suite: str, name: str, only_analysis: bool = False) -> dict[str, Any]:
    """Everything about one model, as far as it goes. Seconds are of the processor, so that other work beside this
    one does not count."""
    import torch
    from zoo_others import SUITES

    from fxzip.trace import plain

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    model, batch = SUITES[suite]()[name]()
    start = time.process_time()
    try:
        found, spaces = analysis(model.eval(), batch(2))
        row |= found
        row["analysis_seconds"] = round(time.process_time() - start, 2)
        if not only_analysis:
            zipped = recovery(row, plain(model)[0], batch, spaces)
            del model, spaces
            if time.process_time() - start < PATIENCE:
                runnable(row, zipped, batch(BATCH))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.process_time() - start, 2)
    row["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def analysis(model: Any, batch: Any) -> tuple[dict[str, Any], Any]:
    """Rung, graph, spaces, proof; and the spaces themselves."""
    from inspect import signature

    from fxzip.infer import analyse
    from fxzip.infer.show import free_parameters
    from fxzip.trace import bind, trace
    from fxzip.verify import verify_spaces

    start = time.process_time()
    traced = trace(model, batch)
    args = bind(batch, signature(traced.graph_module.forward))
    spaces = analyse(traced.graph_module, args)
    inferred = time.process_time() - start
    free, total = free_parameters(spaces)
    proof = verify_spaces(traced, spaces, args)
    return {
        "rung": traced.rung,
        "notices": list(traced.notices),
        "nodes": len(traced.graph_module.graph.nodes),
        "operators": len(spaces.lowered.graph.nodes),
        "spaces": sum(bool(s.segments) for s in spaces),
        "block_spaces": sum(not s.segments for s in spaces),
        "parameters": sum(p.numel() for p in model.parameters()),
        "free": round(free / max(total, 1), 4),
        "untouched": len(spaces.untouched),
        "frozen": sorted({f"{f.op}: {f.reason}" for f in spaces.frozen}),
        "inspect_seconds": round(inferred, 2),
        "sound": proof.ok,
        "inconclusive": proof.inconclusive,
        "proof_error": proof.error,
        "sensitivity": proof.sensitivity,
        "verification": str(proof),
    }, spaces


def recovery(row: dict[str, Any], model: Any, batch: Any, spaces: Any) -> Any:
    """Merge with a scrambled copy: the result, which is returned, must compute what the model computes."""
    from inspect import signature

    import torch

    import fxzip
    from fxzip.rewrite import recompute_statistics
    from fxzip.trace import bind

    jitter(model)
    data = [batch(BATCH) for _ in range(SAMPLES // BATCH)]
    run = copy.deepcopy(model)  # a transformers model that has run carries hooks
    recompute_statistics(run, data, lambda b: bind(b, signature(model.forward)))  # as the merge does
    model.load_state_dict(run.state_dict())
    del run
    example = data[0]
    scrambled = scramble(model, spaces)
    row["matched_by"] = "permute" if sum(32 * s.size**2 for s in spaces) < MOMENTS else "rebasin"
    zipped = fxzip.merge([model, scrambled], data, method=row["matched_by"], verify=False, progress=False)
    error = far(zipped, model, example)
    with torch.no_grad():
        moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), scrambled.parameters(), strict=True))
    row |= {"recovery_error": error, "recovered": error < RECOVERED, "scrambled": moved}
    row["shared"] = round(fxzip.report(zipped).shared, 4)
    return zipped


def scramble(model: Any, spaces: Any) -> Any:
    """As fxzip.scramble, with spaces that are known already."""
    import numpy as np

    from fxzip.infer.group import axis_indices, permuted
    from fxzip.infer.sampling import sample

    state = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    indices = axis_indices(spaces, sample(spaces, np.random.default_rng(0)), state)
    other = copy.deepcopy(model)
    other.load_state_dict(permuted(state, indices), strict=False)
    return other


def runnable(row: dict[str, Any], zipped: Any, batch: Any) -> None:
    """Whether the result goes through torch.compile (aot_eager, one graph) and torch.export."""
    from inspect import signature

    import torch

    from fxzip.trace import bind

    args = bind(batch, signature(zipped.forward))
    with torch.no_grad():
        ways = {
            "compiles": lambda: torch.compile(zipped, backend="aot_eager", fullgraph=True)(*args),
            "exports": lambda: torch.export.export(zipped, args, strict=False),
        }
        for name, way in ways.items():
            try:
                way()
                row[name] = True
            except Exception as error:
                row[name] = False
                row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:300]


def jitter(model: Any) -> None:
    """Freshly initialised biases, scales and statistics are all alike: make features tell themselves apart.

    Buffers that no checkpoint holds are constants of the code, and stay."""
    import torch

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() <= 1 and "running_var" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))


def far(zipped: Any, model: Any, example: Any) -> float:
    """Largest deviation of either head from the model, relative to the largest output."""
    from inspect import signature

    import torch

    from fxzip.trace import bind, counted, tensors_of

    with torch.no_grad():
        outputs = zipped(*bind(example, signature(zipped.forward)))
        wanted = tensors_of(counted(model(*bind(example, signature(model.forward)))))
    floating = [t for t in wanted if t.is_floating_point()]
    worst = 0.0
    for output in outputs:
        given = [t for t in tensors_of(output) if t.is_floating_point()]
        for a, b in zip(given, floating, strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst


# --------------------------------------------------------------------------------------------- documents


def latest(cache: Path) -> dict[str, dict[str, Any]]:
    """The last row of every model."""
    lines = cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {f"{r['suite']}:{r['name']}": r for r in rows}


def outcome(row: dict[str, Any]) -> str:
    if row.get("sound") is False:
        return "no proof" if row.get("inconclusive") else "UNSOUND"
    if "recovered" in row:
        return "recovered" if row["recovered"] else "not exact"
    return "sound" if row.get("sound") else "refused"


def write(rows: dict[str, dict[str, Any]], folder: Path) -> None:
    """The table, with a count per suite, and all numbers as JSON."""
    folder.mkdir(exist_ok=True)
    lines = ["# Coverage", "", *__doc__.split("\n\n")[0].splitlines(), "", _HOW, ""]  # type: ignore[union-attr]
    lines += [_COUNTS, "|---|" + "--:|" * 9]
    suites = list(dict.fromkeys(r["suite"] for r in rows.values()))
    for suite in suites:
        own = [r for r in rows.values() if r["suite"] == suite]
        counts = [len(own), sum("rung" in r for r in own), sum(r.get("sound") is True for r in own)]
        counts += [sum(outcome(r) == "UNSOUND" for r in own), sum(r.get("recovered") is True for r in own)]
        counts += [sum("recovered" in r for r in own)]
        counts += [sum(r.get(way) is True for r in own) for way in ("compiles", "exports")]
        counts += [sum("compiles" in r for r in own)]
        lines.append(f"| {suite} | {' | '.join(map(str, counts))} |")
    for suite in suites:
        lines += ["", f"## {suite}", "", _HEADER, "|" + "---|" * 17]
        lines += [_line(r) for r in rows.values() if r["suite"] == suite]
    (folder / "COVERAGE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "coverage.json").write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


_COUNTS = "| suite | tried | traced | sound | unsound | recovered | of those merged | compile | export | of those run |"
_HEADER = (
    "| model | outcome | rung | nodes | spaces | free | proof error | sensitivity | recovery error | shared | compiles"
    " | exports | s (inspect) | s (proof, too) | s (all) | MB | why not all |"
)
_HOW = f"""Made by `python benchmarks/coverage.py`; random weights, one thread. *sound*: a random element of the
inferred group leaves the output unchanged (float64), leaving a use out does not. *recovered*: merging the
model with its scrambled copy (`method="permute"`, or "rebasin" where the moments would need more than 3
GiB; {SAMPLES} random inputs) gives the model back to {RECOVERED}. *spaces*: with parameters + blocks
without (heads). *free*: share of the parameters with an axis on a space. *shared*: share of the merged
network's parameters that both models use. *compiles*: torch.compile with aot_eager and fullgraph;
*exports*: torch.export; of the merged network, not tried after {PATIENCE} s. Seconds are of one core's
processor time: for `fxzip.inspect`, with the proof, with everything; in brackets wall-clock seconds of a
busy machine, from an earlier version of fxzip. MB: peak of the process. *no proof*: nothing was wrong, but
the output hardly moves, so nothing is proven and fxzip refuses."""


def _line(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{row[key]:.1e}" if isinstance(row.get(key), float) else "-"

    spaces = f"{row['spaces']} + {row['block_spaces']}" if "spaces" in row else "-"
    free = f"{100 * row['free']:.1f} %" if "free" in row else "-"
    why = "; ".join([*row.get("frozen", [])[:3], row.get("error", "")]).strip("; ").splitlines()
    cells = [row["name"], outcome(row), row.get("rung", "-"), row.get("nodes", "-"), spaces, free]
    cells += [number("proof_error"), number("sensitivity"), number("recovery_error")]
    cells += [f"{100 * row['shared']:.1f} %" if "shared" in row else "-"]
    cells += [{True: "yes", False: "no"}.get(row.get(way), "-") for way in ("compiles", "exports")]
    seconds = [row.get(k, "-") for k in ("inspect_seconds", "analysis_seconds", "seconds")]
    cells += seconds if "inspect_seconds" in row else [f"({s})" if s != "-" else s for s in seconds]
    cells += [row.get("megabytes", "-"), (why or [""])[0].replace("|", "/")[:160]]
    return "| " + " | ".join(map(str, cells)) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="torchvision,timm,transformers,toys")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of models")
    parser.add_argument("--limit", type=int, default=240, help="seconds per model (240)")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where COVERAGE.md and coverage.json go")
    parser.add_argument("--again", action="store_true", help="measure what is in the cache, too")
    parser.add_argument("--analysis", action="store_true", help="trace, infer and prove, but do not merge")
    parser.add_argument("--table", action="store_true", help="only write the documents")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no model after so many seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
