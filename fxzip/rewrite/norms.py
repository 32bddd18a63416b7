"""Batch-norm statistics of the merged network, from data (REPAIR, arXiv:2211.08403)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..processes import ALONE, Processes

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recompute_statistics(
    module: nn.Module, batches: Iterable[Any], bind: Callable[[Any], tuple], processes: Processes = ALONE
) -> int:
    """Recompute the running statistics of every batch norm as the mean over `batches`; returns how many.

    A batch norm is what has running_mean, running_var, num_batches_tracked and momentum. Only they run in
    train mode; dropout and all else stay in eval. bind: batch -> positional arguments. Modes, momenta and the
    torch RNG are restored, also on error; statistics are restored when there is no batch (InputError).
    Without any batch norm nothing is run and 0 returned. processes: every rank runs its share of the batches.

    >>> net = nn.Sequential(nn.BatchNorm1d(2))
    >>> recompute_statistics(net, [torch.full((4, 2), 3.0)], lambda batch: (batch,)), net[0].running_mean
    (1, tensor([3., 3.]))
    """
    norms = batch_norms(module)
    if not norms:
        return 0
    modes = [(m, m.training) for m in module.modules()]
    momenta = [(m, m.momentum) for m in norms]
    before = [[getattr(m, s).clone() for s in STATISTICS] for m in norms]
    seen = 0
    try:
        with torch.random.fork_rng(devices=_cuda_devices(module)), torch.no_grad():
            _start(module, norms)
            for k, batch in enumerate(batches):
                if processes.mine(k):
                    module(*bind(batch))
                seen += 1
            _combine(norms, processes)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum  # type: ignore[assignment]
        for inner, mode in modes:
            inner.training = mode
        if not seen:
            _write(norms, before)
    if not seen:
        raise InputError("recompute_statistics: the loader gave no batch; batch norms were left as they are")
    return len(norms)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Modules that track batch statistics, by what they have rather than by their class."""
    return [
        m
        for m in module.modules()
        if all(isinstance(getattr(m, s, None), Tensor) for s in STATISTICS) and hasattr(m, "momentum")
    ]


def _start(module: nn.Module, norms: list[nn.Module]) -> None:
    """Eval mode, except the norms, which count from zero; momentum None is torch's cumulative average."""
    for inner in module.modules():
        inner.training = False
    for norm in norms:
        norm.training = True
        norm.momentum = None  # type: ignore[assignment]
        for statistic, value in zip(STATISTICS, (0, 1, 0), strict=True):
            getattr(norm, statistic).fill_(value)


def _combine(norms: list[nn.Module], processes: Processes) -> None:
    """Of each rank's means over its own batches the mean over all; one without a batch counts for nothing."""
    if processes.world == 1:
        return
    for norm in norms:
        mean, var, count = (getattr(norm, s) for s in STATISTICS)
        total = torch.stack([mean.double(), var.double()]) * count
        processes.sum(total, count)
        total /= count.clamp(min=1)
        mean.copy_(total[0])
        var.copy_(total[1])


def _write(norms: list[nn.Module], values: list[list[Tensor]]) -> None:
    with torch.no_grad():
        for norm, held in zip(norms, values, strict=True):
            for statistic, value in zip(STATISTICS, held, strict=True):
                getattr(norm, statistic).copy_(value)


def _cuda_devices(module: nn.Module) -> list[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
