"""The papers' tasks: images from disk or of sets that fit into memory, and how training moves them about."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Data, load  # noqa: E402

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Task:
    """Datasets of (image [3, h, w], label in 0..classes - 1); plain: the training images without augmentation."""

    name: str
    train: Dataset
    plain: Dataset
    test: Dataset
    classes: int


class Labelled(Dataset):
    """Some items of a dataset, labels counted anew, by `transform`."""

    def __init__(self, images: Any, items: Sequence[int], labels: Mapping[int, int], transform: Callable):
        self.images, self.items, self.labels, self.transform = images, items, labels, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        image, label = self.images[self.items[k]]
        return self.transform(image), self.labels[int(label)]


def tensors(data: Data, classes: Sequence[int], name: str, size: int | None = None) -> Task:
    """A task of an image set that fits into memory; three channels; shifted by 4 pixels and mirrored in training."""
    plain = [v2.Resize(size, antialias=True)] if size else []
    to = [*plain, v2.Lambda(lambda x: data.normalise(x[None])[0].expand(3, -1, -1))]
    side = size or data.shape[1]
    moved = [v2.RandomCrop(side, padding=side // 8), *([v2.RandomHorizontalFlip()] if data.flip else [])]
    return _task(name, _Pairs(*data.train), _Pairs(*data.test), classes, v2.Compose([*plain, *moved, to[-1]]),
                 v2.Compose(to))  # fmt: skip


class _Pairs(Dataset):
    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.targets = images, labels.tolist()

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        return self.images[k], self.targets[k]

    def __len__(self) -> int:
        return len(self.targets)


def folder(root: str | None, name: str, classes: Sequence[int] | None = None, size: int = 224) -> Task:
    """A task of DIR/name/{train,val or test}/CLASS/*, or of what torchvision.datasets calls it, at `size` pixels."""
    norm = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
    moved = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *norm])
    still = v2.Compose([v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size), *norm])
    if root is None:
        raise SystemExit(f"{name} is not downloaded: give --data DIR, with {name}/train/CLASS/* and its like in test")
    base = Path(root) / name
    test = next((base / part for part in ("test", "val") if (base / part).is_dir()), None)
    if test is not None and (base / "train").is_dir():
        train, held = datasets.ImageFolder(str(base / "train")), datasets.ImageFolder(str(test))
    elif name == "imagenet":
        train, held = datasets.ImageNet(root, "train"), datasets.ImageNet(root, "val")
    elif name == "oxford-pets":
        train, held = _targets(datasets.OxfordIIITPet(root, "trainval")), _targets(datasets.OxfordIIITPet(root, "test"))
    else:
        raise SystemExit(f"--data {root}: no {name}/train and {name}/test, one folder per class in each")
    return _task(name, train, held, classes or sorted(set(train.targets)), moved, still)


def _targets(dataset: Any) -> Any:
    dataset.targets = dataset._labels
    return dataset


def _task(name: str, train: Any, test: Any, classes: Sequence[int], moved: Callable, still: Callable) -> Task:
    labels = {int(c): k for k, c in enumerate(classes)}
    own = [[k for k, c in enumerate(part.targets) if int(c) in labels] for part in (train, test)]
    return Task(name, Labelled(train, own[0], labels, moved), Labelled(train, own[0], labels, still),
                Labelled(test, own[1], labels, still), len(labels))  # fmt: skip


def halves(
    name: str, classes: int, tasks: int = 2, stand_in: str = "cifar10"
) -> Callable[[argparse.Namespace], list[Task]]:
    """A random split of an image set's classes; with --reduced of those of `stand_in`, which has ten."""

    def made(args: argparse.Namespace) -> list[Task]:
        data = load(stand_in if args.reduced else name, args.data)
        order = torch.randperm(10 if args.reduced else classes, generator=torch.Generator().manual_seed(args.split))
        size = len(order) // tasks
        return [tensors(data, sorted(own.tolist()), f"task {k}") for k, own in enumerate(order.split(size)[:tasks])]

    return made
