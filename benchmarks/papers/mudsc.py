"""MuDSC (Xu et al., CVPR 2024): ResNet-20 with GroupNorm, ResNet-26 and a ViT on halves of CIFAR-100.

    python benchmarks/papers/mudsc.py --workers 8                               # GPU: hours
    python benchmarks/papers/mudsc.py --data ../shared/data --reduced           # CPU: CIFAR-10, small networks

Rows: averaging; matching by activations, by weights and by both (the paper's), permuted and zipped; solve. The recipe
is ours (100 epochs; the paper's is not known to us in detail), so compare the order of rows, not digits. The landscape
between parents and merge: `python benchmarks/barrier.py --only plane --pair resnet20-gn --merge mudsc --figures DIR`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from paper import Merge, Recipe, Setting, main, nets
from tasks import halves
from torch import nn

from fxzip import MuDSC, Permute, Zip

ROWS = {"average": "average", "permute, activations": Permute(), "permute, weights": MuDSC(0.0, Permute()),
        "permute, both": MuDSC(0.5, Permute()), "zip, activations": Zip(beta=1.0), "zip, weights": MuDSC(0.0),
        "zip, both": MuDSC(0.5), "solve": "solve"}  # fmt: skip
SGD = Recipe("sgd", 0.1, 100, batch=500, rising=0.05, straight=True)
SMALL = Recipe("sgd", 0.1, 3, 2500)


def of(title: str, make: Callable[[int, bool], nn.Module], recipe: Recipe, small: Recipe):
    """make: (classes, reduced) -> a network."""

    def made(args: argparse.Namespace) -> Setting:
        if args.reduced:
            args.test = args.test or 500
        return Setting(
            f"{title}, {'CIFAR-10 5 + 5' if args.reduced else 'CIFAR-100 50 + 50'}", halves("cifar100", 100),
            lambda k: make(k, args.reduced), small if args.reduced else recipe,
            [Merge(name, {"method": method}) for name, method in ROWS.items()], f"mudsc-{title.split(',')[0]}",
            384 if args.reduced else 4096,
        )  # fmt: skip

    return made


def normed(classes: int, reduced: bool) -> nn.Module:
    return nets.ResNet20(classes, 3, 1 if reduced else 8, norm=nets.group_norm)


def vit(classes: int, reduced: bool) -> nn.Module:
    return nets.TinyViT(classes, 3, 32) if reduced else nets.TinyViT(classes, 3, 32, dim=384, depth=12, heads=6)


SETTINGS = {
    "resnet20-gn": of("ResNet-20 GN", normed, SGD, SMALL),
    "resnet26": of("ResNet-26", lambda k, small: nets.ResNet20(k, 3, 1 if small else 4, 4), SGD, SMALL),
    "vit": of("ViT", vit, Recipe("adamw", 1e-3, 200, batch=256, rising=0.05), Recipe("adamw", 2e-3, 3, 5000)),
}  # fmt: skip

if __name__ == "__main__":
    main(__doc__, SETTINGS)
