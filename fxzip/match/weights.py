"""Weights of N models as features see them: one row per feature, all other axes in common coordinates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..infer.inner import spread
from ..infer.spaces import MAKES, FeatureSpace, Segment
from ..measure.moments import SpaceMoments
from .matching import Matching


@dataclass(frozen=True, eq=False)
class Axis:
    """runs: (space, segment, positions [n]) on one axis of a parameter; rest: positions of no space [r]. blocks: of
    axis 0, in which this axis has entries of its own (`Segment.blocks`); positions are of the axis spread out."""

    runs: tuple[tuple[str, Segment, Tensor], ...]
    rest: Tensor
    blocks: int = 1

    @classmethod
    def of(cls, held: Sequence[tuple[str, Segment]], length: int, device: torch.device) -> Axis:
        blocks = held[0][1].blocks
        rest = np.setdiff1d(np.arange(length * blocks), np.concatenate([s.positions for _, s in held]))
        runs = ((name, s, torch.from_numpy(s.positions).to(device)) for name, s in held)
        return cls(tuple(runs), torch.from_numpy(rest).to(device), blocks)


@dataclass(frozen=True, eq=False)
class Weights:
    """tensors: parameter -> one tensor per model, all of one shape; axes: parameter -> axis -> what lies on it.

    `moments` and `agreement` take the matchings found so far. A space without one is *not placed*: along its
    axes entries are sorted, feature by feature, which makes rows comparable in whatever order it is.

    >>> a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    >>> space = FeatureSpace("s0", 2, segments=(Segment("w", 0, np.arange(2), frozenset({"produce"})),))
    >>> Weights.of([{"w": a}, {"w": b}], [space]).moments(space, {}).second[0]
    tensor([2.5000, 5.5000, 5.5000, 2.5000], dtype=torch.float64)
    """

    tensors: Mapping[str, tuple[Tensor, ...]]
    axes: Mapping[str, Mapping[int, Axis]]

    @classmethod
    def of(
        cls,
        states: Sequence[Mapping[str, Tensor]],
        spaces: Sequence[FeatureSpace],
        names: Collection[str] | None = None,
        real: Mapping[str, Sequence[np.ndarray]] | None = None,
    ) -> Weights:
        """The parameters of numbers among `names` (default: all) that lie on `spaces`; complex ones as pairs.

        real: of models that were padded to one width, which features of a space are every model's own; the weights
        of the others are zero here. Raises InputError when a parameter has not one shape in all models.
        """
        lying: dict[str, dict[int, list]] = {}
        for space in spaces:
            for s in space.segments:
                held = [state[s.parameter] for state in states if s.parameter in state]
                known = len(held) == len(states) and (held[0].is_floating_point() or held[0].is_complex())
                if known and (names is None or s.parameter in names):
                    lying.setdefault(s.parameter, {}).setdefault(s.axis, []).append((space.name, s))
        tensors = {
            name: tuple(_of_own(as_real(state[name].detach()), held, real or {}, i) for i, state in enumerate(states))
            for name, held in lying.items()
        }
        for name, all_of in tensors.items():
            if len({t.shape for t in all_of}) > 1:
                raise InputError(f"{name}: shapes {[list(t.shape) for t in all_of]} differ, so weights do not compare")
        axes = {
            name: {axis: Axis.of(runs, t[0].shape[axis], t[0].device) for axis, runs in lying[name].items()}
            for name, t in tensors.items()
        }
        return cls(tensors, axes)

    @property
    def degree(self) -> int:
        """Of `agreement` as a polynomial in one model's matchings: the most axes a parameter has in spaces."""
        return max((len(axes) for axes in self.axes.values()), default=0)

    def parameters(self, spaces: Sequence[FeatureSpace]) -> list[str]:
        """Parameters on any of `spaces`, each once."""
        return list(dict.fromkeys(s.parameter for f in spaces for s in f.segments if s.parameter in self.tensors))

    def moments(self, space: FeatureSpace, matchings: Mapping[str, Matching]) -> SpaceMoments | None:
        """Moments of the features' weights, each weight a row: sizes (n, ..., n), count the number of weights.

        None for a space that no parameter lies on. `matchings` of the other axes' spaces, as far as known.
        """
        total, power, count, models = 0.0, 0.0, 0, 0
        for segment in space.segments:
            if segment.parameter in self.tensors:
                models = len(self.tensors[segment.parameter])
                rows = torch.cat([self._rows(segment, matchings, i) for i in range(models)])  # [Sn, d]
                total, power, count = total + rows.sum(1), power + rows @ rows.T, count + rows.shape[1]
        if not count:
            return None
        assert isinstance(total, Tensor) and isinstance(power, Tensor)
        return SpaceMoments((space.size,) * models, float(count), total / count, power / count)

    def agreement(self, matchings: Mapping[str, Matching], names: Collection[str] | None = None) -> float:
        """Sum over pairs of models of the inner product of their weights `names` in common coordinates."""
        found = 0.0
        for name in self.tensors if names is None else names:
            every = [self._mapped(name, matchings, i, None) for i in range(len(self.tensors[name]))]
            both = torch.stack(every)
            found += float(both.sum(0).square().sum() - both.square().sum()) / 2
        return found

    def scale(self) -> float:
        """The largest value `agreement` could take: the sum over pairs of models of their norms' products."""
        count = max((len(t) for t in self.tensors.values()), default=0)
        norms = [sum(float(t[i].double().square().sum()) for t in self.tensors.values()) ** 0.5 for i in range(count)]
        return (sum(norms) ** 2 - sum(n * n for n in norms)) / 2

    def _rows(self, segment: Segment, matchings: Mapping[str, Matching], model: int) -> Tensor:
        """[n, d]: what belongs to every feature of a segment, other axes in common coordinates."""
        x = self._mapped(segment.parameter, matchings, model, segment.axis)
        x = x.index_select(segment.axis, torch.from_numpy(segment.positions).to(x.device))
        return x.movedim(segment.axis, 0).flatten(1) if x.dim() > 1 else x[:, None]

    def _mapped(self, name: str, matchings: Mapping[str, Matching], model: int, keep: int | None) -> Tensor:
        """One model's weight, float64, every axis but `keep` in merged order: spaces, then inert entries."""
        x = self.tensors[name][model].double()
        x = spread(x, max(held.blocks for held in self.axes[name].values()))
        for axis, held in self.axes[name].items():
            if axis == keep:
                continue
            flat = x.movedim(axis, 0)
            parts = [flat[held.rest]]
            for space, segment, positions in held.runs:
                part, found = flat[positions], matchings.get(space)
                parts.append(part.sort(0).values if found is None else _turn(found, segment, part, model))
            x = torch.cat(parts).movedim(0, axis)
        return x


