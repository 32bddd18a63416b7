"""Between networks: the loss on the line between two for one task, and on the plane through two tasks and their merge.

    python benchmarks/barrier.py --data ../shared/data --figures docs/figures

Line: two networks trained on the same images from different initialisations, interpolated as they are and aligned by
Git Re-Basin (weights) or by activations, with and without REPAIR: a plain MLP, which has no norms, and a ResNet-8 with
batch norm, whose statistics are recomputed at every step. Plane: the mean loss over two tasks, own images and own
heads, through a pair (of `fxzip demo`, which is quick, or --pair of pairs.py) and its merge; the second network as it
is and in the first one's order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from common import draw, machine, options, parse
from data import Data, load
from nets import MLP, ResNet20
from pairs import PAIRS, bench_of
from torch import Tensor, nn
from tqdm import tqdm
from training import Recipe, train

import fxzip
from fxzip import demo, landscape
from fxzip.drawing import drawing

NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Recipe]] = {
    "mlp": (lambda channels: MLP(10, channels * 28 * 28), Recipe("adamw", 1e-3, 4, 12_000)),
    "resnet8": (lambda channels: ResNet20(10, channels, blocks=1), Recipe("sgd", 0.2, 3, 8000)),
}
TITLES = {"mlp": "MLP, no norms", "resnet8": "ResNet-8, batch norm"}
METHODS = ("rebasin", "permute", "rebasin+repair", "permute+repair")
CALIBRATION, TEST = 512, 1000


@dataclass
class Measured:
    """Mean cross-entropy on some images; the accuracies it saw, in %, beside."""

    images: Tensor
    labels: Tensor
    accuracies: list[float] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> float:
        logits = torch.cat([network(x) for x in self.images.split(250)])
        self.accuracies.append(100 * (logits.argmax(1) == self.labels).double().mean().item())
        return F.cross_entropy(logits, self.labels).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--pair", choices=["digits", *PAIRS], default="digits")
    parser.add_argument("--merge", default="pair", help="method of the merge on the plane")
    parser.add_argument("--steps", type=int, default=9, help="points on the line")
    parser.add_argument("--grid", type=int, default=9, help="points along each side of the plane")
    parser.add_argument("--only", choices=["line", "plane"])
    parser.add_argument("--figures", metavar="DIR", help="write barrier.svg and plane.svg there")
    args = parse(parser, argv)
    args.calibration = args.calibration or CALIBRATION
    data = load("fashion-mnist", args.data).with_test(args.test or TEST, args.seed)
    found: dict[str, dict] = {}
    if args.only != "plane":
        lines = {name: line(args, data, name) for name in args.network}
        found["lines"] = {name: {m: [asdict(made), seen] for m, (made, seen) in x.items()} for name, x in lines.items()}
        finish(args, "barrier", draw_lines(lines))
    if args.only != "line":
        grids = planes(args, data)
        found["planes"] = {name: asdict(plane) for name, plane in grids.items()}
        finish(args, "plane", draw_planes(grids))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))
    print("\n" + machine(args, calibration=args.calibration, **{"test images": len(data.test[0])}).rpartition("\n")[0])


def finish(args: argparse.Namespace, name: str, figure) -> None:
    if args.figures:
        draw(figure, Path(args.figures) / f"{name}.svg")


# ------------------------------------------------------------------------------------------------- line


def line(args: argparse.Namespace, data: Data, name: str) -> dict[str, tuple[landscape.Line, list[float]]]:
    """Method -> the line, and the accuracies along it as aligned; "none" for the networks' own order."""
    build, recipe = NETWORKS[name]
    classes = list(range(10))
    pair = [train(name, lambda: build(data.shape[0]), data, classes, recipe, args.seed + k, args)[0] for k in (0, 1)]
    loader = data.calibration(args.calibration, args.seed).split(256)
    found = {}
    for method in tqdm(METHODS, desc=name, leave=False, disable=None):
        measured = Measured(data.normalise(data.test[0]), data.test[1])
        made = landscape.line(pair, loader, measured, method=method, steps=args.steps, seed=args.seed)
        accuracies = measured.accuracies
        found.setdefault("none", (made, accuracies[: args.steps]))
        found[method] = made, accuracies[args.steps :]
    print(f"\n## {name}: between two networks for Fashion-MNIST\n")
    print("| aligned by | loss barrier | loss halfway | accuracy halfway, % | at the ends |")
    print("| :-- | --: | --: | --: | --: |")
    for method, (made, accuracies) in found.items():
        values, barrier = (made.before, made.barriers[0]) if method == "none" else (made.after, made.barriers[1])
        middle = args.steps // 2
        print(f"| {method} | {barrier:.3f} | {values[middle]:.3f} | {accuracies[middle]:.1f} | "
              f"{accuracies[0]:.1f}, {accuracies[-1]:.1f} |", flush=True)  # fmt: skip
    return found


