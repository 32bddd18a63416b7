"""`torchrun --nproc-per-node=K -m fxzip merge ...`: this process's place in the group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..processes import ALONE, Processes


@contextmanager
def ranks(device: str) -> Iterator[Processes]:
    """The group that torchrun has started, for as long as the block lasts; ALONE where it has not.

    nccl on CUDA, a device for each process of a machine; gloo elsewhere.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield ALONE
        return
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes.of(True)
    finally:
        dist.destroy_process_group()
