"""Attempts to make fxzip merge wrongly in silence, lose work, or take a damaged file: how many, and how many got by.

    OMP_NUM_THREADS=1 python benchmarks/trust.py --graphs 2000 --kills 50 --files 200 --mutants 2000

Random networks and the rest are those of tests/. Prints one Markdown table, a row as soon as it is known; what got by
goes to stderr with its seed. `--kills 0` and the like leave a row out; SIGTERM ends the row of random networks early.
Exit code 1 if anything got by. Mutants are tried by benchmarks/mutants.py, at random of all or all of them; one got by
that no test notices and mutants.txt does not explain.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine
from tqdm import tqdm

import fxzip

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

Row = tuple[str, int, str, int]  # what, tries, outcome in words, how many got by


def main(argv: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--graphs", type=int, default=1000, help="random networks: spaces, scramble, merge back")
    parser.add_argument("--kills", type=int, default=50, help="kill -9 while measuring, at random moments")
    parser.add_argument("--files", type=int, default=400, help="damaged files")
    parser.add_argument("--mutants", type=int, default=50, help="small changes of rules, spaces and solve, each")
    parser.add_argument("--keep", type=Path, help="folder for what mutants.py need not find out again")
    parser.add_argument("--no-inputs", action="store_true", help="leave out the table of bad inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of CPU for the random networks, at most")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| tried | times | outcome | got by | CPU s |\n|---|---|---|---|---|", flush=True)
    wrong, spent = 0, _cpu()
    for what, tries, outcome, by in _rows(options):
        print(f"| {what} | {tries:,} | {outcome} | {by} | {_cpu() - spent:.0f} |", flush=True)
        wrong, spent = wrong + by, _cpu()
    print("", *machine(options).splitlines()[:2], sep="\n")
    return int(wrong > 0)


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    if options.kills:
        yield kills(options.kills, options.seed)
    if options.files:
        yield from files(options.files, options.seed)
    if not options.no_inputs:
        yield inputs()
    for name in ("rules", "spaces", "solve") if options.mutants else ():
        yield mutants(name, options.mutants, options.seed, options.keep)
    if options.graphs:
        yield rules()
        yield graphs(options.graphs, options.seed, options.seconds)


def _cpu() -> float:
    """Seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


def graphs(count: int, seed: int, seconds: float) -> Row:
    """Spaces of random networks."""
    from graph_laws import judge
    from random_graphs import seeded

    found: collections.Counter[str] = collections.Counter()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    start = time.process_time()
    for k in tqdm(range(seed, seed + count), desc="graphs"):
        if stopped.is_set() or time.process_time() - start > seconds:
            break
        try:
            verdict = judge(seeded(k))
        except Exception as error:
            verdict = f"crashed: {type(error).__name__}: {error}"
        kind = verdict.split(":")[0]
        found[kind] += 1
        if kind not in ("sound", "refused"):
            print(f"graph {k}: {verdict.splitlines()[0]}", file=sys.stderr)
    unsound = found["unsound"] + found["scrambled"]
    lost = found["not recovered"] + found["crashed"]
    words = ", ".join(f"{n} {k}" for k, n in found.most_common())
    proven = "random networks: spaces proven, a scrambled copy merged back"
    return proven, sum(found.values()), words, unsound + lost


