"""The sections of speed.py about the result: how fast it runs, eager and compiled, beside its parents."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from speed_common import Row, batches, forwards, pair, row, seconds
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import fxzip


def throughput(args: argparse.Namespace) -> Iterator[Row]:
    name = "resnet20x1" if args.quick else "resnet20x4"
    models, data = pair(name), batches(32, 32, 32)
    zipped = fxzip.merge(models, data, method="average", progress=False, verify=False)
    middle = in_turn({"parent": models[:1], "merged": [zipped], "fused": [fuse(zipped)], "both": models}, data, args)
    how = ", memory kept by the allocator" if "MALLOC_TRIM_THRESHOLD_" in os.environ else ""
    yield row(f"merged {name}, throughput / one parent's{how}", middle["parent"] / middle["merged"], "x", ">= 0.98")
    yield row(f"merged {name}, throughput / the ensemble's{how}", middle["both"] / middle["merged"], "x", ">= 1.9")
    yield row(f"the same, batch norms folded by torch.fx, / one parent's{how}", middle["parent"] / middle["fused"], "x")


def in_turn(
    nets: dict[str, list[nn.Module]], data: Sequence[Tensor], args: argparse.Namespace
) -> dict[str, float]:
    """The median seconds of each, in turn, so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {key: [] for key in nets}
    order = np.random.default_rng(args.seed)
    for _ in range(2 if args.quick else 7):
        for key in order.permutation(list(nets)):
            times[key].append(seconds(lambda n=nets[key]: forwards(n, data)))
    return {k: float(np.median(v)) for k, v in times.items()}


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    """The same with torch.compile, which needs a C++ compiler."""
    name = "resnet20x1" if args.quick else "resnet20x4"
    models, data = pair(name), batches(32, 32, 32)
    zipped = fxzip.merge(models, data, method="average", progress=False, verify=False)
    nets: dict[str, list[nn.Module]] = {"parent": models[:1], "merged": [zipped], "both": models}
    nets = {key: [torch.compile(m) for m in several] for key, several in nets.items()}  # type: ignore[misc]
    for several in nets.values():
        forwards(several, data)
    middle = in_turn(nets, data, args)
    what = f"compiled, merged {name}, throughput / "
    yield row(what + "one parent's", middle["parent"] / middle["merged"], "x", ">= 0.98")
    yield row(what + "the ensemble's", middle["both"] / middle["merged"], "x", ">= 1.9")


def throughput_steady(args: argparse.Namespace) -> Iterator[Row]:
    """With glibc told not to give memory back (see ENVIRONMENT): else page faults of whichever graph happens to free
    the last block of the heap, more than the graph, decide."""
    yield from throughput(args)
