"""ZipIt! (Stoica et al., ICLR 2024), appendix: segmentation and classification in one network.

    python benchmarks/papers/zipit_segmentation.py --data DIR --pretrained a.pt b.pt --workers 16    # a GPU, a day
    python benchmarks/papers/zipit_segmentation.py --data ../shared/data --reduced                   # CPU: minutes

DIR has VOCdevkit (torchvision.datasets.VOCSegmentation, 2012) and imagenet/{train,val}/CLASS/*. Both networks are a
ResNet-50; the segmenter dilates its last stage and ends in DeepLabV3's head, so layer4 is never shared. --pretrained:
state_dicts of torchvision's ResNet-50 from which the two are tuned. Reduced: garments (Fashion-MNIST) that lie on
photographs (CIFAR-10) are segmented, photographs classified, by two ResNet-20 whose whole trunks are alike. Task 0 is
the mean IoU over classes and background, task 1 the accuracy, both in percent. The paper's figures are not printed
beside: its parents were trained on other images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from paper import Merge, Recipe, Setting, batches_of, main, nets
from tasks import IMAGENET, Task, folder, load, tensors
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.models import resnet50
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.transforms import v2

import fxzip

ITEM = 20  # pixels of a garment, on a photograph of 32
ZIP = fxzip.Zip(alpha=0.3, beta=0.125)
METHODS: Mapping[str, Any] = {"average": "average", "permute": "permute", "zip": ZIP, "solve": "solve"}


def setting(args: argparse.Namespace) -> Setting:
    cuts = ("head" if args.reduced else "trunk.layer4", "trunk.layer3", "trunk.layer2")
    merges = [Merge(f"{name}, until {cut}", {"method": m, "until": cut}) for cut in cuts for name, m in METHODS.items()]
    if args.reduced:
        args.test = args.test or 500
        ends = iter((lambda: Network(small(), masks(64)), lambda: Network(small(), labels(64, 10))))
        return Setting("Garments on photographs + CIFAR-10, ResNet-20", lambda a: [scenes(a), photographs(a)],
                       lambda _: next(ends)(), Recipe("sgd", 0.1, 6, 2500), merges, "segmentation20", 512,
                       score=score)  # fmt: skip
    ends = iter((lambda: Network(large(args, 0, dilated=True), deeplab(21)),
                 lambda: Network(large(args, 1), labels(2048, 1000))))  # fmt: skip
    return Setting("VOC 2012 + ImageNet-1k, ResNet-50", lambda a: [voc(a), folder(a.data, "imagenet")],
                   lambda _: next(ends)(), Recipe("sgd", 0.01, 30, batch=16), merges, "segmentation50", 4000,
                   score=score)  # fmt: skip


# --------------------------------------------------------------------------------------------- networks


class Network(nn.Module):
    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def small() -> nn.Module:
    net = nets.ResNet20(1)
    net.avgpool = net.linear = nn.Identity()  # type: ignore[assignment]
    return _Maps(net.conv1, net.bn1, nn.ReLU(), net.layer1, net.layer2, net.layer3)


def large(args: argparse.Namespace, which: int, dilated: bool = False) -> nn.Module:
    net = resnet50(replace_stride_with_dilation=[False, False, dilated])
    if args.pretrained:
        net.load_state_dict(torch.load(args.pretrained[which], weights_only=True))
    return _Maps(net.conv1, net.bn1, nn.Sequential(net.relu, net.maxpool), net.layer1, net.layer2, net.layer3,
                 net.layer4)  # fmt: skip


class _Maps(nn.Sequential):
    """A residual network up to its last feature maps."""

    def __init__(self, conv1: nn.Module, bn1: nn.Module, relu: nn.Module, *stages: nn.Module):
        super().__init__()
        for name, part in {"conv1": conv1, "bn1": bn1, "relu": relu}.items():
            self.add_module(name, part)
        for k, stage in enumerate(stages, 1):
            self.add_module(f"layer{k}", stage)


def masks(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 11, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


def deeplab(classes: int) -> nn.Module:
    return nn.Sequential(DeepLabHead(2048, classes), nn.Upsample(scale_factor=16, mode="bilinear"))


def labels(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# ------------------------------------------------------------------------------------------------ tasks


class Masked(Dataset):
    """(image [3, h, w], class of every pixel [h, w]); training images are mirrored at random."""

    def __init__(self, images: Tensor, classes: Tensor, mirrored: bool = False):
        self.images, self.classes, self.mirrored = images, classes, mirrored

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        x, y = self.images[k], self.classes[k]
        return (x.flip(-1), y.flip(-1)) if self.mirrored and torch.rand(()) < 0.5 else (x, y)


def scenes(args: argparse.Namespace) -> Task:
    """A garment at a random place of every photograph; its class is the class of its pixels, 0 of all others."""
    photos, garments = load("cifar10", args.data), load("fashion-mnist", args.data)
    generator = torch.Generator().manual_seed(args.split)
    parts = []
    for (back, _), (front, kinds) in ((photos.train, garments.train), (photos.test, garments.test)):
        n = min(len(back), len(front))
        items = v2.functional.resize(front[:n], [ITEM, ITEM], antialias=True)
        canvas = torch.zeros(n, 1, 32, 32, dtype=torch.uint8)
        for k, (y, x) in enumerate(torch.randint(0, 33 - ITEM, (n, 2), generator=generator).tolist()):
            canvas[k, :, y : y + ITEM, x : x + ITEM] = items[k]
        shown = canvas > 38  # of 255
        images = photos.normalise(torch.where(shown, canvas, back[:n]))
        parts.append((images, torch.where(shown[:, 0], kinds[:n, None, None] + 1, 0)))
    train, test = parts
    return Task("masks", Masked(*train, mirrored=True), Unlabelled(Masked(*train)), Masked(*test), 11)


def photographs(args: argparse.Namespace) -> Task:
    task = tensors(load("cifar10", args.data), range(10), "labels")
    return Task(task.name, task.train, Unlabelled(task.plain), task.test, task.classes)


class Unlabelled(Dataset):
    """Calibration images: masks and labels do not fit into one batch, and nobody reads them."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> Tensor:
        return self.images[k][0]


