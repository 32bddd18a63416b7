"""Similarity x matcher x solver, on one pair of pairs.py: which combination to take.

    python benchmarks/combinations.py --pair vit --data ../shared/data --test 2000

Similarity: how the features of two models are compared, by their activations (1), their weights (0) or a mixture
(MuDSC's balance). Solver: the mean of the zipped weights; those with the least-squares unmerge; or the layers fitted in
order, solve. The default of fxzip.merge is 1, suited, solve; suited asks more of activations than similarities, so it
has no mixtures. Features are measured once for all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from common import Bench, Row, announce, machine, number, options, parse, save, show
from data import load
from pairs import PAIRS, bench_of
from tqdm import tqdm

import fxzip
from fxzip import MuDSC, Pair, Permute, Solve, Suited, Unmerge, Zip
from fxzip.match import Matcher

BALANCES = (1.0, 0.7, 0.5, 0.0)
MATCHERS: dict[str, Matcher] = {
    "permute": Permute(), "zip": Zip(), "zip-beta1": Zip(beta=1.0), "pair": Pair(), "suited": Suited(),
}  # fmt: skip
SOLVERS = ("zipped", "unmerge", "solve")
DEFAULT = (1.0, "suited", "solve")


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--dataset", choices=["fashion-mnist", "cifar10", "digits"], default="fashion-mnist")
    parser.add_argument("--split", type=int, default=0, metavar="SEED")
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help='some rows, such as "* solve"')
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="what earlier runs wrote with --out, instead")
    args = parse(parser, argv)
    if args.rows:
        return put_together(args.rows)
    args.calibration = args.calibration or 1024
    data = load(args.dataset, args.data).with_test(args.test, args.seed)
    bench, _ = bench_of(args, data, args.split, args.calibration)
    rows = bench.parent_rows([None, None], ["parent a", "parent b"])
    moments = fxzip.collect(bench.parents, bench.calibration.split(256), calibration=args.calibration, seed=args.seed,
                            progress=False)  # fmt: skip
    found = {}
    wanted = [c for c in combinations() if any(fnmatch(label(c), p) for p in args.only)]
    for balance, name, solver in tqdm(wanted, desc="merge", leave=False, disable=None):
        found[balance, name, solver] = announce(row(bench, moments, balance, name, solver))
    notes = machine(args, calibration=args.calibration, **{"test images": len(bench.images)})
    title = f"combinations: {args.pair}, {args.dataset}, split {args.split}"
    show(title, [*rows, *found.values()], ["a", "b"], notes)
    print("\n" + grid(found))
    if DEFAULT in found:
        print("\n" + verdict(found, len(bench.images)))
    save(args.out, [(title, [*rows, *found.values()])], notes)


def combinations():
    """(balance, matcher, solver) of every row."""
    for balance in BALANCES:
        for name in MATCHERS:
            if balance == 1 or name != "suited":
                yield from ((balance, name, s) for s in SOLVERS)


def row(bench: Bench, moments: fxzip.Moments, balance: float, name: str, solver: str) -> Row:
    """Merge and score one combination."""
    plain = MATCHERS[name]
    matcher = plain if balance == 1 else MuDSC(balance=balance, matcher=plain)
    method = {"zipped": lambda: matcher, "unmerge": lambda: Unmerge(matcher), "solve": lambda: Solve(matcher)}[solver]()
    zipped = fxzip.merge(bench.parents, bench.calibration.split(256), method=method, seed=bench.seed, verify=False,
                         calibration=len(bench.calibration), moments=moments, progress=False)  # fmt: skip
    return bench.row(label((balance, name, solver)), zipped)


def label(combination: tuple[float, str, str]) -> str:
    return "{:g} {} {}".format(*combination)


def put_together(paths: Sequence[str]) -> None:
    """The tables of runs that were divided by --only."""
    names = {label(c): c for c in combinations()}
    titles: dict[str, dict[tuple[float, str, str], Row]] = {}
    tests: dict[str, int] = {}
    for path in paths:
        content = json.loads(Path(path).read_text())
        for title, rows in content["tables"].items():
            tests[title] = int(content["notes"].partition("test images ")[2].split()[0])
            titles.setdefault(title, {}).update({names[r["name"]]: Row(**r) for r in rows if r["name"] in names})
    for title, found in titles.items():
        print(f"\n## {title}\n\n{grid(found)}\n\n{verdict(found, tests[title]) if DEFAULT in found else ''}")


def verdict(found: dict[tuple[float, str, str], Row], tests: int) -> str:
    """Where the default stands: by how much the best is ahead, in standard errors of one accuracy."""
    default = found[DEFAULT]
    parts = []
    for what in ("mean", "joint", "compared"):
        best = max(found, key=lambda k: getattr(found[k], what) or 0.0)
        own, top = getattr(default, what), getattr(found[best], what)
        error = (own * (100 - own) / tests) ** 0.5
        label = " ".join(map(str, best))
        parts.append(f"{what}: default {own:.1f}, best {top:.1f} ({label}), standard error {error:.1f}")
    return "; ".join(parts)


def grid(found: dict[tuple[float, str, str], Row]) -> str:
    """Mean / joint / compared accuracy, a line per similarity and solver, a column per matcher."""
    lines = ["| similarity | solver | " + " | ".join(MATCHERS) + " |", "| :-- | :-- |" + " --: |" * len(MATCHERS)]
    for solver in SOLVERS:
        for balance in BALANCES:
            cells = [found.get((balance, name, solver)) for name in MATCHERS]
            if any(cells):
                texts = [" / ".join(map(number, (c.mean, c.joint, c.compared))) if c else "" for c in cells]
                lines.append(f"| {balance:g} | {solver} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
