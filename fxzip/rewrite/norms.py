"""Batch-norm statistics of the merged network, from data (REPAIR, arXiv:2211.08403)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import InputError
from ..processes import ALONE, Processes
from ..trace import batch_size

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recompute_statistics(
    module: nn.Module, batches: Iterable[Any], bind: Callable[[Any], tuple], processes: Processes = ALONE
) -> int:
    """Recompute the running statistics of every batch norm as the mean over `batches`, by size; returns how many.

    A batch norm is what has running_mean, running_var, num_batches_tracked and momentum. Only they run in
    train mode; dropout and all else stay in eval. bind: batch -> positional arguments. Modes, momenta and the
    torch RNG are restored, also on error; statistics are restored when there is no batch (InputError). A batch of one
    sample, which may have no variance, is joined to its neighbour.
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
    counts = dict.fromkeys(norms, 0)  # samples that each has seen
    hooks = [norm.register_forward_pre_hook(partial(_weigh, counts), with_kwargs=True) for norm in norms]
    try:
        with torch.random.fork_rng(devices=_cuda_devices(module)), torch.no_grad():
            _start(module, norms)
            for k, args in enumerate(_joined([bind(batch) for batch in batches])):
                if processes.mine(k):
                    module(*args)
                seen += 1
            _combine(norms, counts, processes)
    finally:
        for hook in hooks:
            hook.remove()
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
    """Eval mode, except the norms, which count from zero."""
    for inner in module.modules():
        inner.training = False
    for norm in norms:
        norm.training = True
        for statistic, value in zip(STATISTICS, (0, 1, 0), strict=True):
            getattr(norm, statistic).fill_(value)


def _weigh(counts: dict[nn.Module, int], norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a norm runs: the momentum with which its statistics stay the mean over all samples so far."""
    size = (*args, *kwargs.values())[0].shape[0]
    counts[norm] += size
    norm.momentum = size / max(counts[norm], 1)  # type: ignore[assignment]


def _joined(batches: list[tuple]) -> list[tuple]:
    """Batches of one sample with the one after, or the one before, where that is possible."""
    found: list[tuple] = []
    for k, args in enumerate(batches):
        last = k == len(batches) - 1
        one = bool(found) and (batch_size(found[-1]) == 1 or (last and batch_size(args) == 1))
        both = _both(found[-1], args) if one else None
        found[len(found) - (both is not None) :] = [args if both is None else both]
    return found


def _both(first: tuple, second: tuple) -> tuple | None:
    """Two batches as one; None where they are not of one form."""
    (xs, form), (ys, other) = tree_flatten(first), tree_flatten(second)
    forms = [[(v.shape[1:], v.dtype) if isinstance(v, Tensor) else v for v in values] for values in (xs, ys)]
    sizes = batch_size(first), batch_size(second)
    if form != other or forms[0] != forms[1]:
        return None
    made = []
    for x, y in zip(xs, ys, strict=True):
        if isinstance(x, Tensor) and x.dim() and (len(x), len(y)) == sizes:
            made.append(torch.cat([x, y]))
        elif not isinstance(x, Tensor) or torch.equal(x, y):
            made.append(x)
        else:
            return None
    return tree_unflatten(made, form)


def _combine(norms: list[nn.Module], counts: dict[nn.Module, int], processes: Processes) -> None:
    """Of each rank's means over its own batches the mean over all; one without a batch counts for nothing."""
    if processes.world == 1:
        return
    for norm in norms:
        mean, var, count = (getattr(norm, s) for s in STATISTICS)
        samples = torch.tensor(counts[norm], dtype=torch.float64, device=mean.device)
        total = torch.stack([mean.double(), var.double()]) * samples
        processes.sum(total, count, samples)
        total /= samples.clamp(min=1)
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