def _of_own(
    x: Tensor,
    held: Mapping[int, Sequence[tuple[str, Segment]]],
    real: Mapping[str, Sequence[np.ndarray]],
    model: int,
) -> Tensor:
    """`x` without what makes features that are not the model's own; nothing reads them in a padded model."""
    for axis, runs in held.items():
        for space, segment in runs:
            if space in real and segment.roles & MAKES:
                idle = np.setdiff1d(np.arange(len(segment.positions)), real[space][model])
                x = x.index_fill(axis, torch.from_numpy(segment.positions[idle]).to(x.device), 0)
    return x


def as_real(x: Tensor) -> Tensor:
    """Complex numbers as pairs, along one more axis at the end; real ones as they are."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _turn(matching: Matching, segment: Segment, x: Tensor, model: int) -> Tensor:
    """[n, ...] -> [m, ...]: N M_i where the axis makes features, U_i^T where it reads them; a permutation alike."""
    makes = bool(segment.roles & MAKES)
    matrix = matching.blocks_merge(model) * len(matching.sizes) if makes else matching.blocks_unmerge(model).T
    matrix = matrix.to(x.device)
    if matrix.shape[0] == matrix.shape[1] and bool(((matrix == 0) | (matrix == 1)).all()):
        index = matrix.argmax(1)
        if len(index.unique()) == len(index) and bool((matrix.sum(1) == 1).all()):
            return x[index]
    return (matrix @ x.flatten(1)).reshape(len(matrix), *x.shape[1:]) if x.dim() > 1 else matrix @ x
