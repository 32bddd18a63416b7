"""How fast, how large, how well shared: every figure next to what it is measured against, from one command.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --out speed.json

Each section is a process of its own (so that its peak memory is its own), and both sides of a ratio are timed in
it in turn, in CPU seconds of the process where one process does the work (run it with one thread), by the clock where
several do or where starting counts. Networks are untrained, inputs random: neither changes the work. --full adds the
long ones, --quick makes all of them so small that they only show that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from common import machine
from speed_sections import ENVIRONMENT, LONG, SECTIONS, Row, row

HERE = Path(__file__).resolve()


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    longer = "also n = 8,192, and ResNet-50 with 512 images"
    parser.add_argument("--full", action="store_true", help=longer)
    parser.add_argument("--quick", action="store_true", help="toy sizes: its figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *LONG], help="these sections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--section", choices=[*SECTIONS, *LONG], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.section:
        warnings.simplefilter("ignore")
        rows = list((SECTIONS | LONG)[args.section](args))
        print("\n" + json.dumps(rows))
        return
    rows = []
    print("| section | figure | value | asked for |\n| :-- | :-- | --: | --: |", flush=True)
    for name in args.only or [*SECTIONS, *(LONG if args.full else ())]:
        for found in _section(name, args):
            rows.append({"section": name, **found})
            print(_line(rows[-1]), flush=True)
    stages = [f"- {r['what']}: {', '.join(f'{k} {v}' for k, v in r['stages'].items())}" for r in rows if "stages" in r]
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    notes = machine(args).split("\n")
    print("\nSeconds by stage:\n\n" + "\n".join(stages) if stages else "", *["", *notes[:2]], sep="\n")
    print(f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else '?'} usable cores{load}")
    if args.out:
        Path(args.out).write_text(json.dumps({"rows": rows, "notes": notes[:2]}, indent=1))


def _section(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one section, run in a process of its own; a failed one is a row that says so."""
    command = [sys.executable, str(HERE), "--section", name, "--seed", str(args.seed), *(["--full"] * args.full)]
    command += ["--quick"] * args.quick
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT.get(name, {}))
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"ended by {done.returncode}"]  # -9: killed, for memory perhaps
        return [row(f"failed: {why[-1]}", float("nan"), "")]
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _line(r: Row) -> str:
    value = "" if r["value"] != r["value"] else f"{r['value']:.3g} {r['unit']}".strip()
    aim = f"{r['aim']} {'' if r['met'] else '**missed**'}".strip() if r["aim"] else ""
    return f"| {r['section']} | {r['what']} | {value} | {aim} |"


if __name__ == "__main__":
    main()
