"""A metric of errors in features by all that follows: for tried.py.

A parameter W that reads a space costs its outputs what errors *there* cost: where they are features of another space,
by that space's metric, scaled to the space's own deviations, and so on to the logits; without gradients. fxzip's own
(`match.Read`) counts the relative errors of the next layers' outputs alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from fxzip.infer.inner import spread
from fxzip.infer.spaces import MAKES, FeatureSpace, Segment
from fxzip.match import Read
from fxzip.match.weights import as_real
from fxzip.measure.moments import SpaceMoments
from fxzip.prepared import Prepared

ROUNDS = 4  # how often what a residual stream's own layers add to it is followed


@contextmanager
def metric_by_what_follows(leak: float) -> Iterator[None]:
    """Select's metric within: see above."""
    plain = Prepared.reading

    def reading(prepared: Prepared, moments):
        one = plain(prepared, moments)
        found = {name: one(name, seen) for name, seen in moments.items()}
        spaces = [s for s in prepared.merged_spaces() if isinstance(found.get(s.name), Read)]
        states = [dict(m.named_parameters()) for m in prepared.graph_modules]
        every = [Metrics(spaces, found, state, i, leak).metrics() for i, state in enumerate(states)]
        new = {s.name: torch.block_diag(*(m[s.name] for m in every)) for s in spaces}
        found |= {n: replace(found[n], metric=new[n]) for n in new}  # type: ignore[type-var]
        return lambda name, _: found[name]

    with patch.object(Prepared, "reading", reading):
        yield


class Metrics:
    """The metrics of one model's spaces. leak: what every output counts as though the network gave it out."""

    def __init__(
        self,
        spaces: Sequence[FeatureSpace],
        moments: Mapping[str, SpaceMoments],
        state: Mapping[str, Tensor],
        model: int,
        leak: float,
    ) -> None:
        self.spaces, self.state, self.leak = spaces, state, leak
        self.covariance: dict[str, Tensor] = {}
        self.made: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}  # (parameter, axis) -> what lies on it
        self.makers: dict[str, int] = {}
        self.read = {f.name for f in spaces if any("consume" in s.roles and self._contracts(s) for s in f.segments)}
        for space in spaces:
            seen = moments[space.name]
            own = slice(seen.offsets[model], seen.offsets[model + 1])
            self.covariance[space.name] = seen.covariance()[own, own]
            making = [s for s in space.segments if s.roles & MAKES and self._contracts(s)]
            self.makers[space.name] = max(len(making), 1)
            for s in making:
                places = torch.from_numpy(s.positions).to(seen.mean.device)
                self.made.setdefault((s.parameter, s.axis), []).append((space.name, places))

    def metrics(self) -> dict[str, Tensor]:
        """Backwards from the outputs; where a space is read by layers that add to it (a residual stream), ROUNDS times.
        A metric is made again only if one that it is made of has changed."""
        found = {name: torch.zeros_like(c) for name, c in self.covariance.items()}
        fresh = set(found)
        for _ in range(ROUNDS):
            stale, fresh = fresh, set()
            for space in reversed(self.spaces):
                readers = self._readers(space)
                behind = {t for parameter, axis in readers for t, _ in self.made.get((parameter, 1 - min(axis, 1)), ())}
                if space.name in stale or behind & (stale | fresh):
                    metric = sum(
                        (self._cost(space, r, rows, found) for r, rows in readers.items()), found[space.name] * 0
                    )
                    if not torch.equal(metric, found[space.name]):
                        found[space.name] = metric
                        fresh.add(space.name)
            if not fresh:
                break
        return found

    def _contracts(self, s: Segment) -> bool:
        return s.parameter in self.state and self.state[s.parameter].dim() > 1

    def _readers(self, space: FeatureSpace) -> dict[tuple[str, int], Tensor]:
        """(parameter, axis) -> the weights that read the features, [n, outputs, taps]"""
        parts: dict[tuple[str, int], list[Tensor]] = {}
        covariance = self.covariance[space.name]
        for s in space.segments:
            if "consume" in s.roles and self._contracts(s):
                held = spread(as_real(self.state[s.parameter].detach()), s.blocks).movedim(s.axis, 0)
                rows = held[torch.from_numpy(s.positions).to(held.device)]
                rows = (rows.flatten(2) if rows.dim() > 2 else rows[:, :, None]).to(covariance)
                parts.setdefault((s.parameter, s.axis), []).append(rows)
        return {reader: torch.cat(rows, 2) for reader, rows in parts.items()}

    def _cost(self, space: FeatureSpace, reader: tuple[str, int], rows: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        """What errors in the features cost in the outputs of one reader, [n, n]"""
        flat = rows.flatten(1)
        variance = (flat * (self.covariance[space.name] @ flat)).reshape(rows.shape).sum((0, 2))  # taps apart
        counts = variance > 0
        share = torch.where(counts, 1 / torch.where(counts, variance, 1), 0)
        plain, turned = share / len(share), torch.zeros_like(rows)
        for target, places in self.made.get((reader[0], 1 - min(reader[1], 1)), ()):
            if target in self.read:  # else nothing is known of it, and it counts as though it came out
                power = self.covariance[target].diagonal().clamp_min(0) / self.makers[target]
                scale = (power * share[places]).sqrt()
                metric = found[target] * torch.outer(scale, scale) * (1 - self.leak)
                turned[:, places] += torch.einsum("iot,op->ipt", rows[:, places], metric)
                plain[places] *= self.leak
        metric = (turned + rows * plain[:, None]).flatten(1) @ flat.T
        return (metric + metric.T) / 2
