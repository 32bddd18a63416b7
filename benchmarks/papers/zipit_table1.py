"""ZipIt! (Stoica et al., ICLR 2024), table 1: CIFAR-10 5 + 5 and CIFAR-100 50 + 50 from different initialisations.

    python benchmarks/papers/zipit_table1.py --embeddings clip_cifar10.pt --setting cifar10     # GPU: an hour
    python benchmarks/papers/zipit_table1.py --data ../shared/data --reduced                    # CPU: 25 minutes

ResNet-20 x4 and x8 with embedding heads, x16 with cross-entropy; VGG with either. Recipe of the authors' repository:
100 epochs, batches of 500, SGD whose rate rises for 5 epochs and falls in a straight line (0.003 with embeddings). The
rate with cross-entropy, Nesterov momentum and clipped gradients are ours. Published: joint accuracy.
"""

from __future__ import annotations

import argparse

from paper import Merge, Recipe, Setting, main, nets
from tasks import halves

import fxzip

PAPER = Recipe("sgd", 0.003, 100, batch=500, rising=0.05, straight=True)
CROSS_ENTROPY = Recipe("sgd", 0.2, 100, batch=500, rising=0.05, straight=True)
REDUCED = Recipe("sgd", 0.1, 8, 5000)


def resnet(dataset: str, classes: int, width: int, embed: int, published: dict[str, str]):
    """A setting of ResNet-20; `published` by row."""

    def made(args: argparse.Namespace) -> Setting:
        prefix = "network." if embed else ""
        recipe = reduced(args) or (PAPER if embed else CROSS_ENTROPY)
        times, at_hand = 1 if args.reduced else width, "cifar10" if dataset == "cifar10" else "fashion-mnist"
        return Setting(
            f"{at_hand if args.reduced else dataset}, ResNet-20 x{times}, "
            f"{'embedding heads' if embed else 'cross-entropy'}", halves(dataset, classes, stand_in=at_hand),
            lambda k: nets.ResNet20(k, 3, times), recipe, merges(published, f"{prefix}layer3", f"{prefix}layer2"),
            f"resnet20x{times}-{dataset}", 512 if args.reduced else 4096, embed, joint(published, "ensemble"),
        )  # fmt: skip

    return made


def vgg(embed: int):
    """A setting of VGG-11 with batch norm."""

    def made(args: argparse.Namespace) -> Setting:
        width, prefix = 16 if args.reduced else 64, "network." if embed else ""
        return Setting(
            f"cifar10, VGG-11 from {width} channels, {'embedding heads' if embed else 'cross-entropy'}",
            halves("cifar10", 10), lambda k: nets.VGG11(k, 3, width, batch_norm=True),
            reduced(args) or (PAPER if embed else CROSS_ENTROPY),
            merges({}, f"{prefix}features.14", f"{prefix}features.8"), f"vgg11w{width}",
            512 if args.reduced else 4096, embed,
        )  # fmt: skip

    return made


def reduced(args: argparse.Namespace) -> Recipe | None:
    """The small recipe, and small tests, if that is wanted."""
    if args.reduced:
        args.test = args.test or 500
    return REDUCED if args.reduced else None


def merges(published: dict[str, str], late: str, early: str) -> list[Merge]:
    """Rows of the table; solve beside them."""
    zip_ = fxzip.Zip(alpha=0.3, beta=0.125)
    rows = {
        "average": {"method": "average"}, "rebasin": {"method": "rebasin"}, "permute": {"method": "permute"},
        "zip": {"method": zip_}, "zip, until the last stage": {"method": zip_, "until": late},
        "zip, until the one before": {"method": zip_, "until": early}, "solve": {"method": "solve"},
        "solve, until the last stage": {"method": "solve", "until": late},
    }  # fmt: skip
    return [Merge(name, options, joint(published, name)) for name, options in rows.items()]


def joint(published: dict[str, str], name: str) -> str:
    """As the column of the table has it: the paper gives joint accuracy here."""
    return f"- / {published[name]}" if name in published else ""


SETTINGS = {
    "cifar10": resnet("cifar10", 10, 4, 512, {
        "ensemble": "87.4", "average": "43.0", "rebasin": "46.2", "permute": "58.4", "zip": "79.1",
        "zip, until the last stage": "83.8"}),
    "cifar100": resnet("cifar100", 100, 8, 512, {
        "ensemble": "73.5", "average": "17.0", "rebasin": "40.9", "permute": "42.8", "zip": "54.9",
        "zip, until the last stage": "70.2"}),
    "cifar100-ce": resnet("cifar100", 100, 16, 0, {
        "ensemble": "60.5", "average": "2.7", "rebasin": "3.1", "permute": "20.0", "zip": "27.9",
        "zip, until the last stage": "38.6", "zip, until the one before": "47.0"}),
    "cifar10-vgg": vgg(0),
    "cifar10-vgg-embedded": vgg(512),
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, SETTINGS)
