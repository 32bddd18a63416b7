"""How much of all models' features half as many can hold: principal directions, and what the matchers keep.

    python benchmarks/bases.py --data ../shared/data --pair vit
    python benchmarks/bases.py --data ../shared/data --checkpoints a.pt b.pt

Of every merged space, the share of the variance that the best linear map back leaves unexplained, all features with
variance 1, and the same in the metric of the layers that read the space, where a parameter does. Principal directions
are the least that any linear map can leave. No ReLU can follow on those, so they are a bound, not a way to merge.
Means over the spaces of a kind: those that are read feature by feature, and those across which a norm or a reduction
acts before; heads and groups are as one here, although merging keeps their features apart. No merge is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from cifar_pair import parents_of
from common import machine, options, parse
from data import load
from pairs import CALIBRATION, PAIRS, bench_of, facts
from torch import Tensor

import fxzip
from fxzip import passes
from fxzip.infer import FeatureSpace
from fxzip.match import Matcher, Read
from fxzip.match.unmerge import optimal_unmerge
from fxzip.measure import SpaceMoments

MATCHERS: dict[str, Matcher] = {
    "permute": fxzip.Permute(),
    "zip (0.3, 0.125)": fxzip.Zip(alpha=0.3, beta=0.125),
    "zip (0.3, 1)": fxzip.Zip(alpha=0.3, beta=1.0),
    "select, every feature alike": fxzip.Select(plain=1.0),
    "select": fxzip.Select(plain=0.1),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--checkpoints", nargs=2, metavar="FILE", help="the CIFAR-10 pair, as in cifar_pair.py")
    parser.add_argument("--pair", choices=PAIRS)
    parser.add_argument("--dataset", choices=["fashion-mnist", "cifar10", "digits"], default="fashion-mnist")
    parser.add_argument("--split", type=int, default=0)
    args = parse(parser, argv)
    args.calibration = args.calibration or CALIBRATION
    if args.checkpoints:
        data = load("cifar10", args.data)
        models, images = parents_of(args, data)[0], data.calibration(args.calibration, args.seed)
    else:
        data = load(args.dataset, args.data)
        bench, _ = bench_of(args, data, args.split, args.calibration)
        models, images = bench.parents, bench.calibration
    shares: dict[str, list[dict[str, tuple[float, float]]]] = defaultdict(list)
    for space, moments in spaces_of(models, images, args.calibration):
        shares[kind(space)].append(left(space, moments))
    for name, found in shares.items():
        print(f"\n{len(found)} spaces {name}: % unexplained, and as their readers see it\n\n| | all alike | readers |")
        print("| :-- | --: | --: |")
        for matcher in found[0]:
            plain, read = (torch.tensor([f[matcher][k] for f in found]) for k in (0, 1))
            print(f"| {matcher} | {100 * plain.mean():.1f} | {100 * read.nanmean():.1f} |")
    print("\n" + machine(args, **({} if args.checkpoints else facts(args, data))).rsplit("\n", 1)[0])


def spaces_of(models, images: Tensor, calibration: int) -> Iterator[tuple[FeatureSpace, SpaceMoments]]:
    graph = passes.start(models, images.split(256), progress=False)
    for stage in (passes.Infer(), passes.Cut(), passes.Read(calibration), passes.Measure()):
        graph = stage(graph).graph_module
    job = passes.job(graph)
    read = job.prepared.reading(job.moments)
    for space in job.prepared.merged_spaces():
        if space.name in job.moments:  # whole heads or groups are told from the features in them
            yield space, read(space.name, job.moments[space.name])


def kind(space: FeatureSpace) -> str:
    return "across which a norm or a reduction acts" if space.nonlinear else "that are read feature by feature"


def left(space: FeatureSpace, moments: SpaceMoments) -> dict[str, tuple[float, float]]:
    """Matcher -> share of the variance that is lost, all features alike, and in the readers' metric (NaN without)."""
    alive = ~moments.dead
    scale = torch.where(alive, moments.covariance().diagonal().clamp_min(1e-300).rsqrt(), 0)
    metrics = [torch.diag(scale.square())]
    metrics += [moments.metric] if isinstance(moments, Read) else []
    covariance, width = moments.covariance(), moments.sizes[0]
    found = {"principal directions": tuple(_principal(covariance, g, width) for g in metrics)}
    for name, matcher in MATCHERS.items():
        matching = matcher(moments, width)
        back = optimal_unmerge(matching.merge, moments, 1e-6) @ matching.merge.to(covariance)
        rest = torch.eye(len(covariance), dtype=covariance.dtype) - back
        error = rest @ covariance @ rest.T
        found[name] = tuple(float((error * g).sum() / (covariance * g).sum()) for g in metrics)
    return {name: (f[0], f[1] if len(f) > 1 else float("nan")) for name, f in found.items()}


def _principal(covariance: Tensor, metric: Tensor, width: int) -> float:
    """Of the best `width` linear functions of the features, for errors that cost e^T metric e."""
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp_min(0).sqrt()
    energy = torch.linalg.eigvalsh(root.T @ covariance @ root).clamp_min(0)  # ascending
    return float(energy[: len(energy) - width].sum() / energy.sum())


if __name__ == "__main__":
    main()
