"""One process against several: by the clock, and in processor time along the critical path.

The clock says what a user waits, but two processes with a core each are as slow as the slower core, and one process
alone takes whichever is free: beside any other job the clock compares unlike machines. Processor time does not count
what others take. Between two messages the slowest rank counts, messages count as what they cost the processor, so
the path is what the clock would say if every rank had a core of its own and messages took no time but for that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from speed_common import WHOLE, Row, batches, pair, row
from torch import Tensor

from fxzip import passes
from fxzip.passes.job import give
from fxzip.processes import Processes

STAGES = {"Measure": "measuring", "Solve": "solve"}


@dataclass(frozen=True)
class Watched(Processes):
    """Notes the processor time of this process before and after every message."""

    marks: list[float] = field(default_factory=list)

    def _together(self, call: Callable[[], Any]) -> None:
        self.marks.append(time.process_time())
        super()._together(call)
        self.marks.append(time.process_time())


@dataclass(frozen=True)
class Path:
    """Seconds of a stage. clock; path: processor time of the slowest rank between messages, and in messages; messages:
    of that, in messages; mean: of all ranks' work between messages."""

    clock: float
    path: float
    messages: float
    mean: float

    @classmethod
    def of(cls, clock: float, marks: list[list[float]]) -> Path:
        """marks: of every rank start, before a message, after it, ..., end."""
        steps = torch.tensor(marks, dtype=torch.float64).diff(dim=1)  # [ranks, 2 messages + 1]
        slowest = steps.amax(0)
        return cls(clock, float(slowest.sum()), float(slowest[1::2].sum()), float(steps[:, ::2].mean(0).sum()))


def sharing(args: argparse.Namespace) -> Iterator[Row]:
    """Two and four processes against one, each on a core of its own where the machine has that many."""
    found: dict[int, tuple[dict[str, Path], dict[str, Tensor]]] = {}
    count = 64 if args.quick else 2048
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (world, folder, count), nprocs=world)  # type: ignore[attr-defined]
            took, moments = torch.load(f"{folder}/0.pt", weights_only=False)
        found[world] = took, moments
        one, first = found[1]
        if world == 1:
            continue
        off = max(float((moments[n] - first[n]).abs().max() / first[n].abs().max()) for n in first)
        yield row(f"{world} processes: largest relative difference of a second moment", off, "", "<= 1e-5")
        for what, now in took.items():
            alone = one[what]
            yield row(f"{world} processes: speedup of {what} / {world}, by the clock", alone.clock / now.clock / world,
                      "x", one=alone.clock, several=now.clock)  # fmt: skip
            waits = now.path - now.messages - now.mean
            shares = f"{now.messages / now.path:.0%} messages, {waits / now.path:.0%} waits"
            yield row(f"the same in processor time along the critical path ({alone.path:.2f} s / {now.path:.2f} s, of"
                      f" it {shares})", alone.path / now.path / world, "x", **vars(now))  # fmt: skip


def _rank(rank: int, world: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    warnings.simplefilter("ignore")
    models, data = pair("resnet20x1"), batches(32, count, min(64, count // 8))
    processes = Watched(rank, world)
    graph = passes.start(models, data, progress=False, distributed=True)
    give(graph, replace(passes.job(graph), processes=processes))
    took: dict[str, tuple[float, list[float]]] = {}
    plan = [passes.Infer(), passes.Cut(), passes.Read(WHOLE), passes.Measure(), passes.Match("zip"), passes.Average(),
            passes.Solve()]  # fmt: skip
    for stage in plan:
        processes.gather(None)  # together
        processes.marks[:] = [time.process_time()]
        start = time.perf_counter()
        graph = stage(graph).graph_module
        clock = time.perf_counter() - start
        took[type(stage).__name__] = clock, [*processes.marks, time.process_time()]
    every = processes.gather(took)
    paths = {what: Path.of(took[name][0], [t[name][1] for t in every]) for name, what in STAGES.items()}
    moments = {n: m.second for n, m in passes.job(graph).moments.items()}
    torch.save((paths, moments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
