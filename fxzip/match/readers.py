"""What reads a space's features, and so how much an error in each of them counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..infer.inner import spread
from ..infer.spaces import FeatureSpace
from ..measure.moments import SpaceMoments
from .weights import as_real


@dataclass(frozen=True, eq=False)
class Read(SpaceMoments):
    """Moments, and the metric of what reads the features: an error e [Sn] in them costs e^T metric e.

    metric: float64 [Sn, Sn], symmetric, positive semi-definite, in blocks, one per model: a model reads only its own
    features. A parameter W that reads them counts by the relative squared errors of its outputs,
    the sum over outputs o of (W_o e)^2 / var(W_o f), divided by their number. straight: nothing acts across the
    features before they are read (a norm over them rescales them all), so that these are the errors readers see.
    """

    metric: Tensor
    straight: bool = True

    def restrict(self, features: Sequence[np.ndarray]) -> Read:
        """Of some features only: `features[i]` are indices into model i's own."""
        plain = super().restrict(features)
        index = torch.cat([torch.as_tensor(f) + start for f, start in zip(features, self.offsets, strict=False)])
        return Read(plain.sizes, plain.count, plain.mean, plain.second, self.metric[index][:, index], self.straight)


def reading(
    space: FeatureSpace,
    seen: SpaceMoments,
    states: Sequence[Mapping[str, Tensor]],
    real: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> SpaceMoments:
    """A space's moments, with what reads them where a parameter does. states: name -> parameter, one per model.

    Parameters may have other shapes in other models, but for the space's axis: heads count, too. real: as for `match`,
    the features of a space that the moments are of, for every model. A metric takes as much memory as the moments.

    >>> from fxzip.infer.spaces import Segment
    >>> space = FeatureSpace("s0", 2, segments=(Segment("w", 1, np.arange(2), frozenset({"consume"})),))
    >>> seen = SpaceMoments((2,), 1.0, torch.zeros(2), torch.eye(2))
    >>> reading(space, seen, [{"w": torch.tensor([[3.0, 0.0], [0.0, 5.0]])}]).metric
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    covariance, blocks = seen.covariance(), []
    for i, state in enumerate(states):
        own = slice(seen.offsets[i], seen.offsets[i + 1])
        index = np.arange(space.size) if real is None or space.name not in real else real[space.name][i]
        blocks.append(_metric(space, index, state, covariance[own, own]))
    del covariance
    if not any(b.any() for b in blocks):
        return seen
    metric = torch.block_diag(*blocks)
    return Read(seen.sizes, seen.count, seen.mean, seen.second, metric, not space.nonlinear)


def _metric(space: FeatureSpace, index: np.ndarray, state: Mapping[str, Tensor], covariance: Tensor) -> Tensor:
    """One model's block, of the features `index`. [n, n]"""
    metric = torch.zeros_like(covariance)
    readers: dict[tuple[str, int], list[Tensor]] = {}
    for s in space.segments:
        weight = state.get(s.parameter)
        if "consume" in s.roles and weight is not None and weight.dim() > 1:
            held = spread(as_real(weight.detach()), s.blocks).movedim(s.axis, 0)
            rows = held[torch.from_numpy(s.positions[index]).to(weight.device)]
            readers.setdefault((s.parameter, s.axis), []).append(
                (rows.flatten(2) if rows.dim() > 2 else rows[:, :, None]).to(covariance)
            )
    for parts in readers.values():
        rows = torch.cat(parts, 2)  # [n, outputs, taps]
        flat = rows.flatten(1)
        variance = (flat * (covariance @ flat)).reshape(rows.shape).sum((0, 2))  # of each output, taps apart
        counts = variance > 0
        share = torch.where(counts, 1 / torch.where(counts, variance, 1), 0) / len(variance)
        metric += (rows * share[:, None]).flatten(1) @ flat.T
    return (metric + metric.T) / 2