def mutants(name: str, count: int, seed: int, keep: Path | None) -> Row:
    """Small changes of one part of fxzip: which share is killed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "mutants.py"), name, "--sample", str(count), "--cpu", "60"]
    command += ["--seed", str(seed), *(["--keep", str(keep / f"{name}.json")] if keep else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    *lines, summary = done.stdout.strip().splitlines() or [""]
    found = re.match(r"(\d+) of (\d+) mutants: (\d+) killed \(([\d.]+%)\)(.*);", summary)
    if found is None:
        raise RuntimeError(f"mutants.py {name}: {summary} {done.stderr[-2000:]}")
    print(*lines, sep="\n", file=sys.stderr)
    tried, every, killed, share, rest = found.groups()
    left = sum(int(n) for n in re.findall(r"(\d+) (?:survives|unreached)", rest))
    return f"mutants of {name}, of {every}", int(tried), f"{killed} killed ({share}){rest}".rstrip(", "), left


def rules() -> Row:
    """Planted wrong rules: how many random networks until the proof fails."""
    from graph_laws import caught
    from planted import PLANTED, planted
    from random_graphs import seeded

    needed = []
    for name, ops, wrong in tqdm(PLANTED, desc="planted"):
        with planted(ops, wrong):
            needed.append(next((k + 1 for k in range(100) if caught(seeded(k))), 101))
            if needed[-1] > 100:
                print(f"planted: {name} was not caught", file=sys.stderr)
    at_most = f"caught after {max(needed)} networks at most"
    return "wrong rules planted", len(needed), at_most, sum(n > 100 for n in needed)


def inputs() -> Row:
    """The table of bad input: silently accepted, or ended by an exception that is not fxzip's."""
    from bad_inputs import CASES, outcome

    refused = wrong = 0
    for case in tqdm(CASES, desc="inputs"):
        torch.manual_seed(0)
        try:
            found = outcome(case)
        except Exception as error:
            found = f"{type(error).__name__}, not fxzip's"
        by = (found == "works") != case.works or "not fxzip's" in found
        wrong += by
        refused += not case.works and not by
        if by:
            print(f"input: {case.name}: {found}", file=sys.stderr)
    fine = sum(c.works for c in CASES)
    return "odd and wrong calls", len(CASES), f"{refused} refused, {fine} odd but right", wrong


def kills(count: int, seed: int) -> Row:
    """SIGKILL at random moments of a merge, again and again until it is done; then the bytes are compared."""
    from killing import job, killed_after

    generator = random.Random(seed)
    wanted = job(None)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        job(Path(folder, "timed"))
        whole = time.monotonic() - start
        wrong = hits = run = 0
        with tqdm(total=count, desc="kills") as bar:
            while hits < count:
                place, run = Path(folder, f"run{run}"), run + 1
                times = generator.randint(1, 3)  # of one merge, each going on from the last
                killed = sum(killed_after(generator.uniform(0, whole), place) for _ in range(min(times, count - hits)))
                hits += killed
                bar.update(killed)
                wrong += job(place) != wanted
    return "kill -9 at random moments of measuring, then resumed", hits, f"{run} merges, same bytes", wrong


def files(count: int, seed: int) -> list[Row]:
    """Damaged statistics, tensors and plans: taken, and not what was saved."""
    import killing

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        killing.job(folder)
        saved = folder / "saved"
        zipped = fxzip.merge(killing.nets(), killing.BATCHES[:4], method="zip", progress=False)
        fxzip.save(zipped, saved)
        x = killing.BATCHES[0]
        wanted = zipped(x)
        tries: list[tuple[Path, Any]] = [
            (folder / killing.resume.FILE, lambda: not killing.refused(folder)),
            (saved / "model.safetensors", lambda: _loads(saved, x, wanted)),
            (saved / "plan.json", lambda: _loads(saved, x, wanted)),
        ]
        for path, taken in tries:
            whole, by = path.read_bytes(), 0
            for k, data in enumerate(tqdm(killing.damaged(whole, count, seed), desc=path.name, total=count)):
                path.write_bytes(data)
                if taken():
                    by += 1
                    print(f"file: damaged {path.name}, number {k}, was taken", file=sys.stderr)
            path.write_bytes(whole)
            rows.append((f"damaged {path.name}", count, "refused, or the same network", by))
    return rows


def _loads(folder: Path, x: torch.Tensor, wanted: Any) -> bool:
    """Whether a damaged folder loads as a network that computes something else, or fails as no FxzipError."""
    import killing

    try:
        again = fxzip.load(folder, lambda: killing.nets()[0])
        return not all(torch.equal(a, b) for a, b in zip(again(x), wanted, strict=True))
    except fxzip.FxzipError:
        return False
    except Exception as error:
        print(f"file: {type(error).__name__}: {error}", file=sys.stderr)
        return True


if __name__ == "__main__":
    sys.exit(main())
