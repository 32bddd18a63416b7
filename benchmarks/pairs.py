"""Pairs of small networks of one architecture, different initialisations, disjoint halves of the classes.

    python benchmarks/pairs.py --pair vit --data ../shared/data
    python benchmarks/pairs.py --pair resnet20-gn --dataset cifar10 --split 0 1 --epochs 10

Every --split seed draws another 5 + 5 split and other initialisations; several print mean and spread as well.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from common import Bench, Row, announce, machine, options, parse, save, show
from data import Data, load
from nets import VGG11, ResNet20, TinyConvNeXt, TinyViT, group_norm, tiny_swin
from torch import nn
from tqdm import tqdm
from training import Recipe, train

# name -> (classes, channels, image size) -> network, and how it is trained
PAIRS: dict[str, tuple[Callable[[int, int, int], nn.Module], Recipe]] = {
    "resnet20": (lambda k, c, s: ResNet20(k, c), Recipe("sgd", 0.2, 3, 12_000)),
    "resnet20-gn": (lambda k, c, s: ResNet20(k, c, norm=group_norm), Recipe("sgd", 0.1, 3, 12_000)),
    "vgg11": (lambda k, c, s: VGG11(k, c), Recipe("sgd", 0.03, 4, 12_000)),
    "vgg11-bn": (lambda k, c, s: VGG11(k, c, batch_norm=True), Recipe("sgd", 0.1, 3, 12_000)),
    "vit": (lambda k, c, s: TinyViT(k, c, s), Recipe("adamw", 2e-3, 3)),
    "swin": (lambda k, c, s: tiny_swin(k, c, s), Recipe("adamw", 2e-3, 3)),
    "convnext": (lambda k, c, s: TinyConvNeXt(k, c), Recipe("adamw", 2e-3, 2, 20_000)),
}
DEFAULT = ("average", "permute", "zip", "zip-beta1", "select", "solve", "solve-select")
CALIBRATION = 2048


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, methods=True)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--dataset", choices=["fashion-mnist", "cifar10", "digits"], default="fashion-mnist")
    parser.add_argument("--split", type=int, nargs="+", default=[0], metavar="SEED", help="one run per seed")
    args = parse(parser, argv)
    data = load(args.dataset, args.data).with_test(args.test, args.seed)
    args.calibration = args.calibration or CALIBRATION
    tables = []
    for split in args.split:
        rows = run(args, data, split)
        notes = machine(args, **facts(args, data))
        title = "{}, {}, split {}: {} + {}".format(args.pair, args.dataset, split, *split_classes(split))
        show(title, rows, ["a", "b"], notes)
        tables.append((title, rows))
    notes = machine(args, **facts(args, data))
    if len(tables) > 1:
        print(f"\n## {args.pair}, {args.dataset}, splits {args.split}: mean and standard deviation\n")
        print(summary([rows for _, rows in tables]))
    save(args.out, tables, notes)


def facts(args: argparse.Namespace, data: Data) -> dict:
    recipe = PAIRS[args.pair][1].adjusted(args)
    return {
        "calibration": args.calibration,
        "test images": len(data.test[0]),
        "epochs": recipe.epochs,
        "training images per parent": recipe.images or "all",
        "data": data.source,
    }


def split_classes(seed: int, classes: int = 10) -> tuple[list[int], list[int]]:
    """A random half of the classes, and the other."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: classes // 2]), sorted(order[classes // 2 :])


def bench_of(args: argparse.Namespace, data: Data, split: int, count: int) -> tuple[Bench, list[float]]:
    """--pair, trained or loaded, with `count` calibration images; and the seconds that each took to train."""
    (build, recipe), (channels, size), halves = PAIRS[args.pair], data.shape, split_classes(split)
    trained = [
        train(args.pair, lambda: build(5, channels, size), data, own, recipe, 100 * split + k + 1, args)
        for k, own in enumerate(halves)
    ]
    return Bench.of([m for m, _ in trained], halves, data, count, args.seed), [s for _, s in trained]


def run(args: argparse.Namespace, data: Data, split: int) -> list[Row]:
    """Merge the pair with every method."""
    bench, seconds = bench_of(args, data, split, args.calibration)
    rows = [announce(r) for r in bench.parent_rows(seconds, ["parent a", "parent b"])]
    for method in tqdm(args.methods or DEFAULT, desc="merge", leave=False, disable=None):
        rows.append(announce(bench.merged(method, method, args.calibration)))
    return rows


def summary(tables: Sequence[Sequence[Row]]) -> str:
    """Mean and standard deviation over splits, of the rows that all of them have figures for."""
    kinds = ("mean", "joint", "compared")
    lines = [f"| network | {' | '.join(kinds)} |", "| :-- | --: | --: | --: |"]
    for rows in zip(*tables, strict=True):
        columns = [[getattr(r, kind) for r in rows] for kind in kinds]
        if all(value is not None for column in columns for value in column):
            lines.append(f"| {rows[0].name} | {' | '.join(map(_spread, columns))} |")
    return "\n".join(lines)


def _spread(values: Sequence) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
