"""The sections of speed.py: each yields its figures, as `row`s, next to what it is measured against."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from big import Watch
from matching_speed import ZIP, compare, greedy, growth, timed, two_models
from speed_common import WHOLE, Row, batches, forwards, pair, row, seconds
from speed_running import compiled, throughput, throughput_steady
from speed_sharing import sharing
from torch import Tensor, nn

import fxzip
from fxzip import passes
from fxzip.allocator import retained
from fxzip.measure import Programs, collect_moments
from fxzip.measure.moments import SpaceMoments


def matching(args: argparse.Namespace) -> Iterator[Row]:
    naive: dict[int, float] = {}
    took: dict[int, float] = {}
    merged: dict[int, float] = {}
    for n in (64, 256) if args.quick else (64, 128, 256, 512, 1024, 2048, *([4096, 8192] if args.full else [])):
        moments, repeat = two_models(n, args.seed), 5 if n <= 2048 else 1  # the best counts, of the naive one as well
        found, took[n] = timed(lambda m=moments, n=n: ZIP(m, n), repeat)
        if n <= 1024:
            naive[n], merged[n] = compare(moments, n, found, 3), greedy(moments, n, repeat)
    for n, aim in ((256, ">= 20"), (1024, ">= 200")):
        if n in naive:
            yield row(f"zip's merges, n = {n:,}, times faster than the naive O(n^3) in NumPy", naive[n] / merged[n],
                      "x", aim, naive=naive[n], merges=merged[n])  # fmt: skip
            yield row(f"the same, with similarities and M and U, n = {n:,}", naive[n] / took[n], "x")
    for n, aim in ((2048, "<= 3"), (8192, "<= 60")):
        if n in took:
            yield row(f"zip, n = {n:,}", took[n], "s", aim)
    yield row(growth(took).replace("seconds", "s"), float("nan"), "")


def measuring(args: argparse.Namespace) -> Iterator[Row]:
    """Two batches more, with as many rows of each as in a run on `whole` inputs: rows are as many however many inputs
    there are, and lowering is done once."""

    def small(_: str, moments: SpaceMoments) -> SpaceMoments:
        return moments.moved(lambda second: second[:0])  # of a ViT-B they are 4 GB

    plan = (("resnet20x4", 32, 2048, 64), ("resnet50", 224, 512, 16), ("vit_b_16", 224, 512, 8))
    for name, size, whole, batch in (("resnet20x1", 32, 64, 4), ("resnet18", 64, 64, 2)) if args.quick else plan:
        models, data = pair(name), batches(size, 3 * batch, batch)
        graph = passes.start(models, data, progress=False)
        for stage in (passes.Infer(), passes.Cut(), passes.Read(WHOLE)):
            graph = stage(graph).graph_module
        found = passes.job(graph).prepared
        programs, spaces = Programs(found.graph_modules, found.spaces), found.merged_spaces()
        lowering = seconds(lambda p=programs, d=data: p.lowered(0, (d[0],)))
        plain, both = float("inf"), float("inf")
        for _ in range(3 if name.startswith("resnet20") else 2):
            plain = min(plain, seconds(lambda m=models, d=data: forwards(m, d[1:])))
            took: list[float] = []
            for part in (data[:1], data):
                inputs = [(x,) for x in part]
                run = partial(collect_moments, programs, spaces, inputs, whole, progress=False, keep=small)
                with retained():  # as a merge does
                    took.append(seconds(run))
            both = min(both, took[1] - took[0])
        yield row(f"measuring two {name}, batches of {batch} out of {whole} inputs of {size} px / their forwards",
                  both / plain, "x", "<= 1.3", seconds=both, forwards=plain)  # fmt: skip
        yield row(f"lowering {name} at that batch, once, / forwards of {whole} inputs by both",
                  lowering / (plain * whole / (2 * batch)), "x")  # fmt: skip


def merging(args: argparse.Namespace, name: str, size: int, count: int, batch: int) -> Iterator[Row]:
    models, data = pair(name), batches(size, count, batch)
    plain = seconds(lambda: forwards(models, data), 2)
    for method, aim in (("zip", "<= 1.6"), ("solve", "<= 6")):
        zipped, took, peak = watched(models, data, method)
        stages = {k: round(v, 2) for k, v in fxzip.report(zipped).seconds.items()}
        yield row(f"merge by {method} of two {name}, {count} inputs of {size} px / their forwards", took / plain, "x",
                  aim, seconds=took, forwards=plain, stages=stages)  # fmt: skip
        result = sum(t.numel() * t.element_size() for t in zipped.state_dict().values())
        what = f"its peak of private memory, beyond models, inputs and result, {method}"
        yield row(what, (peak - result) / 1e9, "GB", "<= 2")
    few = data[: max(1, 64 // batch)]
    for method in ("zip", "solve"):
        zipped, _, peak = watched(models, few, method, "1GB")
        result = sum(t.numel() * t.element_size() for t in zipped.state_dict().values())
        yield row(f'the same with memory="1GB", {len(few) * batch} inputs, {method}', (peak - result) / 1e9, "GB",
                  "<= 1")  # fmt: skip


def watched(
    models: Sequence[nn.Module], data: Sequence[Tensor], method: str, memory: str | None = None
) -> tuple[torch.fx.GraphModule, float, int]:
    """The result, CPU seconds, and by how many bytes the memory that has to be there grew, at most (see big.py)."""
    watch, start = Watch(), time.process_time()
    with watch.on("merge"):
        zipped = fxzip.merge(
            models, data, method=method, progress=False, calibration=WHOLE, verify=False, memory=memory
        )
    took, watch.over = time.process_time() - start, True
    return zipped, took, watch.peaks["merge"][0]


def merging_small(args: argparse.Namespace) -> Iterator[Row]:
    yield from merging(args, *(("resnet20x1", 32, 16, 8) if args.quick else ("resnet20x2", 32, 2048, 64)))


def merging_large(args: argparse.Namespace) -> Iterator[Row]:
    yield from merging(args, *(("resnet18", 64, 4, 2) if args.quick else ("resnet50", 224, 512, 16)))


def starting(args: argparse.Namespace) -> Iterator[Row]:
    """Compiled to bytecode before, as pip leaves a package."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    code = "import torch, time; a = time.perf_counter(); import fxzip; print(time.perf_counter() - a)"
    runs = 1 if args.quick else 5
    times = [float(subprocess.check_output([sys.executable, "-c", code], env=env)) for _ in range(1 + runs)][1:]
    yield row(f"import fxzip, beyond import torch (median of {runs})", float(np.median(times)), "s", "<= 0.3",
              best=min(times))  # fmt: skip
    command = [sys.executable, "-m", "fxzip", "inspect", "torchvision:resnet50"]
    for what, run, aim in (
        ("fxzip inspect torchvision:resnet50, all in all", command, "<= 6"),
        ("of which import torch, torchvision", [sys.executable, "-c", "import torch, torchvision"], ""),
    ):
        before, times = resource.getrusage(resource.RUSAGE_CHILDREN), []
        for _ in range(1 if args.quick else 3):
            times.append(
                seconds(lambda r=run: subprocess.run(r, check=True, capture_output=True, env=env), 1, time.perf_counter)
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(times)
        yield row(f"{what} (median of {len(times)}; {cpu:.1f} s of CPU)", float(np.median(times)), "s", aim,
                  best=min(times), cpu=cpu)  # fmt: skip


def kernels(args: argparse.Namespace) -> Iterator[Row]:
    """Where the time of a solve goes, operator by operator."""
    count = 16 if args.quick else 256
    models, data = pair("resnet20x1"), batches(32, count, count // 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fxzip.merge(models, data, progress=False, verify=False)
    found = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in found)
    for event in found[:8]:
        yield row(f"of a solve of two resnet20x1, in {event.key}", 100 * event.self_cpu_time_total / total, "%",
                  calls=event.count)  # fmt: skip


SECTIONS = {
    f.__name__: f
    for f in (matching, measuring, merging_small, throughput, throughput_steady, compiled, starting, sharing, kernels)
}
ENVIRONMENT = {"throughput_steady": {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}}
LONG = {"merging_large": merging_large}
