"""heads="joint": the figures by which heads are compared, from the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import InputError
from .processes import ALONE, Processes
from .rewrite import Comparable

STILL = 1e-6  # of its mean or of the largest deviation: less is rounding of a logit that does not change
FIGURES = (  # what is averaged, and where its mean and deviation go
    (lambda head, logits: logits, "mean", "deviation"),
    (Comparable.largest, "shift", "scale"),
)


@torch.no_grad()
def compare_heads(zipped: nn.Module, batches: Sequence[tuple], processes: Processes = ALONE) -> None:
    """Set every `Comparable` of `zipped` by unlabelled samples of all tasks, in two passes that keep sums alone.

    The tasks should have the shares in `batches` that they will have in use. Sums are of float64, over samples and
    pixels. processes: every rank runs its share of the batches. Raises InputError without batches, and for logits that
    are not finite."""
    heads = {name: m for name, m in zipped.named_modules() if isinstance(m, Comparable)}
    if heads and not batches:
        raise InputError('heads="joint" compares heads by samples, and there are none: give a loader')
    for figure, mean, deviation in FIGURES if heads else ():
        for name, (count, total, power) in _sums(zipped, heads, batches, figure, processes).items():
            center = total / count
            if not center.isfinite().all():
                raise InputError(
                    f'heads="joint": not all logits of {name.removeprefix("joint_")} are finite on the calibration'
                    ' data, so heads cannot be compared; use heads="separate"'
                )
            spread = (power / count - center.square()).clamp(min=0).sqrt()
            still = spread <= STILL * torch.maximum(center.abs(), spread.max())
            head = heads[name]
            head.get_buffer(mean).copy_(center.view_as(head.get_buffer(mean)))
            head.get_buffer(deviation).copy_(torch.where(still, 1, spread).view_as(head.get_buffer(deviation)))


def _sums(
    zipped: nn.Module, heads: dict[str, Comparable], batches: Sequence[tuple],
    figure: Callable[[Comparable, Tensor], Tensor], processes: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """Per head, float64 [3, c]: how many values, their sum, the sum of their squares."""
    sums: dict[str, Tensor] = {}

    def add(name: str, head: Any, args: tuple) -> None:
        values = figure(head, args[0]).double().transpose(0, 1).flatten(1)  # [c or 1, samples]
        found = torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)])
        sums[name] = sums[name] + found if name in sums else found

    hooks = [head.register_forward_pre_hook(partial(add, name)) for name, head in heads.items()]
    try:
        for k, batch in enumerate(batches):
            if processes.mine(k):
                zipped(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch))
    finally:
        for hook in hooks:
            hook.remove()
    for name, head in heads.items():
        width = head.mean.numel() if figure is FIGURES[0][0] else 1
        sums.setdefault(name, torch.zeros(3, width, dtype=torch.float64, device=head.mean.device))
        processes.sum(sums[name])
    return sums
