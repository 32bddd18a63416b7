"""Two, three, four and six networks into one: accuracy and FLOPs against the ensemble.

    python benchmarks/many_models.py --data ../shared/data --figure docs/figures/many-models.svg

Six ResNet-8 of different initialisations, five classes each: the first and the second half of MNIST, KMNIST and
Fashion-MNIST, at 14 pixels. With N networks the first N tasks count, joint accuracy over their classes. A run of one
number at a time (--counts 2 --out two.json) can be put together later: --rows two.json three.json --figure FILE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from common import Bench, Row, announce, draw, machine, options, parse, save, show
from data import concatenate, load
from nets import ResNet20
from tqdm import tqdm
from training import Recipe, train

SETS = ("mnist", "kmnist", "fashion-mnist")
COUNTS = (2, 3, 4, 6)
RECIPE = Recipe("sgd", 0.2, 4, 4000)
DEFAULT = ("average", "permute", "zip-beta1", "pair", "solve", "solve-1.33x")
CUTS = ("layer3", "layer2")  # solve again, up to here
CALIBRATION, TEST = 512, 500  # per task; per image set


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, methods=True)
    parser.add_argument("--width", type=int, default=1, help="times 16, 32, 64 channels")
    parser.add_argument("--counts", type=int, nargs="+", choices=range(2, 7), default=COUNTS, metavar="N")
    parser.add_argument("--figure", metavar="FILE", help="draw accuracy by number and by cost")
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="what earlier runs wrote with --out, instead")
    args = parse(parser, argv)
    args.calibration = args.calibration or CALIBRATION
    tables = read(args.rows) if args.rows else dict(run(args))
    if args.rows:
        print(summary(tables))
        return draw(figure(tables), args.figure) if args.figure else None
    notes = machine(args, **{
        "calibration per task": args.calibration,
        "test images per set": args.test or TEST,
        "training images per parent": RECIPE.adjusted(args).images,
        "epochs": RECIPE.adjusted(args).epochs,
    })  # fmt: skip
    named = [(f"{count} networks, ResNet-8 x{args.width}", rows) for count, rows in tables.items()]
    for title, rows in named:
        show(title, rows, [], notes)
    print("\n" + summary(tables))
    save(args.out, named, notes)
    if args.figure:
        draw(figure(tables), args.figure)


def read(paths: Sequence[str]) -> dict[int, list[Row]]:
    """count -> its rows, from files."""
    found: dict[int, list[Row]] = {}
    for path in paths:
        for title, rows in json.loads(Path(path).read_text())["tables"].items():
            found.setdefault(int(title.split()[0]), []).extend(Row(**row) for row in rows)
    return dict(sorted(found.items()))


def run(args: argparse.Namespace):
    """(count, its rows) for every count; parents' own rows are left out."""
    parts = [load(name, args.data, args.seed).halved().with_test(args.test or TEST, args.seed) for name in SETS]
    data = concatenate(parts)
    tasks = [[10 * s + 5 * half + k for k in range(5)] for half in (0, 1) for s in range(len(SETS))]
    parents = [
        train(f"resnet8x{args.width}", lambda: ResNet20(5, 1, args.width, 1), data, own, RECIPE, args.seed + k, args)[0]
        for k, own in enumerate(tasks[: max(args.counts)])
    ]
    for count in args.counts:
        own = sorted(c for classes in tasks[:count] for c in classes)
        bench = Bench.of(parents[:count], tasks[:count], data.only(own), count * args.calibration, args.seed)
        plan = [(m, m, None) for m in args.methods or DEFAULT]
        plan += [(f"solve until {cut}", "solve", cut) for cut in CUTS if not args.methods]
        found = [announce(bench.parent_rows([None] * count, [""] * count)[-1])]
        for name, method, cut in tqdm(plan, desc=f"{count} networks", leave=False, disable=None):
            found.append(announce(bench.merged(name, method, count * args.calibration, cut and {"until": cut})))
        yield count, [without_tasks(r) for r in found]


def without_tasks(row: Row) -> Row:
    """Six columns of tasks tell little."""
    return Row(**{**vars(row), "per_task": ()})


def summary(tables: dict[int, list[Row]]) -> str:
    """Mean / joint accuracy and FLOPs, a line per method, a column per number of networks."""
    lines = ["| | " + " | ".join(map(str, tables)) + " |", "| :-- |" + " --: |" * len(tables)]
    for k, first in enumerate(next(iter(tables.values()))):
        cells = [f"{r.mean:.1f} / {r.joint:.1f} ({r.flops:.2f}x)" if r.mean is not None and r.joint is not None else "-"
                 for r in (rows[k] for rows in tables.values())]  # fmt: skip
        lines.append(f"| {first.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(tables: dict[int, list[Row]]):
    """Left: mean accuracy by number of networks, each method at one network's cost. Right: what more FLOPs buy."""
    from fxzip.drawing import drawing

    made, (left, right) = drawing("many_models", 10, 4.2, columns=2)
    counts = list(tables)
    for k, first in enumerate(tables[counts[0]]):
        own = [tables[c][k] for c in counts]
        if first.name == "ensemble" or first.flops is not None and first.flops < 1.1:
            style = {"color": "0.4", "linestyle": ":"} if first.name == "ensemble" else {"color": f"C{k - 1}"}
            left.plot(counts, [r.mean for r in own], marker="o", markersize=4, label=first.name, **style)
    left.set_xticks(counts)
    left.set_xlabel("networks merged into one")
    left.set_ylabel("accuracy per task, %")
    left.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.68))
    for j, count in enumerate(counts):
        points = [r for r in tables[count] if r.name.startswith("solve") or r.name == "ensemble"]
        points.sort(key=lambda r: r.flops or 0)
        right.plot([r.flops for r in points], [r.mean for r in points], marker="o", markersize=4, color=f"C{j}",
                   label=f"{count} networks")  # fmt: skip
        right.annotate("ensemble", (points[-1].flops, points[-1].mean), (6, -3), textcoords="offset points",
                       fontsize=7, color=f"C{j}")  # fmt: skip
    right.margins(x=0.16)
    right.set_xlabel("FLOPs, times one network (solve: whole, wider, cut)")
    right.legend(frameon=False, fontsize=8)
    return made


if __name__ == "__main__":
    main()
