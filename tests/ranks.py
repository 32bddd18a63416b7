"""Several ranks in one process, for what sums over them: threads that take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxzip.processes import Processes


@dataclass
class _Meeting:
    """Where ranks wait for each other; one thread at a time runs."""

    world: int
    turn: threading.Lock = field(default_factory=threading.Lock)
    brought: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=60)

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


@dataclass(frozen=True)
class _Rank(Processes):
    def sum(self, *tensors: Tensor) -> None:
        self.group.brought[self.rank] = [t.clone() for t in tensors]
        self.group.wait()
        sums = [torch.stack(each).sum(0) for each in zip(*map(self.group.brought.get, range(self.world)), strict=True)]
        self.group.wait()
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)


def in_ranks(work: Callable[[Processes], Any], world: int = 2) -> list[Any]:
    """What `work` returns in every rank; what it raises in one is raised here."""
    meeting, found, problems = _Meeting(world), {}, []

    def run(rank: int) -> None:
        with meeting.turn, torch.no_grad():
            try:
                found[rank] = work(_Rank(rank, world, meeting))
            except BaseException as error:
                problems.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return [found[r] for r in range(world)]