def draw_lines(lines: dict[str, dict[str, tuple[landscape.Line, list[float]]]]):
    """A column per network: accuracy along the line, a curve per method."""
    figure, axes = drawing("barrier", 4.8 * len(lines), 3.8, columns=len(lines))
    styles = {"none": ("0.5", "-"), "rebasin": ("C0", "-"), "permute": ("C1", "-"), "rebasin+repair": ("C0", "--"),
              "permute+repair": ("C1", "--")}  # fmt: skip
    for one, (name, found) in zip([axes] if len(lines) == 1 else axes, lines.items(), strict=True):
        for method, (made, accuracies) in found.items():
            colour, style = styles[method]
            label = "own order" if method == "none" else method
            one.plot(made.at, accuracies, color=colour, linestyle=style, marker="o", markersize=3, label=label)
        one.set_title(TITLES[name], fontsize=10)
        one.set_xlabel("share of the second network")
        one.set_ylabel("accuracy, %")
        one.set_ylim(0, 100)
        one.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


# ------------------------------------------------------------------------------------------------ plane


def planes(args: argparse.Namespace, data: Data) -> dict[str, landscape.Plane]:
    """The plane through both networks and their merge; once with the second in the first one's order."""
    (a, b), loader, test = digits_pair(args) if args.pair == "digits" else image_pair(args, data)

    def loss(network: nn.Module) -> float:
        return sum(m(_Output(network, k)) for k, m in enumerate(test)) / len(test)

    norms = any(n.endswith("running_var") for n, _ in a.named_buffers())
    options = {"seed": args.seed, "progress": False, "calibration": args.calibration}
    aligned = fxzip.merge([a, b], loader, method="permute", model_weights=[1e-9, 1], **options)
    second = {"as it is": b, "in the order of the first": fxzip.extract(aligned, 1).eval()}
    found = {}
    print(f"\n## {args.pair}: mean loss of two tasks, at the networks and their merge\n")
    print("| second network | first | second | merged | least on the plane |\n| :-- | --: | --: | --: | --: |")
    for name, other in tqdm(second.items(), desc="plane", leave=False, disable=None):
        zipped = fxzip.merge({"a": a, "b": other}, loader, method=args.merge, **options)
        plane = landscape.plane({"a": a, "b": other}, zipped, loss, steps=args.grid,
                                batches=loader if norms else None)  # fmt: skip
        found[name] = plane
        at = {p: nearest(plane, *xy) for p, xy in plane.points.items()}
        low = min(v for row in plane.values for v in row)
        print(f"| {name} | {at['a']:.2f} | {at['b']:.2f} | {loss(zipped):.2f} | {low:.2f} |", flush=True)
    return found


Pair = tuple[list[nn.Module], list[Tensor], list[Measured]]  # networks, calibration batches, a measure per task


def digits_pair(args: argparse.Namespace) -> Pair:
    """The two networks of `fxzip demo`."""
    data = demo.digits(args.seed)
    pair: list[nn.Module] = [
        demo.train(data, c, args.seed + k, 8, 15, False, "ab"[k]) for k, c in enumerate(demo.CLASSES)
    ]
    images, labels = data.test
    own = [(labels >= 5 * k) & (labels < 5 * k + 5) for k in (0, 1)]
    return pair, list(data.calibration.split(256)), [Measured(images[o], labels[o] - 5 * k) for k, o in enumerate(own)]


def image_pair(args: argparse.Namespace, data: Data) -> Pair:
    """A pair of pairs.py, split 0."""
    bench, _ = bench_of(args, data, 0, args.calibration)
    measures = [Measured(*own_images(data, own)) for own in bench.class_lists]
    return list(bench.parents), list(bench.calibration.split(256)), measures


class _Output(nn.Module):
    """One task's output of a merged network."""

    def __init__(self, network: nn.Module, task: int):
        super().__init__()
        self.network, self.task = network, task

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.network(x)
        return list(outputs.values())[self.task]


def own_images(data: Data, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The test images of some classes, and labels counted within them."""
    images, labels = data.test
    own = torch.isin(labels, torch.tensor(classes))
    return data.normalise(images[own]), torch.searchsorted(torch.tensor(classes), labels[own])


def nearest(plane: landscape.Plane, x: float, y: float) -> float:
    """The value at the grid point nearest to (x, y)."""
    i = min(range(len(plane.x)), key=lambda k: abs(plane.x[k] - x))
    j = min(range(len(plane.y)), key=lambda k: abs(plane.y[k] - y))
    return plane.values[j][i]


def draw_planes(found: dict[str, landscape.Plane]):
    figure, axes = drawing("plane", 5.2 * len(found), 4.4, columns=len(found))
    for one, (name, plane) in zip(axes, found.items(), strict=True):
        plane.draw(figure, one, "mean loss of two tasks")
        one.set_title(f"b {name}", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
