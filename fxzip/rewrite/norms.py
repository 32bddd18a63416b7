"""Batch-norm statistics of the merged network, from data (REPAIR, arXiv:2211.08403)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from ..allocator import retained, spare
from ..errors import InputError
from ..processes import ALONE, Processes
from ..trace import batch_size

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@retained()
def recompute_statistics(
    module: nn.Module, batches: Iterable[Any], bind: Callable[[Any], tuple], processes: Processes = ALONE
) -> int:
    """Recompute the running statistics of every batch norm as the mean over `batches`, by size; returns how many.

    A batch norm is what has running_mean, running_var, num_batches_tracked and momentum. Only they run in
    train mode; dropout and all else stay in eval. bind: batch -> positional arguments. Modes, momenta and the
    torch RNG are restored, also on error; statistics are restored when there is no batch (InputError). The samples are
    shuffled, so that no batch is of one task alone, nor of one sample, which may have no variance.
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
            for k, args in enumerate(_dealt([bind(batch) for batch in batches])):
                if processes.mine(k):
                    module(*args)
                spare()
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


def _dealt(batches: list[tuple]) -> Iterator[tuple]:
    """The same samples, shuffled into batches as large as the largest was or less, and of two samples at least: a batch
    of a single task, as from a dict of loaders, would be normed by that task's statistics, all through the network."""
    while batches:
        alike = [b for b in batches if _one_form(batches[0], b)]
        batches = [b for b in batches if not _one_form(alike[0], b)]
        sizes, form = [batch_size(b) for b in alike], tree_structure(alike[0])
        columns = list(zip(*map(tree_leaves, alike), strict=True))  # one for each tensor or number of a batch
        ends, total = torch.tensor(sizes).cumsum(0), sum(sizes)
        count = max(1, min(-(-total // max(*sizes, 1)), total // 2))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        for k in range(count):
            chosen = order[k::count].sort().values
            owners, held = torch.bucketize(chosen, ends, right=True).unique_consecutive(return_counts=True)
            places = [(j, at - ends[j] + sizes[j]) for j, at in zip(owners, chosen.split(held.tolist()), strict=True)]
            yield tree_unflatten([_taken(xs, sizes[0], places) for xs in columns], form)


def _one_form(first: tuple, second: tuple) -> bool:
    """Whether two batches can be one: alike in structure, in the shape of a sample, and in what is for all samples."""
    xs, ys = tree_leaves(first), tree_leaves(second)
    return tree_structure(first) == tree_structure(second) and all(
        _of_samples(x, batch_size(first)) == _of_samples(y, batch_size(second))
        and (_of_samples(x, batch_size(first)) or _equal(x, y))
        for x, y in zip(xs, ys, strict=True)
    )


def _of_samples(x: Any, size: int) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of a sample, if there is one for each."""
    return (x.shape[1:], x.dtype) if isinstance(x, Tensor) and x.dim() and len(x) == size else None


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor):
        return type(x) is type(y) and x == y
    return isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(x, y)


def _taken(xs: Sequence[Any], size: int, places: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """The samples at (which tensor, where); what is for all samples as it is. size: of the first."""
    if not _of_samples(xs[0], size):
        return xs[0]
    return torch.cat([xs[int(j)][at.to(xs[0].device)] for j, at in places])


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
