"""MNIST, KMNIST and Fashion-MNIST: three small networks become one network with three heads.

    python benchmarks/three_tasks.py --data ../shared/data

The networks start from different initialisations. Each task has 8,000 training images unless --train says
otherwise; joint accuracy is over all 30 classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import Bench, Row, announce, machine, options, parse, save, show
from data import Data, concatenate, load
from nets import ResNet20
from tqdm import tqdm
from training import Recipe, train

TASKS = ("mnist", "kmnist", "fashion-mnist")
RECIPE = Recipe("sgd", 0.2, 4, 8000)
DEFAULT = ("average", "permute", "zip", "zip-beta1", "solve")
CALIBRATION, TEST = 3072, 2000


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, methods=True)
    parser.add_argument("--width", type=int, default=1, help="times 16, 32, 64 channels")
    args = parse(parser, argv)
    args.calibration = args.calibration or CALIBRATION
    # As many test images of every task, or the largest test set would decide the joint accuracy.
    parts = [load(name, args.data, args.seed).with_test(args.test or TEST, args.seed) for name in TASKS]
    data = concatenate(parts)
    rows = run(args, data)
    notes = machine(args, **{
        "calibration": args.calibration,
        "test images": len(data.test[0]),
        "training images per parent": RECIPE.adjusted(args).images,
        "epochs": RECIPE.adjusted(args).epochs,
        "data": data.source,
    })  # fmt: skip
    title = f"Three tasks, ResNet-8 x{args.width}"
    show(title, rows, TASKS, notes)
    save(args.out, [(title, rows)], notes)


def run(args: argparse.Namespace, data: Data) -> list[Row]:
    """Train or load the three parents, then merge them with every method."""
    class_lists = [list(range(10 * k, 10 * k + 10)) for k in range(len(TASKS))]
    parents, seconds = [], []
    for k, classes in enumerate(class_lists):
        key, seed = f"resnet8x{args.width}", args.seed + k
        model, took = train(key, lambda: ResNet20(10, 1, args.width, 1), data, classes, RECIPE, seed, args)
        parents.append(model)
        seconds.append(took)
    bench = Bench.of(parents, class_lists, data, args.calibration, args.seed)
    rows = [announce(r) for r in bench.parent_rows(seconds, [f"{t} parent" for t in TASKS])]
    for method in tqdm(args.methods or DEFAULT, desc="merge", leave=False, disable=None):
        rows.append(announce(bench.merged(method, method, args.calibration)))
    return rows


if __name__ == "__main__":
    main()
