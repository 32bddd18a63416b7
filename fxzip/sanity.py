"""Is the outcome likely to be what the user wanted? One sentence for each doubt, with the next thing to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, log, sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from .check import broken
from .errors import InputError, VerificationError
from .match import Matching
from .measure import Moments
from .rewrite import batch_norms, extract
from .trace import batch_size, beside, rows
from .verification import Verification

FEW = 16  # samples below which correlations say little
LOW = 0.1  # a mean correlation that no useful match has
SHARED = 0.05  # share of the result's parameters below which merging saved next to nothing
SHIFT, SPREAD = 1.0, 4.0  # of data against norm statistics: in deviations, and as a factor of the variance
LOOK = 64  # samples that are compared with norm statistics
LOSS = 0.1  # of a model's own figure, that a merge may lose without a word


def doubts(
    verification: Verification | None,
    share: float,
    matchings: Mapping[str, Matching],
    moments: Moments,
    names: Sequence[str],
    graph_modules: Sequence[fx.GraphModule],
    batches: Sequence[tuple],
) -> list[str]:
    """All that can be said without the user's own measure. share: of the result's parameters that tasks share."""
    return [
        *_unproven(verification),
        *_no_op(share),
        *_little_data(moments),
        *_all_the_same(batches),
        *_chance(matchings, moments),
        *(text for name, m in zip(names, graph_modules, strict=True) for text in _other_data(name, m, batches)),
    ]


def _unproven(verification: Verification | None) -> list[str]:
    if verification is None or verification.ok:
        return []
    return [f"the proof failed and was overruled, the merge may be wrong: {verification.problems[0]}"]


def _no_op(share: float) -> list[str]:
    if share >= SHARED:
        return []
    return [
        f"only {share:.1%} of the merged parameters are shared, so next to nothing was merged: see what the report"
        " lists as not merged, and name a later module as until= if one was given"
    ]


def _little_data(moments: Moments) -> list[str]:
    samples = min((m.count for m in moments.values()), default=FEW)
    if samples >= FEW:
        return []
    return [
        f"features were compared on {samples:.0f} sample{'s' * (round(samples) != 1)} only, and correlations of so few"
        " say little: give a loader with some hundred samples of every task"
    ]


def _all_the_same(batches: Sequence[tuple]) -> list[str]:
    columns = [[x for x in tree_flatten(b)[0] if isinstance(x, Tensor) and x.dim()] for b in batches]
    total = sum(c[0].shape[0] for c in columns if c)
    first = [x[:1] for x in columns[0]] if columns else []
    if total < 2 or not all(_rows_equal(x, y) for c in columns for x, y in zip(c, first, strict=False)):
        return []
    return [f"all {total} calibration inputs are the same: features cannot be compared on them, give real data"]


def _rows_equal(x: Tensor, row: Tensor) -> bool:
    return x.shape[1:] == row.shape[1:] and bool((x == row).all())


def _chance(matchings: Mapping[str, Matching], moments: Moments) -> list[str]:
    """Best pairs of n unrelated features correlate by about sqrt(2 log n / rows)."""
    low, total, worst = 0, 0, (2.0, "")
    for name, m in matchings.items():
        if name not in moments or not isfinite(m.quality):
            continue
        noise = sqrt(2 * log(max(m.width, 2)) / max(moments[name].count, 1))
        total += m.width
        if m.quality < max(LOW, min(noise, 0.5)):
            low += m.width
            worst = min(worst, (m.quality, name))
    if not low or low <= total / 2:
        return []
    return [
        f"matched features hardly correlate ({worst[0]:.2f} in {worst[1]}; chance in {low} of {total} merged features):"
        " are the calibration data what the models were trained on? Give more, or merge less with until="
    ]


def _other_data(name: str, module: fx.GraphModule, batches: Sequence[tuple]) -> list[str]:
    """Whether the first batch, at the batch norms, is far from the statistics that training left there."""
    norms = [n for n in batch_norms(module) if not _untouched(n)]
    if not norms or not batches:
        return []
    first = batches[0]
    found = _distances(module, norms, beside(rows(first, min(batch_size(first), LOOK)), module))
    if not found:
        return []
    shifts, spreads = (sorted(column) for column in zip(*found, strict=True))
    middle, shallow = len(found) // 2, found[0]
    if max(shallow[0], shifts[middle]) < SHIFT and max(shallow[1], spreads[middle]) < log(SPREAD):
        return []
    return [
        f"the calibration data do not look like what {name} was trained on: at its first batch norm means are off by"
        f" {shallow[0]:.1f} deviations and variances by a factor of {torch.tensor(shallow[1]).exp():.1f} (medians):"
        " check the normalisation of the inputs"
    ]


def _untouched(norm: Any) -> bool:
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


def _distances(module: nn.Module, norms: Sequence[Any], args: tuple) -> list[tuple[float, float]]:
    """Per norm, in the order they run: medians over channels of |mean difference| / deviation and |log variance|."""
    found: list[tuple[float, float]] = []

    def look(norm: Any, inputs: tuple) -> None:
        x: Tensor = inputs[0].detach().double()
        if x.dim() < 2 or x.numel() <= x.shape[1]:
            return
        x = x.transpose(0, 1).flatten(1)  # [channels, samples and pixels]
        mean, var = norm.running_mean.double(), norm.running_var.double().clamp(min=1e-12)
        shift = ((x.mean(1) - mean).abs() / var.sqrt()).median()
        spread = (x.var(1).clamp(min=1e-12) / var).log().abs().median()
        found.append((float(shift), float(spread)))

    handles = [n.register_forward_pre_hook(look) for n in norms]
    try:
        with torch.no_grad():
            module(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measured(
    zipped: fx.GraphModule,
    names: Sequence[str],
    models: Sequence[nn.Module],
    evaluate: Callable[[nn.Module, str], float],
) -> tuple[list[str], list[str]]:
    """(figures to report, doubts): every model and what the result has for its task, by the user's own measure."""
    figures, found = [], []
    for name, model in zip(names, models, strict=True):
        own, merged = _figure(evaluate, model, name), _figure(evaluate, extract(zipped, name), name)
        figures.append(f"evaluate: {name} {own:.4g}, merged {merged:.4g}")
        if merged < own - LOSS * abs(own):
            found.append(
                f"on {name} the merged network measures {merged:.4g}, the model itself {own:.4g}: merge less"
                " (until=), allow more (budget=), or give more calibration data"
            )
    return figures, found


def _figure(evaluate: Callable[[nn.Module, str], float], network: nn.Module, task: str) -> float:
    value = evaluate(network, task)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"evaluate returned {value!r} for {task}, not a number") from error


def refuse_broken(zipped: nn.Module) -> None:
    """Raises VerificationError for NaN in a merged parameter or buffer, or infinity where it is not meant."""
    tensors = (*zipped.named_parameters(), *zipped.named_buffers())
    bad = [name for name, t in tensors if t.is_floating_point() and bool(broken(name, t).any())]
    if bad:
        what = f"{bad[0]} ({len(bad)} tensors do)"
        raise VerificationError(
            f"the merged network has NaN or infinite values in {what}: nothing is returned. Are the calibration"
            " data finite and scaled as in training? Another method= may do; please report it"
        )
