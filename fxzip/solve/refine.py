"""Fits that look through the non-linearity that follows: only what it lets pass has to be right.

Least squares on pre-activations spends capacity on values that, say, ReLU cuts off anyway. With f the
non-linearity, minimise E |f(t) - f(W x)|^2 by majorisation: replace the target by

    t' = y + w (t - y),   y = W x,   w = clip(max(|f(t) - f(y)| / |t - y|, |f'(t)|), 0, 1)

and solve again with the same factored Gram matrix. For ReLU t' projects y on {y: f(y) = f(t)}, so this is
alternating projection, over-relaxed: four sweeps do what eight plain ones do. Closed form.

E[t' x^T] = W S + E[(t' - y) x^T]: only the second term is summed and solved for, with the same inverse (`Ridge.moved`).
In the last sweep it takes as many rows: a third of them left the logits a tenth farther from the
parents'. The sweeps before only have to come near, and take some rows of many: three such sweeps end where four of all
rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..processes import ALONE, Processes
from ..products import product
from .ridge import Fit, Gram, Ridge

TOLD = 4_096  # rows that an error is told from, at least
RELAX = 1.7  # alternating projections converge for any factor in (0, 2)
PARTS = (1, 3, 5)  # the last sweep takes every row, the one before every third; odd, as rows of images have even widths
CLOSE = 0.002  # relative squared error of a fit that needs no sweep: what is left is not where f does not see it
WHOLE = 2  # sweeps of all rows, at most, where no part of them is enough: a third would gain less than 1 %
ENOUGH = 10  # rows per column, below which no sweep looks at a part of the rows: noise stays where f does not see it

Kept = tuple[Tensor, Tensor, Tensor]  # design rows [r, g, p]; targets [r, g, o]; targets where f is applied [r, g, o]


def refine(
    gram: Gram,
    start: Tensor,
    lam: float,
    sweeps: int,
    kept: Sequence[Kept],
    bend: Callable[[Tensor], Tensor],
    processes: Processes = ALONE,
    each: int = 0,
) -> Fit:
    """The fit after `sweeps` re-targetings, two at most where rows are few, none where it is close without; errors are
    of f(t) against f(W x), relative to E f(t)^2.

    gram: of all rows of all ranks; kept: rows of this one. each: how many of them in a row are of one chunk (0: all
    of a tensor), so that a part has the same ones however chunks are joined and dealt."""
    problem = Ridge(gram, start, lam)
    before, count = _error(start, kept, bend, processes)
    weights, spare = problem.solve(), count // (ENOUGH * start.shape[-1])
    after, _ = _error(weights, kept, bend, processes)
    if after < CLOSE:
        return Fit(weights, before, after)
    step = _step(kept, processes)
    for left in reversed(range(sweeps if spare >= PARTS[1] else min(sweeps, WHOLE))):
        every = max(n for n in PARTS[: left + 1] if n <= max(spare, 1))
        moved, single = torch.zeros_like(problem.c), _like_rows(weights, kept)
        rows = moved.new_zeros(1)
        for x, t, full in ((_part(v, every, each) for v in block) for block in kept):
            gap = _retargeting(_predict(x, single), t, full - t, bend, step)
            moved += product(gap.permute(1, 2, 0), x.transpose(0, 1)).double()
            rows += len(x)
        processes.sum(moved, rows)
        aimed = problem.moved(weights, moved.div_(rows))
        weights = aimed.sub_(weights).mul_(RELAX).add_(weights)
    return Fit(weights, before, _error(weights, kept, bend, processes)[0])


def _part(rows: Tensor, every: int, each: int) -> Tensor:
    """One in so many of the `each` rows of every chunk. [r, ...]"""
    return rows if every == 1 else rows.unflatten(0, (-1, each or len(rows)))[:, ::every].flatten(0, 1)


def _like_rows(weights: Tensor, kept: Sequence[Kept]) -> Tensor:
    """In the precision of the design rows, if this rank has any."""
    return weights.to(kept[0][0].dtype) if kept else weights


def _predict(x: Tensor, weights: Tensor) -> Tensor:
    return product(x.transpose(0, 1), weights.mT).transpose(0, 1)  # [r, g, o]


def _step(kept: Sequence[Kept], processes: Processes) -> float:
    """Over how much slopes are told: a thousandth of the standard deviation of what f is applied to, on all ranks."""
    sums = torch.zeros(3, dtype=torch.float64)
    for _, _, full in kept:
        found = float(full.sum(dtype=sums.dtype)), float(full.square().sum(dtype=sums.dtype)), full.numel()
        sums += torch.tensor(found, dtype=sums.dtype)
    processes.sum(sums)
    mean, square = (sums[:2] / sums[2]).tolist()
    return 1e-3 * max(square - mean**2, 1e-12) ** 0.5


def _retargeting(y: Tensor, t: Tensor, offset: Tensor, bend: Callable[[Tensor], Tensor], step: float) -> Tensor:
    """t' - y."""
    a, b = y + offset, t + offset  # where f is applied
    gap = b - a
    slope = (bend(b + step) - bend(b - step)).abs() / (2 * step)
    secant = (bend(b) - bend(a)).abs() / gap.abs().clamp(min=1e-9)
    return torch.maximum(slope, secant).clamp(max=1) * gap


def _error(
    weights: Tensor, kept: Sequence[Kept], bend: Callable[[Tensor], Tensor], processes: Processes
) -> tuple[float, int]:
    """(Relative squared error, which a part of many rows tells, and all rows), over all ranks."""
    wrong = total = 0.0
    every = max(sum(len(x) for x, _, _ in kept) // TOLD, 1)
    weights = _like_rows(weights, kept)
    for x, t, full in ((v[::every] for v in rows) for rows in kept):
        target = bend(full)
        wrong += float((bend(_predict(x, weights) + full - t) - target).double().pow(2).sum())
        total += float(target.double().pow(2).sum())
    sums = torch.tensor([wrong, total, sum(len(x) for x, _, _ in kept)], dtype=torch.float64)
    processes.sum(sums)
    wrong, total, count = sums.tolist()
    return wrong / max(total, 1e-300), int(count)
