"""Two ResNet-20 on disjoint halves of CIFAR-10: every method, full and cut, beside the published code.

    python benchmarks/cifar_pair.py --data ../shared/data --checkpoints a.pt b.pt

A checkpoint is a dict with "width", "classes" (of this half, in order of the logits) and "state_dict".
Without --checkpoints, two networks are trained first (width 2, 20 epochs each: hours on two cores).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import Bench, Mirrored, Row, announce, machine, options, parse, save, show
from data import load
from nets import ResNet20
from torch import nn
from tqdm import tqdm
from training import Recipe, train

from fxzip.evaluate import Ensemble

HALVES = ([0, 1, 2, 8, 9], [3, 4, 5, 6, 7])
RECIPE = Recipe("sgd", 0.2, 20)
PUBLISHED_IMAGES, SOLVE_IMAGES = 16 * 256, 2048

# (method, until): per-task mean / joint of the authors' own code on one pair of 2x-wide networks trained for
# this project, 4,096 training images for alignment and batch-norm reset, all 10,000 test images. They are
# anchors for that pair (cifar10_resnet20x2_{a,b}.pt), not for others. "*": on 2,500 test images.
PUBLISHED = {
    ("ensemble", None): "90.6 / 76.8",
    ("average", None): "51.5 / 33.1",
    ("permute", None): "78.5 / 51.4",
    ("rebasin-order", None): "49.3 / 25.7",
    ("cca", None): "72.3 / 43.5",
    ("mudsc-permute", None): "78.8 / 52.7 *",
    ("mudsc-0", None): "83.5 / 65.5",
    ("mudsc", None): "83.4 / 66.2",
    ("mudsc-0.7", None): "84.2 / 65.9",
    ("zip", None): "78.2 / 53.8",
    ("zip-beta1", None): "83.2 / 63.4",
    ("permute", "layer3"): "84.9 / 66.5",
    ("zip-beta1", "layer3"): "85.7 / 69.2",
    ("permute", "layer2"): "88.6 / 73.2 *",
    ("zip-beta1", "layer2"): "88.5 / 73.1 *",
}
ANCHORED = {"cifar10_resnet20x2_a.pt", "cifar10_resnet20x2_b.pt"}
FOOTNOTE = "published: the authors' code on the project's own pair, 10,000 test images; *: 2,500."
FULL = (
    "average", "rebasin-order", "rebasin", "c2m3", "permute", "permute+repair", "zip", "zip-beta1", "zip-beta1+repair",
    "pair", "transport", "cca", "mudsc-permute", "mudsc-0", "mudsc-0.3", "mudsc",
    "mudsc-0.7", "select", "solve", "solve-1.15x", "solve-1.33x", "solve-select", "solve-select-1.33x",
)  # fmt: skip
CUT = ("permute", "zip-beta1", "select", "solve", "solve-select", "distill", "distill-mirror", "distill-mirror-bf16",
    "distill-mirror-many", "distill-mirror-outputs",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, methods=True)
    parser.add_argument("--checkpoints", nargs=2, metavar="FILE", help="the two networks")
    parser.add_argument("--until", nargs="*", default=["layer3", "layer2"], help="also merge only up to here")
    parser.add_argument("--since", nargs="*", default=[], help="also merge only from here on, stems per model")
    parser.add_argument("--cut-only", action="store_true", help="leave out the merges of whole networks")
    args = parse(parser, argv)
    bench, source, seconds = bench_of(args, args.calibration or PUBLISHED_IMAGES)
    rows = run(bench, args, seconds)
    notes = machine(args, **{
        "test images": len(bench.images),
        "calibration": args.calibration or f"{PUBLISHED_IMAGES} ({SOLVE_IMAGES} for solve)",
        "data": source,
    })  # fmt: skip
    title = "CIFAR-10, 5 + 5 classes, two ResNet-20"
    show(title, rows, [" ".join(map(str, own)) for own in bench.class_lists],
         f"{notes}\n{FOOTNOTE}" if anchored(args) else notes)  # fmt: skip
    save(args.out, [(title, rows)], notes)


def run(bench: Bench, args: argparse.Namespace, seconds: Sequence[float | None]) -> list[Row]:
    """Parents, ensemble, then every method, full and cut."""
    rows = bench.parent_rows(seconds, ["parent a", "parent b"])
    published = PUBLISHED if anchored(args) else {}
    rows[-1] = replace(rows[-1], published=published.get(("ensemble", None), ""))
    wanted = args.methods or FULL
    if any("mirror" in m for m in wanted):
        rows.append(bench.row("ensemble, on mirror images too", Mirrored(Ensemble(list(bench.parents))).eval()))
    for row in rows:
        announce(row)
    cuts = [(key, at) for key in ("until", "since") for at in getattr(args, key)]
    plan: list[tuple[str, dict[str, str]]] = [(m, {}) for m in wanted if not args.cut_only]
    plan += [(m, {key: at}) for key, at in cuts for m in CUT if m in wanted]
    for method, cut in tqdm(plan, desc="merge", leave=False, disable=None):
        count = args.calibration or (SOLVE_IMAGES if method.startswith(("solve", "distill")) else PUBLISHED_IMAGES)
        name = ", ".join([method, *(f'{key}="{at}"' for key, at in cut.items())])
        figures = "" if "since" in cut else published.get((method, cut.get("until")), "")
        rows.append(announce(bench.merged(name, method, count, cut, published=figures)))
    return rows


def bench_of(args: argparse.Namespace, count: int) -> tuple[Bench, str, list[float | None]]:
    """The pair with `count` calibration images, where the images are from, and seconds of training."""
    data = load("cifar10", args.data).with_test(args.test, args.seed)
    parents, classes, seconds = parents_of(args, data)
    return Bench.of(parents, classes, data, count, args.seed), data.source, seconds


def anchored(args: argparse.Namespace) -> bool:
    """Whether the networks are those that the published figures are for."""
    return {Path(path).name for path in args.checkpoints or ()} == ANCHORED


def parents_of(args: argparse.Namespace, data) -> tuple[list[nn.Module], list[list[int]], list[float | None]]:
    """The two networks, the classes of their logits, and seconds of training if they were trained here."""
    if args.checkpoints:
        found = [torch.load(path, weights_only=True) for path in args.checkpoints]
        models: list[nn.Module] = []
        for ck in found:
            model = ResNet20(len(ck["classes"]), width=ck["width"])
            model.load_state_dict(ck["state_dict"])
            models.append(model.eval())
        return models, [list(ck["classes"]) for ck in found], [None, None]
    trained = [
        train("resnet20x2", lambda: ResNet20(5, width=2), data, own, RECIPE, args.seed + k, args)
        for k, own in enumerate(HALVES)
    ]
    return [m for m, _ in trained], [list(h) for h in HALVES], [s for _, s in trained]


if __name__ == "__main__":
    main()
