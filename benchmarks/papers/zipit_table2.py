"""ZipIt! (Stoica et al., ICLR 2024), table 2: ImageNet-1k, 200 + 200 classes, ResNet-50, zipped up to a layer.

    python benchmarks/papers/zipit_table2.py --data DIR --workers 16         # DIR/imagenet/{train,val}/CLASS/*
    python benchmarks/papers/zipit_table2.py --data ../shared/data --reduced # CIFAR-10, a narrow ResNet-50

The first two of five consecutive fifths of the classes, as in the authors' configuration. Training: 90 epochs of SGD,
batches of 256, rate 0.1 (the usual one; the paper's parents were trained by others). Published: joint accuracy.
"""

from __future__ import annotations

import argparse

from paper import Merge, Recipe, Setting, main
from tasks import folder, halves
from torchvision.models.resnet import Bottleneck, ResNet

import fxzip

ZIP = fxzip.Zip(alpha=0.3, beta=0.125)
CUTS = {37: "layer3.5", 22: "layer3", 10: "layer2"}  # layers of 50 that are zipped -> the first that is not
PUBLISHED = {"average": "0.3", "rebasin": "3.1", "permute": "8.6", "zip 50/50": "8.6", "zip 37/50": "33.1",
             "zip 22/50": "55.8", "zip 10/50": "60.9"}  # fmt: skip


def setting(args: argparse.Namespace) -> Setting:
    rows = {"average": {"method": "average"}, "rebasin": {"method": "rebasin"}, "permute": {"method": "permute"},
            "zip 50/50": {"method": ZIP}}  # fmt: skip
    rows |= {f"zip {n}/50": {"method": ZIP, "until": cut} for n, cut in CUTS.items()}
    rows |= {"solve 50/50": {"method": "solve"}}
    rows |= {f"solve {n}/50": {"method": "solve", "until": cut} for n, cut in CUTS.items()}
    merges = [
        Merge(name, options, f"- / {PUBLISHED[name]}" if name in PUBLISHED else "") for name, options in rows.items()
    ]
    if args.reduced:
        args.test = args.test or 500
        return Setting("ResNet-50 of a quarter's inner width, CIFAR-10 5 + 5", halves("cifar10", 10), narrow,
                       Recipe("sgd", 0.05, 6, 8000), merges, "resnet50", 384)  # fmt: skip
    return Setting(
        "ImageNet-1k 200 + 200, ResNet-50", lambda a: [folder(a.data, "imagenet", range(s, s + 200)) for s in (0, 200)],
        lambda k: ResNet(Bottleneck, [3, 4, 6, 3], num_classes=k),
        Recipe("sgd", 0.1, 90, batch=256, rising=0.05, straight=True), merges, "resnet50", 4000, published="- / 63.3",
    )  # fmt: skip


def narrow(classes: int) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes=classes, width_per_group=16)


if __name__ == "__main__":
    main(__doc__, {"imagenet": setting})
