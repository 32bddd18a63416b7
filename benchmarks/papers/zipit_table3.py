"""ZipIt! (Stoica et al., ICLR 2024), table 3: four image sets, ResNet-50, in pairs and all four at once.

    python benchmarks/papers/zipit_table3.py --data DIR --pretrained a.pt b.pt c.pt d.pt --workers 16     # a GPU, a day
    python benchmarks/papers/zipit_table3.py --data ../shared/data --reduced              # 18 minutes of one core

DIR has stanford-dogs, oxford-pets, cub and nabirds as ImageFolders ({train,test}/CLASS/*; the pets also as
torchvision.datasets.OxfordIIITPet). --pretrained: ImageNet checkpoints of different trainings, one per set, from which
the parents are tuned (the paper's setting; without, they start at random). Published: mean accuracy per task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from paper import Merge, Recipe, Setting, main
from tasks import Task, folder, load, tensors
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import fxzip

SETS = ("stanford-dogs", "oxford-pets", "cub", "nabirds")
SMALL = ("mnist", "kmnist", "fashion-mnist", "cifar10")  # with --reduced, at 32 pixels
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
ZIP = fxzip.Zip(alpha=0.3, beta=0.125)
ROWS = {"average": {"method": "average"}, "permute": {"method": "permute"}, "zip": {"method": ZIP},
        "zip 22/50": {"method": ZIP, "until": "layer3"}, "zip 10/50": {"method": ZIP, "until": "layer2"},
        "solve": {"method": "solve"}, "solve 22/50": {"method": "solve", "until": "layer3"}}  # fmt: skip
NAMES = ("ensemble", "average", "permute", "zip", "zip 22/50", "zip 10/50")
PUBLISHED = {  # the mean over all pairs; all four at once
    2: dict(zip(NAMES, ("75.5", "11.3", "35.7", "37.1", "62.4", "68.7"), strict=True)),
    4: dict(zip(NAMES, ("75.5", "1.2", "15.3", "16.8", "45.5", "65.3"), strict=True)),
}


def of(members: Sequence[int]):
    """The setting of some of the four sets."""

    def made(args: argparse.Namespace) -> Setting:
        published = PUBLISHED[len(members)]
        merges = [
            Merge(n, options, f"{published[n]} / -" if n in published else "") for n, options in ROWS.items()
        ]
        starts = iter([args.pretrained[k] for k in members] if args.pretrained else [])

        def make(classes: int) -> nn.Module:
            blocks, width = ([2, 2, 2, 2], 16) if args.reduced else ([3, 4, 6, 3], 64)
            model = ResNet(Bottleneck, blocks, num_classes=classes, width_per_group=width)
            start = next(starts, None)
            if start is not None:
                found = {k.removeprefix("module."): v for k, v in torch.load(start, weights_only=True).items()}
                model.load_state_dict({k: v for k, v in found.items() if not k.startswith("fc.")}, strict=False)
            return model

        recipe = Recipe("sgd", 0.01, 30, batch=64)
        if args.reduced:
            args.test, recipe = args.test or 500, Recipe("sgd", 0.05, 6, 8000)
        names = [(SMALL if args.reduced else SETS)[k] for k in members]
        title = " + ".join(names) + (", ResNet-26 of a quarter's inner width" if args.reduced else ", ResNet-50")
        key, calibration = ("resnet26", 256 * len(members)) if args.reduced else ("resnet50", 4000)
        return Setting(title, lambda a: [images(a, n) for n in names], make, recipe, merges,
                       key, calibration, seeds=members, published=f"{published['ensemble']} / -")  # fmt: skip

    return made


def images(args: argparse.Namespace, name: str) -> Task:
    if not args.reduced:
        return folder(args.data, name)
    data = load(name, args.data)
    return tensors(data, range(10), name, size=32)


SETTINGS = {"-".join(SETS[k] for k in pair): of(pair) for pair in PAIRS} | {"all": of(range(4))}

if __name__ == "__main__":
    main(__doc__, SETTINGS)
