"""Distill: natural-gradient steps on what solve has fitted, towards the parents' outputs and features.

    for each batch:   v <- MOMENTUM v - G^-1 (dL/dW) S^-1,   W <- W + rate v
        L  the relative squared errors of all outputs, and `features` times those of what solve aims at

Solve fits every layer for itself; what a layer can make up for that was lost before or is lost behind it takes
derivatives through the whole network. No labels; but gradients, and some passes over the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, cos, inf, isfinite, pi
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from tqdm.auto import tqdm

from ..errors import InputError
from ..match import Matcher
from ..solve import Settings, Solve
from ..solve.sequence import Pass
from ..trace import batch_size
from .aims import feature_aims, output_aims, targets
from .curvature import Curvature
from .needs import distill_needs
from .network import Layer, Network, Place, Unmerge, derived
from .views import View, check_views, seen

MOMENTUM = 0.9
RATE = 0.2  # of the step that would be best on the first batches, were it the only one
SLOWER = 4  # by so much after an epoch that has to be undone
FIRST = 512  # samples that curvature and rate are from
HELD_OUT = 8  # one in so many chunks is not learnt from: what epochs are judged on

_NO_STEMS = "Distill(views=) does not go by since=: what is shared reads stems' features, not the inputs"

Errors = tuple[float, float]  # relative squared ones, of outputs and of features, each as they count

__all__ = ["Distill", "Distilled", "distill", "distill_needs"]


@dataclass(frozen=True)
class Distill:
    """method="solve+distill": solve, then natural-gradient steps towards the parents' outputs and features (fxzip;
    Martens and Grosse, ICML 2015, for the steps). Label-free, but neither gradient-free nor closed form.

    solve: what is fitted first. epochs: over the calibration samples, but for an eighth of them, on which each is
        judged (from 8 chunks on). batch: samples of one step, about. features: what all fits' own aims count together,
        beside the outputs, which count 1. views: functions of the inputs that leave the right outputs as they are, such
        as `lambda x: x.flip(-1)` for photographs of animals; outputs then aim at the mean of what the models give for
        an input and its views, and every step sees one of these. Takes several times solve's time, and memory for
        derivatives of a batch.
    Raises InputError for epochs or batch below 1, or features below 0; `merge` for views that change shapes, write to
        their inputs, draw at random or mix samples.

    >>> Distill(epochs=2).name
    'solve+distill'
    """

    solve: Solve = field(default_factory=Solve)
    epochs: int = 6
    batch: int = 128
    features: float = 10.0
    views: Sequence[View] = ()
    seed: int = 0
    name: ClassVar[str] = "solve+distill"

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch": 1, "features": 0}
        wrong = [n for n, low in least.items() if not getattr(self, n) >= low]
        said = [f"{n} must be at least {least[n]}, got {getattr(self, n)!r}" for n in wrong]
        views = self.views if isinstance(self.views, Sequence) else (None,)
        said += [] if all(map(callable, views)) else [f"views must be a list of functions, got {self.views!r}"]
        if said:
            raise InputError.listing("Distill", said)
        object.__setattr__(self, "views", tuple(self.views))

    def refused(self, memory: Any, distributed: Any, since: str | None) -> list[str]:
        """What options of `merge` it does not go with."""
        given = {"memory": memory is not None, "distributed": distributed not in (None, False)}
        wrong = [f"method 'solve+distill' does not go by {k}=: leave it out, or use method='solve'"
                 for k, there in given.items() if there]  # fmt: skip
        if self.views and since is not None:
            wrong.append(_NO_STEMS)
        return wrong

    def check(self, batches: Sequence[tuple], stems: bool) -> None:
        """Raises InputError where views cannot be taken of these positional arguments. stems: of what `since` left."""
        if self.views and stems:
            raise InputError(_NO_STEMS)
        check_views(self.views, *batches[:1]) if batches else None

    @property
    def settings(self) -> Settings:
        """Of the fits."""
        return self.solve.settings

    def matcher_for(self, models: int) -> Matcher:
        """The matcher for this many models."""
        return self.solve.matcher_for(models)

    def __call__(self, steps: Pass, chunks: Sequence[tuple], unmerged: Unmerge, progress: bool = True) -> str:
        """What `solve_parameters` calls after its fits."""
        return str(distill(steps, chunks, unmerged, self, progress))


@dataclass(frozen=True)
class Distilled:
    """Errors on calibration samples that no step has seen; where there are too few for that, on those it has."""

    before: Errors
    after: Errors  # the same: no epoch has become better, and the layers are as solve left them
    views: int = 0  # beside the inputs as they are
    held_out: bool = False

    def __str__(self) -> str:
        outputs, features = zip(self.before, self.after, strict=True)
        told = "errors of outputs {:.4f} -> {:.4f}, of features {:.4f} -> {:.4f}".format(*outputs, *features)
        means = f" (outputs: from the mean over an input and {self.views} of its views)" if self.views else ""
        kept = "; no epoch ended better, so the layers are solve's" if self.after == self.before else ""
        return f"distill: {told}{means} on {'held-out ' if self.held_out else ''}calibration samples{kept}"


def distill(
    steps: Pass, chunks: Sequence[tuple], unmerged: Unmerge, settings: Distill, progress: bool = True
) -> Distilled:
    """Take the layers that `steps` fitted further. chunks: positional-argument tuples of one batch size."""
    return _Run(steps, chunks, unmerged, settings).run(progress)


class _Run:
    """One network's steps: what moves, what it is to come near to, and on which samples."""

    def __init__(self, steps: Pass, chunks: Sequence[tuple], unmerged: Unmerge, settings: Distill) -> None:
        layers = {(point.name, model): Layer.of(point, parts) for point, parts, model in steps.fits}
        for layer in layers.values():
            layer.matrix.requires_grad_(True)
        self.parents, self.settings, self.chunks = steps.parents, settings, chunks
        self.judged = chunks[HELD_OUT - 1 :: HELD_OUT]  # from all over, as loaders may go task by task
        self.learnt = [c for k, c in enumerate(chunks, 1) if k % HELD_OUT]
        owners = {name: steps.owners(name) for name in steps.dynamic}
        self.network = Network(steps.merged, steps.private, steps.dynamic, owners, unmerged, layers)
        self.layers, self.size = layers, batch_size(chunks[0])
        self.aims = [*output_aims(steps), *feature_aims(steps, layers, settings.features, bool(settings.views))]
        self.scale: list[Tensor] = []  # of the variance of every aim
        self.generator = torch.Generator().manual_seed(settings.seed)

    def run(self, progress: bool) -> Distilled:
        if not self.layers:
            return Distilled((0.0, 0.0), (0.0, 0.0))
        first = self.learnt[: ceil(FIRST / self.size)]
        judged = self.judged or first
        curvature, before = Curvature(self.layers), self._errors(judged)
        for args in first:
            tape: dict[Place, tuple[dict, Tensor]] = {}
            with torch.enable_grad():
                curvature.add(tape, self._residuals(args, tape), self.size, self.generator)
        curvature.invert()
        after = self._descend(curvature, self._rate(curvature, first), judged, before, progress)
        self._write()
        return Distilled(before, after, len(self.settings.views), bool(self.judged))

    def _residuals(self, args: tuple, tape: dict | None = None, view: int = 0) -> list[Tensor]:
        """Of every aim, scaled so that squares add up to its share of the loss, times the samples. view: 0 is none."""
        every = [args, *(seen(v, args) for v in self.settings.views)]
        args = every.pop(view)
        wanted = targets(self.aims, self.parents, args, every)
        if not self.scale:
            spread = [(t - t.mean(0)).square().mean().clamp(min=1e-12) for t in wanted]
            self.scale = [(a.share / v).sqrt() for a, v in zip(self.aims, spread, strict=True)]
        values = self.network([x for x in tree_leaves(args) if isinstance(x, Tensor)], tape)
        return [
            (values[a.place] - t) * (s * (self.size / t.numel()) ** 0.5)
            for a, t, s in zip(self.aims, wanted, self.scale, strict=True)
        ]

    @torch.no_grad()
    def _errors(self, batches: Sequence[tuple]) -> Errors:
        total = [0.0, 0.0]
        for args in batches:
            for a, r in zip(self.aims, self._residuals(args), strict=True):
                total[a.feature] += float(r.double().square().sum()) / (self.size * len(batches))
        return (total[0], total[1]) if all(map(isfinite, total)) else (inf, inf)

    def _gradients(self, args: tuple, view: int = 0) -> dict[Place, Tensor]:
        with torch.enable_grad():
            loss = sum(r.square().sum() for r in self._residuals(args, view=view)) / (2 * self.size)
            return dict(zip(self.layers, derived(loss, [k.matrix for k in self.layers.values()]), strict=True))

    def _rate(self, curvature: Curvature, batches: Sequence[tuple]) -> float:
        """From the best step along the natural gradient: -<g, d> / |J d|^2, by differences."""
        slope = bend = 0.0
        for args in batches[: ceil(4 * self.settings.batch / self.size)]:
            gradients = self._gradients(args)
            steps = {p: curvature.step(p, g) for p, g in gradients.items()}
            slope -= float(sum((gradients[p] * d).double().sum() for p, d in steps.items()))
            length = 1e-2
            with torch.no_grad():
                here = self._residuals(args)
                self._move(steps, length)
                there = self._residuals(args)
                self._move(steps, -length)
            bend += sum(float(((b - a).double() / length).square().sum()) for a, b in zip(here, there, strict=True))
        return RATE * slope / max(bend / self.size, 1e-300)

    def _move(self, steps: Mapping[Place, Tensor], length: float) -> None:
        for place, step in steps.items():
            self.layers[place].matrix.data.add_(step, alpha=length)

    def _descend(
        self, curvature: Curvature, rate: float, judged: Sequence[tuple], best: Errors, progress: bool
    ) -> Errors:  # fmt: skip
        """Steps with momentum. An epoch that ends worse is undone, and what follows is slower. Errors at the end."""
        joined = max(1, round(self.settings.batch / self.size))
        each, epochs, drawn = max(1, len(self.learnt) // joined), self.settings.epochs, self._drawn()
        held, speed = self._held(), {p: torch.zeros_like(layer.matrix) for p, layer in self.layers.items()}
        bar = tqdm(total=epochs * each, desc="distill", unit="step", disable=not progress, leave=False)
        for epoch in range(epochs):
            for k in range(each):
                gradient: dict[Place, Tensor] = {}
                for _ in range(min(joined, len(self.learnt))):
                    for p, g in self._gradients(*next(drawn)).items():
                        gradient[p] = gradient[p] + g if p in gradient else g
                for p, g in gradient.items():
                    speed[p].mul_(MOMENTUM).add_(curvature.step(p, g / joined))
                self._move(speed, rate * (1 + cos(pi * (epoch + k / each) / epochs)) / 2)
                bar.update()
            now = self._errors(judged)
            if _worse(best, now):
                self._restore(held)
                rate, speed = rate / SLOWER, {p: torch.zeros_like(v) for p, v in speed.items()}
            else:
                best, held = now, self._held()
        bar.close()
        return best

    def _held(self) -> dict[Place, Tensor]:
        return {p: layer.matrix.detach().clone() for p, layer in self.layers.items()}

    def _restore(self, held: Mapping[Place, Tensor]) -> None:
        for place, matrix in held.items():
            self.layers[place].matrix.data.copy_(matrix)

    def _drawn(self) -> Iterator[tuple[tuple, int]]:
        """Chunks of the samples to learn from, dealt anew for every epoch; and by which view each is seen, 0: none."""
        count, views = len(self.learnt) * self.size, len(self.settings.views)
        while True:
            order = torch.randperm(count, generator=self.generator)
            for index in order.split(self.size):
                view = int(torch.randint(1 + views, (), generator=self.generator)) if views else 0
                yield _taken(self.learnt, index, self.size), view

    @torch.no_grad()
    def _write(self) -> None:
        """Matrices into the lanes, and for norms the exact statistics of what they get."""
        sums = {p: [torch.zeros(()), torch.zeros(()), 0] for p, layer in self.layers.items() if layer.point.normed}
        for args in self.chunks if sums else ():
            tape: dict[Place, tuple[dict, Tensor]] = {}
            self.network([x for x in tree_leaves(args) if isinstance(x, Tensor)], tape)
            for p, total in sums.items():
                layer = self.layers[p]
                rows = layer.rows_of(tape[p][1]).flatten(1).double() - layer.matrix[..., -1].flatten().double()
                sums[p] = [total[0] + rows.sum(0), total[1] + rows.square().sum(0), total[2] + len(rows)]
        for p, layer in self.layers.items():
            nothing = torch.zeros(())
            mean, square, count = sums.get(p, (nothing, nothing, 1))
            layer.write(mean / count, square / count - (mean / count) ** 2)


def _worse(before: Errors, after: Errors) -> bool:
    return not sum(after) < sum(before)


def _taken(chunks: Sequence[tuple], index: Tensor, size: int) -> tuple:
    """The samples `index` of all chunks together; what has no row for each sample is the same in all."""

    def take(first: Any, *others: Any) -> Any:
        of = (first, *others)
        same = len(of) > 1 and first is of[1]
        if same or not (isinstance(first, Tensor) and first.dim() and len(first) == size):
            return first
        return torch.stack([of[k // size][k % size] for k in index.tolist()])

    return tree_map(take, chunks[0], *chunks[1:])
