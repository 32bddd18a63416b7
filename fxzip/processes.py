"""Several processes on one merge: what a rank takes, and how sums over all ranks come about (torch.distributed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import FxzipError, InputError, Interrupted

T = TypeVar("T")
SMALL = 1 << 17  # elements


@dataclass(frozen=True)
class Processes:
    """This process among `world`. group: None for the default one; `ALONE` never communicates.

    All methods but `mine` and `count` are collective: every rank calls them, in the same order.

    >>> [k for k in range(5) if Processes(rank=1, world=2).mine(k)], Processes(rank=1, world=2).count(5)
    ([1, 3], 2)
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def of(cls, distributed: Any) -> Processes:
        """From what `merge(distributed=...)` takes. Raises InputError where there is no such group."""
        problem = wrong_group(distributed)
        if problem:
            raise InputError(problem)
        if distributed is False or distributed is None:
            return ALONE
        group = None if distributed is True else distributed
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def mine(self, k: int) -> bool:
        """Whether item k is dealt to this rank: rank r gets items r, r + world, ..."""
        return k % self.world == self.rank

    def count(self, total: int) -> int:
        """How many of `total` items are dealt to this rank."""
        return len(range(self.rank, total, self.world))

    def sum(self, *tensors: Tensor) -> None:
        """Every tensor becomes, in place, its sum over the ranks. One call for many is faster than many calls."""
        if self.world == 1:
            return
        for alike in _joined(tensors):
            own = alike[0] if len(alike) == 1 else torch.cat([t.flatten() for t in alike])
            moved = own.to(self._device(own.device)).contiguous()
            self._together(lambda moved=moved: dist.all_reduce(moved, group=self.group))
            if moved is not alike[0]:
                for tensor, total in zip(alike, moved.flatten().split([t.numel() for t in alike]), strict=True):
                    tensor.copy_(total.reshape(tensor.shape))

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, in their order (pickled: for facts, not for tensors)."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        self._together(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def first(self, *tensors: Tensor) -> None:
        """Every tensor becomes, in place, that of rank 0."""
        if self.world == 1:
            return
        for tensor in tensors:
            moved = tensor.to(self._device(tensor.device)).contiguous()
            self._together(lambda moved=moved: dist.broadcast(moved, group=self.group, group_src=0))
            if moved is not tensor:
                tensor.copy_(moved)

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What one rank raises inside, all ranks raise: nobody waits for a rank that has given up."""
        problem: FxzipError | None = None
        try:
            yield
        except Interrupted:
            raise  # it came from outside, and ends the others too
        except FxzipError as error:
            problem = error
        told = self.gather(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, text in enumerate(told):
            if text is not None:
                raise InputError(f"rank {rank}: {text}")

    def same(self, what: str, value: Any) -> None:
        """Raises InputError unless `value` is the same in every rank."""
        for rank, other in enumerate(values := self.gather(value)):
            if other != values[0]:
                raise InputError(
                    f"rank {rank} has other {what} than rank 0: give every rank the same models, loader, calibration "
                    "and seed; the batches are divided here, so no DistributedSampler is needed"
                )

    def _device(self, own: torch.device) -> torch.device:
        """Where this group's backend can work on a tensor."""
        if own.type == "cpu" and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return own

    def _together(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise FxzipError(
                f"rank {self.rank} of {self.world}: another rank is gone ({reason}); its own message says why. With"
                " resume=folder the same call goes on from what was measured"
            ) from error


ALONE = Processes()


def _joined(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """What is summed in one message: all small tensors of one kind, as every message costs about a millisecond; each
    large one by itself, as joining it would take its memory once more."""
    groups: dict[Any, list[Tensor]] = {}
    for k, tensor in enumerate(tensors):
        key = (tensor.dtype, tensor.device) if tensor.numel() <= SMALL else k
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def wrong_group(distributed: Any) -> str:
    """Why `merge(distributed=...)` cannot be this; "" if it can."""
    if distributed is False or distributed is None:
        return ""
    if not dist.is_available():
        return "distributed: this torch is built without torch.distributed"
    if distributed is not True and not isinstance(distributed, dist.ProcessGroup):
        return f"distributed must be True, False or a torch.distributed.ProcessGroup, got {distributed!r}"
    if not dist.is_initialized():
        return "distributed=True needs torch.distributed.init_process_group() in every process, before"
    if distributed is not True and dist.get_rank(distributed) < 0:
        return "distributed: this process is not in that group, so it must not call"
    return ""
