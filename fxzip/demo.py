"""`fxzip demo`: two small networks trained on disjoint digits, merged with every method, in one table.

Data: scikit-learn's digits (1,797 images of 8 x 8 pixels, shipped with that package), split once into
training, calibration and test images. Network a learns 0 to 4, network b learns 5 to 9, from different
initialisations. Merging sees the calibration images and no label.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError
from .evaluate import Accuracy, Cost, Ensemble, accuracy, cost
from .trace.guards import seeded

CLASSES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
TRAIN, CALIBRATION = 800, 397  # the other 600 images are the test set
CUTS = ("layer2", "layer3")


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class DigitNet(nn.Module):
    """images [n, 1, 8, 8] -> logits [n, classes]"""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """images: float32 [n, 1, 8, 8], standardised; labels: int64 [n]; calibration images have none."""

    train: tuple[Tensor, Tensor]
    calibration: Tensor
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One network of the table; per_task holds None for a task it does not do."""

    name: str
    per_task: tuple[float | None, ...]
    joint: float | None
    cost: Cost
    seconds: float | None  # to train it, or to merge it


def main(seed: int = 0, width: int = 16, epochs: int = 30, progress: bool = True) -> tuple[Row, ...]:
    """Run the demo and print its table."""
    if width < 1 or epochs < 1:
        raise InputError(f"fxzip demo: width {width} and epochs {epochs} must be at least 1")
    data, threads = digits(seed), torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small run no faster on two, and much slower beside other work
    try:
        rows = run(data, seed, width, epochs, progress)
        print(render(rows))
        print(f"\n{notes(data, seed, width, epochs)}")
    finally:
        torch.set_num_threads(threads)
    return rows


def run(data: Digits, seed: int, width: int, epochs: int, progress: bool) -> tuple[Row, ...]:
    """Train, merge and evaluate: a row per parent, the ensemble and each merge."""
    parents, rows = [], []
    for task, name in enumerate("ab"):
        start = time.perf_counter()
        model = train(data, CLASSES[task], 1000 * seed + task, width, epochs, progress, f"train {name}")
        parents.append(model)
        rows.append(_parent_row(name, task, model, data, time.perf_counter() - start))
    rows.append(_row("ensemble", Ensemble(parents).eval(), data, None))
    plan = tqdm(list(_plan()), desc="merge", disable=not progress, leave=False)
    for name, options in plan:
        plan.set_postfix_str(name)
        start = time.perf_counter()
        zipped = merge(parents, data.calibration, seed, options)
        rows.append(_row(name, zipped, data, time.perf_counter() - start))
    return tuple(rows)


def merge(parents: list[DigitNet], calibration: Tensor, seed: int, options: dict[str, Any]) -> nn.Module:
    """The one line this demo is about."""
    import fxzip

    return fxzip.merge(
        parents, calibration.split(100), calibration=len(calibration), seed=seed, progress=False, **options
    )


def digits(seed: int) -> Digits:
    """scikit-learn's digits, shuffled by `seed` and split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError('fxzip demo needs scikit-learn: pip install "fxzip[demo]"') from error
    raw, target = load_digits(return_X_y=True)
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(raw).float()[order].view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(target).long()[order]
    images = (images - images[:TRAIN].mean()) / images[:TRAIN].std()
    held_out = TRAIN + CALIBRATION
    return Digits(
        (images[:TRAIN], labels[:TRAIN]), images[TRAIN:held_out], (images[held_out:], labels[held_out:])
    )


def train(
    data: Digits, classes: Sequence[int], seed: int, width: int, epochs: int, progress: bool, name: str
) -> DigitNet:
    """A DigitNet on the training images of `classes`, shifted by up to a pixel, in eval mode.

    The global random state is as before afterwards.
    """
    images, labels = data.train
    own = torch.isin(labels, torch.tensor(classes))
    images, labels = images[own], torch.searchsorted(torch.tensor(classes), labels[own])
    with seeded(seed):
        model = DigitNet(width, len(classes))
        steps = epochs * -(-len(images) // 64)
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=steps)
        for pick in tqdm(list(_batches(len(images), epochs)), desc=name, disable=not progress, leave=False):
            dy, dx = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(model(images[pick].roll((dy, dx), (2, 3))), labels[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def render(rows: Sequence[Row]) -> str:
    """The table; costs also relative to the first row, one network."""
    one = rows[0].cost
    header = ("network", "0-4 %", "5-9 %", "mean %", "joint %", "parameters", "FLOPs", "seconds")
    body = [
        (
            row.name,
            *map(_number, row.per_task),
            _number(_mean(row.per_task)),
            _number(row.joint),
            f"{row.cost.parameters:,} ({row.cost.parameters / one.parameters:.2f}x)",
            f"{row.cost.flops / 1e6:.2f} M ({row.cost.flops / one.flops:.2f}x)",
            _number(row.seconds, 2),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for name, *cells in (header, *body)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def notes(data: Digits, seed: int, width: int, epochs: int) -> str:
    """What one needs to know to repeat and to judge the table."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return "\n".join(
        (
            "0-4, 5-9: own test images, own head.",
            f"joint: all {len(data.test[1])} test images, arg max over both heads.",
            "FLOPs: one image. seconds: to train (a, b) or to merge, verification included.",
            f"Merging saw {len(data.calibration)} calibration images and no label.",
            f"seed {seed}, width {width}, {epochs} epochs, {TRAIN} training images;",
            f"torch {torch.__version__}, Python {platform.python_version()},",
            f"{machine}, {torch.get_num_threads()} threads.",
        )
    )


def _plan() -> Iterator[tuple[str, dict[str, str]]]:
    """Every method, full and cut."""
    import fxzip

    for method in fxzip.METHODS:
        yield ("plain averaging" if method == "average" else method), {"method": method}
    for method in fxzip.METHODS:
        if method != "average":
            for cut in CUTS:
                yield f'{method}, until="{cut}"', {"method": method, "until": cut}


def _batches(count: int, epochs: int) -> Iterator[Tensor]:
    """Shuffled batches of 64 out of `count` samples."""
    for _ in range(epochs):
        yield from torch.randperm(count).split(64)


def _row(name: str, model: nn.Module, data: Digits, seconds: float | None) -> Row:
    scores: Accuracy = accuracy(model, CLASSES, *data.test)
    return Row(name, scores.per_task, scores.joint, cost(model, data.test[0][:1]), seconds)


def _parent_row(name: str, task: int, model: DigitNet, data: Digits, seconds: float) -> Row:
    classes = CLASSES[task]
    own = accuracy(lambda x: (model(x),), [classes], *data.test).per_task[0]
    per_task = tuple(own if t == task else None for t in range(len(CLASSES)))
    return Row(f"{name} ({classes[0]}-{classes[-1]})", per_task, None, cost(model, data.test[0][:1]), seconds)


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [s for s in scores if s is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _number(value: float | None, places: int = 1) -> str:
    return "-" if value is None else f"{value:.{places}f}"
