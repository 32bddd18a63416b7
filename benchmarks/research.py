"""What each part of solve is worth: one thing changed at a time, on a pair of pairs.py or on given checkpoints.

    python benchmarks/research.py --pair resnet20-gn --data ../shared/data
    python benchmarks/research.py --checkpoints a.pt b.pt --data ../shared/data --only "matcher*" calibration

Rows come in families, each with the default beside it. Calibration images are never test images; "other images"
calibrates on another data set than the parents were trained on. *where*: 1.2 times the FLOPs, spent by hand (of given
checkpoints alone, ResNet-20 x2, by the names of their spaces). *again*: all layers a second time, from what the first
fits left.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from cifar_pair import parents_of
from common import Bench, Row, announce, drifted, machine, options, parse, save, show
from data import load
from pairs import PAIRS, bench_of
from torch import Tensor
from tqdm import tqdm

import fxzip
from fxzip import CCA, Average, MuDSC, Pair, Permute, Select, Solve, Unmerge, Zip
from fxzip.passes import stages
from fxzip.solve import Settings

OTHER = {"fashion-mnist": "kmnist", "cifar10": "fashion-mnist"}
COUNTS = (128, 512, 2048, 4096)
WHERE: dict[str, dict[str, int]] = {  # each 1.18 to 1.20 times the FLOPs
    "the first stream": {"s0": 48}, "the second stream": {"s5": 103}, "the last stream": {"s9": 214},
    "all streams": {"s0": 38, "s5": 77, "s9": 154},
    "inside the first stage": dict.fromkeys(("s1", "s2", "s3"), 50),
    "inside the second": dict.fromkeys(("s4", "s6", "s7"), 104),
    "inside the last": dict.fromkeys(("s8", "s10", "s11"), 208),
    "inside all": {**dict.fromkeys(("s1", "s2", "s3"), 38), **dict.fromkeys(("s4", "s6", "s7"), 77),
                   **dict.fromkeys(("s8", "s10", "s11"), 154)},
    "all of the first stage": dict.fromkeys(("s0", "s1", "s2", "s3"), 39),
    "all of the second": dict.fromkeys(("s4", "s5", "s6", "s7"), 81),
    "all of the last": dict.fromkeys(("s8", "s9", "s10", "s11"), 164),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """method and options of one merge; count: calibration images, other: from another data set."""

    family: str
    name: str
    method: Any = field(default_factory=Solve)
    options: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    other: bool = False
    passes: int = 1


def _settings(**changed: Any) -> Solve:
    return Solve(settings=Settings(**changed))


VARIANTS = (
    Variant("default", "solve"),
    Variant("refit", "no refit behind non-linearities", _settings(sweeps=0)),
    Variant("refit", "2 sweeps", _settings(sweeps=2)),
    Variant("refit", "12 sweeps", _settings(sweeps=12)),
    Variant("feedback", "no error feedback", _settings(feedback=False)),
    Variant("feedback", "neither feedback nor refit", _settings(feedback=False, sweeps=0)),
    Variant("ridge", "ridge 1e-5", _settings(lam=1e-5)),
    Variant("ridge", "ridge 1e-2", _settings(lam=1e-2)),
    Variant("rows", "twice the rows", _settings(rows=20, least=65_536)),
    Variant("rows", "half the rows", _settings(rows=5, least=16_384)),
    Variant("matcher", "order as it is", Solve(Average())),
    Variant("matcher", "permute", Solve(Permute())),
    Variant("matcher", "zip (0.3, 0.125)", Solve(Zip())),
    Variant("matcher", "select", Solve(Select())),
    Variant("matcher", "pair", Solve(Pair())),
    Variant("matcher", "mudsc", Solve(MuDSC())),
    Variant("matcher", "zip (0.3, 1), best unmerge", Solve(Unmerge())),
    *(Variant("calibration", f"{n} images", count=n) for n in COUNTS),
    Variant("calibration", "other images", other=True),
    *(Variant("cca", f"cca, ridge {r:g}", CCA(r)) for r in (1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0)),
    *(Variant("budget", f"{b:g}x", options={"budget": b}) for b in (1.15, 1.2, 1.33, 1.5)),
    *(Variant("where", name, options={"budget": widths}) for name, widths in WHERE.items()),
    Variant("again", "two passes over all layers", passes=2),
)


@contextmanager
def repeated(passes: int) -> Iterator[None]:
    """Layers are fitted so often, each time from what is there."""
    plain = stages.solve_parameters

    def again(modules: Any, spaces: Any, cut: Any, matchings: Any, shared: Any, heads: Any, *rest: Any) -> Any:
        for _ in range(passes):
            found = plain(modules, spaces, cut, matchings, shared, heads, *rest)
            shared, heads = found.shared, found.heads
        return found  # pyright: ignore[reportPossiblyUnbound]

    with patch.object(stages, "solve_parameters", again):
        yield


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--pair", choices=PAIRS)
    parser.add_argument("--checkpoints", nargs=2, metavar="FILE", help="two ResNet-20, as for cifar_pair.py")
    parser.add_argument("--dataset", choices=list(OTHER), help="default: fashion-mnist, or cifar10 for checkpoints")
    parser.add_argument("--split", type=int, default=0, metavar="SEED")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="families or names of variants")
    args = parse(parser, argv)
    if (args.pair is None) == (args.checkpoints is None):
        parser.error("give either --pair or --checkpoints")
    dataset = args.dataset or ("cifar10" if args.checkpoints else "fashion-mnist")
    bench, other = setting(args, dataset)
    rows = [announce(r) for r in bench.parent_rows([None, None], ["parent a", "parent b"])]
    fitting = [v for v in VARIANTS if args.checkpoints or v.family != "where"]
    chosen = [v for v in fitting if not args.only or _wanted(v, args.only)]
    for variant in tqdm(chosen, desc="merge", leave=False, disable=None):
        rows.append(announce(row(bench, variant, other, args.calibration or 1024)))
    notes = machine(args, calibration=args.calibration or 1024, **{"test images": len(bench.images)})
    title = f"solve, one thing at a time: {args.pair or 'checkpoints'}, {dataset}, split {args.split}"
    show(title, rows, ["a", "b"], notes)
    save(args.out, [(title, rows)], notes)


def setting(args: argparse.Namespace, dataset: str) -> tuple[Bench, Tensor]:
    """The pair, and calibration images of another data set in the parents' shape and normalisation."""
    data = load(dataset, args.data).with_test(args.test, args.seed)
    most = max(*COUNTS, args.calibration or 1024)
    if args.checkpoints:
        bench = Bench.of(*parents_of(args, data)[:2], data, most, args.seed)
    else:
        bench, _ = bench_of(args, data, args.split, most)
    strange = load(OTHER[dataset], args.data).calibration(args.calibration or 1024, args.seed)
    shape = bench.images.shape[1:]
    strange = torch.nn.functional.interpolate(strange, size=shape[1:], mode="bilinear").expand(-1, shape[0], -1, -1)
    return bench, strange.contiguous()


def row(bench: Bench, variant: Variant, other: Tensor, count: int) -> Row:
    """Merge and score one variant."""
    images = other if variant.other else bench.calibration[: variant.count or count]
    before = bench.forward_seconds(len(images))
    start = time.perf_counter()
    with repeated(variant.passes):
        zipped = fxzip.merge(bench.parents, images.split(256), method=variant.method, calibration=len(images),
                             seed=bench.seed, verify=False, progress=False, **variant.options)  # fmt: skip
    seconds = time.perf_counter() - start
    name = variant.name if variant.family == "default" else f"{variant.family}: {variant.name}"
    forward = (before + bench.forward_seconds(len(images))) / 2
    return drifted(bench, bench.row(name, zipped, seconds=seconds, forwards=seconds / forward), zipped)


def _wanted(variant: Variant, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(x, p) for x in (variant.family, variant.name) for p in patterns)


if __name__ == "__main__":
    main()