def voc(args: argparse.Namespace, side: int = 224) -> Task:
    """20 classes and background; pixels that nobody labelled count for nothing."""
    norm = [v2.ToImage(), v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
            v2.Normalize(*IMAGENET)]  # fmt: skip
    moved = v2.Compose([v2.RandomResizedCrop(side, (0.5, 1.0)), v2.RandomHorizontalFlip(), *norm])
    still = v2.Compose([v2.Resize(side), v2.CenterCrop(side), *norm])
    parts = [(image_set, t) for image_set, t in (("train", moved), ("train", still), ("val", still))]
    train, plain, test = (_Voc(datasets.VOCSegmentation(args.data, image_set=name), t) for name, t in parts)
    return Task("masks", train, Unlabelled(plain), test, 21)


class _Voc(Dataset):
    def __init__(self, images: Any, transform: v2.Compose):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        image, mask = self.images[k]
        x, y = self.transform(image, tv_tensors.Mask(mask))
        y = y.squeeze(0).long()
        return x, torch.where(y == 255, -100, y)


# ---------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scores:
    per_task: tuple[float, ...]
    mean: float
    joint: None = None


@torch.no_grad()
def score(network: nn.Module, tasks: Sequence[Task], args: argparse.Namespace) -> Scores:
    """Mean IoU of the masks and accuracy of the labels, in percent, from the counts of (class, prediction)."""
    found = []
    for k, task in enumerate(tasks):
        counts = torch.zeros(task.classes, task.classes, dtype=torch.int64)
        for x, y in batches_of(task, args):
            predicted, known = network(x.to(args.device))[k].argmax(1).cpu(), y >= 0
            pairs = task.classes * y[known] + predicted[known]
            counts += torch.bincount(pairs, minlength=task.classes**2).view_as(counts)
        right, either = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
        found.append(100 * float((right / either)[either > 0].mean() if y.dim() > 1 else right.sum() / counts.sum()))
    return Scores(tuple(found), sum(found) / len(found))


if __name__ == "__main__":
    main(__doc__, {"segmentation": setting})
